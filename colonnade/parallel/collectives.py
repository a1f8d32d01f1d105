"""The conjugate collectives f and g of tensor parallelism, over slices.

Megatron-LM (arXiv:1909.08053, section 3) calls *f* the operator that is the identity forward and an all-reduce
backward, and *g* its conjugate, an all-reduce forward and the identity backward. Here both work on slices: the
model is cut into V slices, a rank holds V/tp neighbouring ones, and

    fan_out (f)       x -> one view of x for each local slice;  backward: sum of the slices' gradients
    reduce_partials (g)   one partial result of each local slice -> their sum;  backward: the gradient to each

Sums run over one fixed binary tree: the slices of a rank are a subtree, the ranks form the levels above it. Floating
point addition commutes exactly but does not associate, so a fixed tree gives the same bits whoever computes it. Where a
rank has nothing to add it adds -0.0, the neutral element: x + -0.0 is x to the bit for every x, and -0.0 + 0.0 is not.

Everything here runs outside compiled graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which torch aligns memory on the CPU (on CUDA it is 512)."""


class TensorGroup:
    """The ranks that share one model, and the slices each of them computes.

    Args:
        group: the process group of the mesh dimension "tp".
        slices: V, the number of slices of the whole model; a multiple of the group's size. None: one a rank.
            A given V fixes the order of every sum (the tree), so that any group size dividing V gives the same
            bits; without it a rank's product is one merged product and sums are the library's own all-reduce.
    """

    def __init__(self, group: dist.ProcessGroup, slices: int | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.slices = self.size if slices is None else slices
        self.fixed_order = slices is not None
        self.local_slices = self.slices // self.size
        self._identity = False

    @property
    def communicates(self) -> bool:
        return self.size > 1 and not self._identity

    @property
    def is_identity(self) -> bool:
        """Whether this rank computes alone for the moment."""
        return self._identity

    @contextmanager
    def collectives_as_identity(self) -> Iterator[None]:
        """Compute this rank's share alone, as the autotuner does: no peer is waited for, values are meaningless."""
        self._identity = True
        try:
            yield
        finally:
            self._identity = False

    def sum_(self, partial: Tensor) -> Tensor:
        """Sum `partial` over the ranks, in place where the library does it. Returns the summed tensor."""
        if not self.communicates:
            return partial
        partial = partial.contiguous()
        # Two addends have one order only, so the tree is the library's all-reduce there.
        if self.fixed_order and self.size > 2:
            return tree_all_reduce(partial, self.group)
        dist.all_reduce(partial, group=self.group)
        return partial

    def max_(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place. A maximum does not depend on the order."""
        if self.communicates:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_slices(self, partials: Sequence[Tensor]) -> Tensor:
        """Sum one tensor a local slice over all slices of the group. The first tensor may be overwritten."""
        return self.sum_(tree_sum(partials))


def tree_sum(addends: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape in the fixed binary tree over their order; one addend is returned as it is."""
    if len(addends) == 1:
        return addends[0]
    middle = len(addends) // 2
    return tree_sum(addends[:middle]) + tree_sum(addends[middle:])


def tree_all_reduce(partial: Tensor, group: dist.ProcessGroup, ranks: Sequence[int] | None = None) -> Tensor:
    """All-reduce (sum) in the fixed binary tree over the ranks of `group`, for any power-of-two group.

    An all-to-all hands each rank one piece from every rank, which it sums in rank order (or in the order `ranks`); an
    all-gather brings the summed pieces back. The bytes are a ring all-reduce's, the order does not depend on the piece.
    """
    size = dist.get_world_size(group)
    flat = partial.reshape(-1)
    piece = -(-flat.numel() // size)
    if piece * size != flat.numel():
        flat = torch.nn.functional.pad(flat, (0, piece * size - flat.numel()))
    pieces = torch.empty_like(flat)
    dist.all_to_all_single(pieces, flat, group=group)
    addends = pieces.view(size, piece).unbind(0)
    summed = tree_sum(addends if ranks is None else [addends[rank] for rank in ranks])
    gathered = torch.empty_like(flat)
    dist.all_gather(list(gathered.view(size, piece).unbind(0)), summed, group=group)
    return gathered[: partial.numel()].view(partial.shape)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for _ in range(group.local_slices))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_slices(gradients), None


class _ReducePartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorGroup, *partials: Tensor) -> Tensor:
        ctx.count = len(partials)
        total = group.sum_slices(partials)
        return total.view_as(total) if total is partials[0] else total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *([gradient] * ctx.count))


class _FanOutLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return tree_sum(gradients), None


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, length: int, group: TensorGroup) -> Tensor:
        ctx.group, ctx.shape, ctx.place = group, x.shape, (0, start, length)
        return x.narrow(*ctx.place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole = gradient.new_full(ctx.shape, -0.0)
        whole.narrow(*ctx.place).copy_(gradient)
        return ctx.group.sum_(whole), None, None, None


def fan_out(x: Tensor, group: TensorGroup) -> tuple[Tensor, ...]:
    """*f*: one view of the replicated `x` for each local slice; backward sums the gradients over all slices.

    The all-reduce may overwrite the incoming gradient, so what consumes a view must produce a gradient of its own
    (a matrix product does; a bare addition passes one tensor to two inputs).
    """
    if group.local_slices == 1 and group.size == 1:
        return (x,)
    return _FanOut.apply(x, group)


def reduce_partials(partials: Sequence[Tensor], group: TensorGroup) -> Tensor:
    """*g*: the sum over all slices of one partial result each; backward hands the gradient to each of them.

    A lone partial may be overwritten: nothing may have saved it for a backward pass (a matrix product's output is not).
    """
    if len(partials) == 1 and group.size == 1:
        return partials[0]
    return _ReducePartials.apply(group, *partials)


def fan_out_locally(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` views of `x` for slices of this rank that share it; backward sums their gradients in the tree."""
    return (x,) if count == 1 else _FanOutLocal.apply(x, count)


def take_part(x: Tensor, start: int, length: int, group: TensorGroup) -> Tensor:
    """*f* for a replicated parameter of which this rank uses rows start .. start + length: its gradient is summed."""
    return _TakePart.apply(x, start, length, group)


def laid_out(part: Tensor, dtype: torch.dtype) -> Tensor:
    """`part` of a parameter in `dtype`, with the memory layout of a tensor of its own: contiguous, aligned to 64 bytes.

    A matrix kernel may be chosen by strides and alignment, and then sum in another order (seen with MKL 2024.2 for
    [72, 64] x [64, 8] in float32). A slice that is a view into a rank's larger shard is copied where that differs from
    what the slice would be alone on its rank; a cast has copied it already.
    """
    part = part.to(dtype)
    if part.is_contiguous() and part.data_ptr() % ALIGNMENT == 0:
        return part
    return part.clone(memory_format=torch.contiguous_format)
