"""Parameters as matrix products take them: joined, cast and laid out once a step instead of once a micro-batch.

A parameter is stored in float32 under its own name; a product takes it in the dtype of activations, q, k and v as one
matrix, gate and up as another. Between the two lies a cheap function P of joins, cuts and casts. While weights are kept
P runs once: the micro-batches read copies of its results and leave their gradients there, in the parameters' dtype,
and at the end one backward pass through P hands the sums to the parameters.

P must be linear and must not sum where an order is fixed: then the gradients of micro-batches can be added before it as
well as after it, to the bit. Sums over slices that share a parameter are the exception (`is_summed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colonnade.parallel.collectives import laid_out


@dataclass
class _Kept:
    """A result of P, and the copy that micro-batches use."""

    source: Tensor
    leaf: Tensor


class StepWeights:
    """The weights of one model on this rank.

    Args:
        fixed_order: sums have an order that no rank count changes.
        at_fixed_addresses: copies lie in the same memory in every step, as CUDA graphs need it.
    """

    def __init__(self, *, fixed_order: bool, at_fixed_addresses: bool = False) -> None:
        self._fixed_order = fixed_order
        self._buffers: dict[tuple[Any, int], Tensor] | None = {} if at_fixed_addresses else None
        self._kept: dict[Any, list[_Kept]] | None = None

    def get(
        self,
        key: Any,
        make: Callable[[], Sequence[Tensor]],
        dtype: torch.dtype,
        *,
        is_summed: bool = False,
    ) -> list[Tensor]:
        """The results of P for one group of parameters, in `dtype`.

        Args:
            key: names the group.
            make: P itself, as a differentiable function of the parameters, in their dtype.
            is_summed: the backward pass of P sums over slices or ranks.
        """
        if self._kept is None or (is_summed and self._fixed_order):
            return [self._laid_out(source, dtype) for source in make()]
        if key not in self._kept:
            with torch.enable_grad():
                self._kept[key] = [self._keep((key, number), source, dtype) for number, source in enumerate(make())]
        return [kept.leaf for kept in self._kept[key]]

    def _laid_out(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        return laid_out(source, dtype) if self._fixed_order else source.to(dtype)

    def _keep(self, place: tuple[Any, int], source: Tensor, dtype: torch.dtype) -> _Kept:
        leaf = self._laid_out(source.detach(), dtype)
        leaf = (
            leaf.requires_grad_(source.requires_grad) if self._buffers is None else self._in_buffer(place, source, leaf)
        )
        if leaf.requires_grad and dtype != source.dtype:
            leaf.grad_dtype = source.dtype  # sums of micro-batches as precise as the parameter
        return _Kept(source, leaf)

    def _in_buffer(self, place: tuple[Any, int], source: Tensor, value: Tensor) -> Tensor:
        assert self._buffers is not None
        if place not in self._buffers:
            buffer = self._buffers[place] = torch.empty_like(value).requires_grad_(source.requires_grad)
            torch._dynamo.mark_static_address(buffer)
            if buffer.requires_grad:
                buffer.register_hook(torch.clone)  # a graph's memory is written again by its next replay
        buffer = self._buffers[place]
        buffer.grad = None
        with torch.no_grad():
            return buffer.copy_(value)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run P once for the forward and backward passes in this block; parameters must not change meanwhile.

        Gradients reach the parameters when the block ends.
        """
        self._kept = {}
        try:
            yield
            self._deliver()
        finally:
            self._kept = None

    def leaves(self) -> list[Tensor]:
        """What micro-batches have left gradients at so far, besides the parameters themselves."""
        return [kept.leaf for group in (self._kept or {}).values() for kept in group if kept.leaf.requires_grad]

    def _deliver(self) -> None:
        assert self._kept is not None
        # Group by group, so that never all gradients are there twice.
        for group in self._kept.values():
            reached = [kept for kept in group if kept.leaf.grad is not None]
            gradients = [kept.leaf.grad for kept in reached]
            for kept in reached:
                kept.leaf.grad = None
            if reached:
                torch.autograd.backward([kept.source for kept in reached], gradients)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.rows = [part.shape[0] for part in parts]
        if are_neighbours(parts):
            first = parts[0]
            return first.as_strided((sum(ctx.rows), *first.shape[1:]), first.stride(), first.storage_offset())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split(ctx.rows)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several tensors as one: without a copy where they lie next to each other in memory."""
    return parts[0] if len(parts) == 1 else _Join.apply(*parts)


def are_neighbours(parts: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other in one storage."""
    end = parts[0].data_ptr()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return False
        end += part.numel() * part.element_size()
    return True
