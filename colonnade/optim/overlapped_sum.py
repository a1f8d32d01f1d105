"""Gradient sums over data-parallel ranks, overlapped with the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from colonnade.parallel.collectives import tree_all_reduce

SMALLEST_ALONE = 2**20
"""Size in bytes from which a gradient gets its own collective; smaller ones (norms, biases) share one at the end."""


class OverlappedSum:
    """All-reduces of gradients over data-parallel ranks, each started as soon as the backward pass has the gradient.

    All ranks run the same graph, so their backward passes produce gradients in the same order. Each gradient is already
    normalised by the global batch.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._hooks: list[RemovableHandle] = []
        self._under_way: list[dist.Work] = []
        self._small: list[Tensor] = []

    def watch(self, holders: Iterable[Tensor]) -> None:
        """Sum what the next backward pass, the last of its step, leaves in `.grad` of these tensors."""
        for holder in holders:
            self._hooks.append(holder.register_post_accumulate_grad_hook(self._arrived))

    def _arrived(self, holder: Tensor) -> None:
        gradient = local_gradient(holder)
        assert gradient is not None
        if is_summed_with_others(gradient):
            self._small.append(gradient)
            return
        work = dist.all_reduce(gradient, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append(work)

    def finish(self, also: Tensor) -> None:
        """Sum the small gradients and the tensor `also`, and wait for all sums."""
        for hook in self._hooks:
            hook.remove()
        sum_together([*self._small, also], self._group)
        for work in self._under_way:
            work.wait()


def is_summed_with_others(gradient: Tensor) -> bool:
    """Whether a gradient is too small for a collective of its own, or not contiguous."""
    return gradient.numel() * gradient.element_size() < SMALLEST_ALONE or not gradient.is_contiguous()


def sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup, ranks: Sequence[int] | None = None) -> None:
    """Sum tensors over the ranks of `group` in place, in one collective, in the widest of their dtypes.

    Args:
        ranks: sum in the tree over this order of the ranks; None for the library's order.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    together = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    if ranks is None:
        dist.all_reduce(together, group=group)
    else:
        together = tree_all_reduce(together, group, ranks)
    for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))


def local_gradient(holder: Tensor) -> Tensor | None:
    """This rank's part of the gradient of `holder`; None if it has none."""
    gradient = holder.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
