"""Gradients between backward and update: summed over data-parallel ranks, measured and clipped as one vector.

Two orders of summation. By default the library's: what is fast on these ranks. In the deterministic mode one that the
number of ranks does not change:

- over micro-batches and data-parallel ranks, recursive halving of the global batch (`halves`);
- in the norm, one sum of squares a piece, all pieces in one vector, and the sum of that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colonnade.optim.overlapped_sum import local_gradient
from colonnade.parallel.collectives import TensorGroup, laid_out, tree_all_reduce

T = TypeVar("T")


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, bool]]:
    """This rank's part of each gradient, and whether other tensor-parallel ranks hold other parts of it."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            sharded = any(placement.is_shard() for placement in parameter.grad.placements)
            gradients.append((parameter.grad.to_local(), sharded))
    return gradients


# -------------------------------------------------------------------------- over micro-batches and data-parallel ranks


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """One node of the tree over a global batch: every second item and the others; an odd number is cut in the middle.

    Data-parallel rank r of dp holds the items j with j mod dp == r. For a power of two these are a subtree, and the
    levels above it are the tree over ranks: whoever holds the items, they are added in one order.
    """
    if len(items) % 2 == 0:
        return items[0::2], items[1::2]
    return items[: len(items) // 2], items[len(items) // 2 :]


def leaf_order(items: Sequence[T]) -> list[T]:
    """The leaves of the tree from left to right; for a power of two the bit-reversed order."""
    if len(items) <= 1:
        return list(items)
    left, right = halves(items)
    return [*leaf_order(left), *leaf_order(right)]


def accumulate_in_tree(
    micro_batches: Sequence[T], backward: Callable[[T], Tensor], holders: Callable[[], Sequence[Tensor]]
) -> Tensor:
    """Leave the sum of all micro-batches' gradients in `.grad`, and return that of their losses, added in the tree.

    Holds one gradient more for each level of the tree: log2 of the micro-batches, rounded up.

    Args:
        micro_batches: at least one.
        backward: adds the gradients of one micro-batch to `.grad` and returns its loss.
        holders: what has gradients after a backward pass, and none before the call; each micro-batch reaches them all.
    """
    if len(micro_batches) == 1:
        return backward(micro_batches[0])
    left, right = halves(micro_batches)
    loss = accumulate_in_tree(left, backward, holders)
    gradients = _held(holders())
    for holder in holders():
        holder.grad = None
    loss = loss + accumulate_in_tree(right, backward, holders)
    torch._foreach_add_(_held(holders()), gradients)
    return loss


def _held(holders: Sequence[Tensor]) -> list[Tensor]:
    gradients = [local_gradient(holder) for holder in holders]
    return [gradient for gradient in gradients if gradient is not None]


def sum_over_data_parallel(tensors: Iterable[Tensor], group: dist.ProcessGroup, *, fixed_order: bool = False) -> None:
    """Sum gradients, and what goes with them, over the data-parallel ranks in place.

    Each rank has normalised by the global batch already.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    if fixed_order and size > 2:  # two addends have one order
        ranks = leaf_order(range(size))
        for tensor in tensors:
            tensor.copy_(tree_all_reduce(tensor, group, ranks))
        return
    pending = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    for work in pending:
        work.wait()


# ------------------------------------------------------------------------------------------------ norm and clipping


# torch's float32 norm on the CPU adds up in float32: 8e-5 too low at 4 million elements, 2e-3 at 34 million. Pieces of
# this many elements are right to 1e-6, and are added up in float64.
NORM_PIECE = 2**16


def global_norm(gradients: list[tuple[Tensor, bool]], group: TensorGroup) -> Tensor:
    """L2 norm of all gradients of the whole model as one vector; a scalar, equal on every rank.

    Parts that only one rank holds are summed over the tensor-parallel group; what every rank holds counts once.
    """
    return _norm_and_flag(gradients, group, torch.zeros((), dtype=torch.bool))[0]


def fixed_order_norm(
    gradients: list[tuple[Tensor, bool]], pieces: Sequence[tuple[int, int]], group: TensorGroup
) -> Tensor:
    """`global_norm`, to the same bits at every tensor-parallel size that divides V.

    Args:
        gradients: of all parameters.
        pieces: a parameter each, the dimension it is cut along and the pieces that no rank cuts further.
    """
    return _fixed_order_norm_and_flag(gradients, pieces, group, torch.zeros((), dtype=torch.bool))[0]


def agreed_norm(
    gradients: list[tuple[Tensor, bool]],
    group: TensorGroup,
    flag: Tensor,
    pieces: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The global norm, and whether this step is not to be taken, in one collective; stays on the device.

    Args:
        flag: bool, a reason of this rank not to take it.
        pieces: as in `fixed_order_norm`, for its order; None for the library's.

    Returns:
        (norm, bad): `bad` is 1.0 where a rank of the group raised its flag or holds a gradient that is not finite, be
        it in its copy of a parameter alone; else 0.0. Both are the same on every rank of the group.
    """
    if pieces is None:
        norm, flags = _norm_and_flag(gradients, group, flag)
    else:
        norm, flags = _fixed_order_norm_and_flag(gradients, pieces, group, flag)
    # A NaN among the flags is not 0 either.
    return norm, ((flags != 0) | ~torch.isfinite(norm)).float()


def _norm_and_flag(gradients: list[tuple[Tensor, bool]], group: TensorGroup, flag: Tensor) -> tuple[Tensor, Tensor]:
    device = gradients[0][0].device
    sharded = _squared_norms([gradient for gradient, cut in gradients if cut], device).sum()
    whole = _squared_norms([gradient for gradient, cut in gradients if not cut], device).sum()
    # Zero, or NaN where this rank's copy of something is not finite: then all ranks are to see it.
    told = group.sum_(torch.stack([sharded + whole * 0, flag.to(sharded)]))
    return (told[0] + whole).sqrt().to(gradients[0][0].dtype), told[1]


def _fixed_order_norm_and_flag(
    gradients: list[tuple[Tensor, bool]], pieces: Sequence[tuple[int, int]], group: TensorGroup, flag: Tensor
) -> tuple[Tensor, Tensor]:
    parts: list[Tensor] = []
    places: list[int] = []
    start = 0
    for (gradient, sharded), (dim, count) in zip(gradients, pieces, strict=True):
        # What all ranks hold alike is told by the first.
        if sharded or group.rank == 0:
            local = count // group.size if sharded else count
            first = start + (group.rank * local if sharded else 0)
            parts += [laid_out(part, gradient.dtype) for part in gradient.chunk(local, dim)]
            places += range(first, first + local)
        start += count
    device = gradients[0][0].device
    # The flags travel in the last place.
    squares = torch.zeros(start + 1, dtype=torch.float64, device=device)
    squares[torch.tensor(places, device=device)] = _squared_norms(parts, device)
    squares[start] = flag
    if group.rank > 0:
        copies = _squared_norms([gradient for gradient, sharded in gradients if not sharded], device).sum()
        squares[start] += copies * 0
    # Each square comes from one rank; the others add zeros to it, which is exact in any order.
    if group.communicates:
        dist.all_reduce(squares, group=group.group)
    flags = squares[start]
    return (squares[:start].sum().sqrt() + flags * 0).to(gradients[0][0].dtype), flags


def _squared_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of each tensor, float64 [len(tensors)]."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    size = NORM_PIECE if device.type == "cpu" else max(1, *(tensor.numel() for tensor in tensors))
    pieces = [tensor.reshape(-1).split(size) for tensor in tensors]
    norms = torch.stack(torch._foreach_norm([piece for group in pieces for piece in group]))
    owners = torch.tensor([number for number, group in enumerate(pieces) for _ in group], device=device)
    totals = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    return totals.index_add_(0, owners, norms.double().square())


def clip_by_norm(gradients: list[tuple[Tensor, bool]], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that a norm above `max_norm` becomes it, as `torch.nn.utils.clip_grad_norm_` does.

    The factor stays on the device: no host waits for it.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([gradient for gradient, _ in gradients], factor)
