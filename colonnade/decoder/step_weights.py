"""Parameters in the form that matrix products use: joined, cast and laid out once per step, not once per micro-batch.

A parameter is stored in float32 under its own name; a product uses it in the activations' dtype, with q, k and v joined
into one matrix, and gate and up into another. A cheap function P of joins, cuts and casts turns one form into the
other. Inside `kept`, P runs once: the micro-batches read copies of its results and accumulate their gradients there, in
the parameters' dtype, and at the end one backward pass through P hands the sums to the parameters.

P must be linear, and must not sum if the order of sums is fixed: adding the gradients of micro-batches before or after
P then gives the same bits. Sums over slices that share a parameter are the exception (`is_summed`); in a fixed order
they run in every micro-batch.
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
    """A result of P, and the detached leaf tensor that micro-batches use."""

    source: Tensor
    leaf: Tensor


class StepWeights:
    """The weights of one model on this rank, as its products use them.

    Args:
        fixed_order: the order of sums does not depend on the number of ranks.
        at_fixed_addresses: keep the copies at the same memory addresses in every step, as CUDA graphs require.
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
            key: identifies the group.
            make: P itself, a differentiable function of the parameters that returns their dtype.
            is_summed: whether the backward pass of P sums over slices or ranks.
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
            leaf.grad_dtype = source.dtype  # sum micro-batches in the parameter's precision
        return _Kept(source, leaf)

    def _in_buffer(self, place: tuple[Any, int], source: Tensor, value: Tensor) -> Tensor:
        assert self._buffers is not None
        if place not in self._buffers:
            buffer = self._buffers[place] = torch.empty_like(value).requires_grad_(source.requires_grad)
            torch._dynamo.mark_static_address(buffer)
            if buffer.requires_grad:
                buffer.register_hook(torch.clone)  # the graph's next replay overwrites its memory
        buffer = self._buffers[place]
        buffer.grad = None
        with torch.no_grad():
            return buffer.copy_(value)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run P once for all forward and backward passes in this context; parameters must not change meanwhile.

        Gradients reach the parameters when the context exits.
        """
        self._kept = {}
        try:
            yield
            self._deliver()
        finally:
            self._kept = None

    def leaves(self) -> list[Tensor]:
        """The tensors, besides the parameters, that accumulate the gradients of micro-batches."""
        return [kept.leaf for group in (self._kept or {}).values() for kept in group if kept.leaf.requires_grad]

    def _deliver(self) -> None:
        assert self._kept is not None
        # Group by group, so that only one group's gradients exist twice at a time.
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
    """The rows of several tensors in one tensor, without a copy if they are adjacent in memory."""
    return parts[0] if len(parts) == 1 else _Join.apply(*parts)


def are_neighbours(parts: Sequence[Tensor]) -> bool:
    """Whether the tensors are contiguous and directly follow each other in one storage."""
    end = parts[0].data_ptr()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return False
        end += part.numel() * part.element_size()
    return True
