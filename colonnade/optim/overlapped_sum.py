"""Gradients summed over data-parallel ranks while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

SMALLEST_ALONE = 2**20
"""Bytes from which a gradient gets a collective of its own; smaller ones, norms and biases, share one at the end."""


class OverlappedSum:
    """Sums of gradients over data-parallel ranks, each started when the backward pass has made it.

    All ranks run the same graph, so their backward passes make gradients in one order. Each gradient is already
    normalised by the global batch.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._hooks: list[RemovableHandle] = []
        self._under_way: list[dist.Work] = []
        self._small: list[Tensor] = []

    def watch(self, holders: Iterable[Tensor]) -> None:
        """Sum what the next backward pass leaves in `.grad` of these, which is the last of its step."""
        for holder in holders:
            self._hooks.append(holder.register_post_accumulate_grad_hook(self._arrived))

    def _arrived(self, holder: Tensor) -> None:
        gradient = local_gradient(holder)
        assert gradient is not None
        if gradient.numel() * gradient.element_size() < SMALLEST_ALONE or not gradient.is_contiguous():
            self._small.append(gradient)
            return
        work = dist.all_reduce(gradient, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append(work)

    def finish(self, also: Tensor) -> None:
        """Wait for all sums, those of small gradients and of the tensor `also` among them."""
        for hook in self._hooks:
            hook.remove()
        small = [*self._small, also]
        together = torch.cat([tensor.reshape(-1).to(also.dtype) for tensor in small])
        dist.all_reduce(together, group=self._group)
        for tensor, total in zip(small, together.split([tensor.numel() for tensor in small]), strict=True):
            tensor.copy_(total.view(tensor.shape))
        for work in self._under_way:
            work.wait()


def local_gradient(holder: Tensor) -> Tensor | None:
    """This rank's part of a gradient; None where there is none."""
    gradient = holder.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
