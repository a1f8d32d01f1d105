"""Gradients between backward pass and update: summed over data-parallel ranks, measured and clipped as one vector.

There are two orders of summation. The default is the library's, which is fast on the given ranks. The deterministic
mode uses one that does not depend on the number of ranks:

- over micro-batches and data-parallel ranks, recursive halving of the global batch (`halves`);
- in the norm, one sum of squares per piece, those of all pieces in one vector, and then the sum of that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colonnade.optim.overlapped_sum import is_summed_with_others, local_gradient, sum_together
from colonnade.parallel.batch_tree import halves, leaf_order, nodes_completed
from colonnade.parallel.collectives import TensorGroup, laid_out, start_tree_all_reduce
from colonnade.parallel.data_parallel import DataParallelShards
from colonnade.parallel.pending import Pending

T = TypeVar("T")


@torch.no_grad()  # otherwise `to_local` creates an autograd node, which costs more than all the rest here
def local_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, bool]]:
    """This rank's part of each gradient, and whether it is sharded over the tensor-parallel ranks."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            gradients.append((parameter.grad.to_local(), parameter.grad.placements[-1].is_shard()))
    return gradients


# -------------------------------------------------------------------------- over micro-batches and data-parallel ranks


def accumulate_in_tree(
    micro_batches: Sequence[T], backward: Callable[[T], Tensor], holders: Callable[[], Sequence[Tensor]]
) -> Tensor:
    """Leave the sum of all micro-batches' gradients in `.grad`, and return the sum of their losses, both in the tree.

    Holds one extra copy of the gradients per level of the tree: log2 of the number of micro-batches, rounded up.

    Args:
        micro_batches: at least one.
        backward: adds the gradients of one micro-batch to `.grad` and returns its loss.
        holders: returns the tensors that have gradients after a backward pass. They have none before the call, and each
            micro-batch reaches all of them.
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


def accumulate_over_shards(
    micro_batches: Sequence[T], backward: Callable[[T], Tensor], shards: DataParallelShards
) -> Tensor:
    """Leave this rank's shard of the summed gradients in `.grad`, and return the sum of its losses.

    Gradients are summed over micro-batches and the ranks of a replica; in the fixed order, over all replicas as well.

    Args:
        micro_batches: at least one, the same number on every rank.
        backward: computes the gradients of one micro-batch and returns its loss.
    """
    count = len(micro_batches)
    ordered = leaf_order(micro_batches) if shards.fixed_order else micro_batches
    merges = nodes_completed(count) if shards.fixed_order else [0, *[1] * (count - 1)]
    losses: list[Tensor] = []
    for number, (micro_batch, completed) in enumerate(zip(ordered, merges, strict=True), start=1):
        shards.begin_micro_batch(is_last=number == count, merges=completed)
        losses.append(backward(micro_batch))
        for _ in range(completed):
            right = losses.pop()
            losses[-1] = losses[-1] + right
    return losses[0]


def sum_over_data_parallel(tensors: Iterable[Tensor], group: dist.ProcessGroup, *, fixed_order: bool = False) -> None:
    """Sum gradients, and other tensors such as the loss, over the data-parallel ranks in place.

    Each rank has already normalised by the global batch. Small tensors share one collective (in the fixed
    order, two for each dtype).
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    tensors = list(tensors)
    large = [tensor for tensor in tensors if not is_summed_with_others(tensor)]
    small = [tensor for tensor in tensors if is_summed_with_others(tensor)]
    if fixed_order and size > 2:  # two addends have only one order
        _sum_in_tree(large, small, group)
        return
    pending = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in large]
    if small:
        sum_together(small, group)
    for work in pending:
        work.wait()


def _sum_in_tree(large: Sequence[Tensor], small: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over the ranks of `group` in place, in the tree of the global batch."""
    ranks = leaf_order(range(dist.get_world_size(group)))
    under_way: list[tuple[Tensor, Pending[Tensor]]] = []

    def finish_first() -> None:
        tensor, total = under_way.pop(0)
        tensor.copy_(total.wait())

    for tensor in large:
        under_way.append((tensor, start_tree_all_reduce(tensor, group, ranks)))
        if len(under_way) > 1:  # each takes a copy of its tensor: never more than two
            finish_first()
    while under_way:
        finish_first()
    # By dtype: in a wider one, sums of two would not be rounded as they are on fewer ranks.
    for dtype in dict.fromkeys(tensor.dtype for tensor in small):
        sum_together([tensor for tensor in small if tensor.dtype == dtype], group, ranks)


# ------------------------------------------------------------------------------------------------ norm and clipping


# torch's float32 norm on the CPU accumulates in float32: 8e-5 too low at 4 million elements, 2e-3 at 34 million. Pieces
# of this many elements are accurate to 1e-6, and are summed in float64.
NORM_PIECE = 2**16


def agreed_norm(
    gradients: list[tuple[Tensor, bool]],
    group: TensorGroup,
    flag: Tensor,
    pieces: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The global gradient norm and whether to skip this step, in one collective; both stay on the device.

    The norm is the L2 norm of the whole model's gradients as one vector: shards are summed over the tensor-parallel
    group, and replicated gradients count once.

    Args:
        flag: bool, whether this rank has a reason to skip the step.
        pieces: for each parameter, its cut dimension and its number of pieces, which no number of ranks cuts further.
            The norm then has the same bits at every tensor-parallel size that divides V. None: the library's order.

    Returns:
        (norm, bad): `bad` is 1.0 if a rank of the group raised its flag or holds a gradient that is not finite, even
        only in its own copy of a replicated one; else 0.0. Both are the same on every rank of the group.
    """
    if pieces is None:
        norm, flags = _norm_and_flag(gradients, group, flag)
    else:
        norm, flags = _fixed_order_norm_and_flag([gradients], pieces, group, flag)
    return norm, _is_bad(norm, flags)


def agreed_norm_of_shards(
    parameters: Sequence[nn.Parameter],
    group: TensorGroup,
    flag: Tensor,
    shards: DataParallelShards,
    pieces: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """`agreed_norm` of the gradients of `parameters` that data-parallel ranks shard. Collective over a replica.

    With `pieces` the bits are the same as without shards: shards cut through pieces, so gradients are all-gathered to
    be measured, one parameter at a time.
    """
    if pieces is None:
        norm, flags = _norm_and_flag(local_gradients(parameters), group, flag, shards.group)
        return norm, _is_bad(norm, flags)
    told = flag.float()
    dist.all_reduce(told, group=shards.group)
    norm, flags = _fixed_order_norm_and_flag(_gathered(parameters, shards), pieces, group, told != 0)
    return norm, _is_bad(norm, flags)


def _gathered(parameters: Sequence[nn.Parameter], shards: DataParallelShards) -> Iterator[list[tuple[Tensor, bool]]]:
    for parameter in parameters:
        assert isinstance(parameter.grad, DTensor)
        yield [(shards.gathered(parameter.grad), parameter.grad.placements[-1].is_shard())]


def _is_bad(norm: Tensor, flags: Tensor) -> Tensor:
    # A flag that is NaN is not 0 either.
    return ((flags != 0) | ~torch.isfinite(norm)).float()


def _norm_and_flag(
    gradients: list[tuple[Tensor, bool]], group: TensorGroup, flag: Tensor, shard_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    device = gradients[0][0].device
    sharded = _squared_norms([gradient for gradient, cut in gradients if cut], device).sum()
    whole = _squared_norms([gradient for gradient, cut in gradients if not cut], device).sum()
    if shard_group is not None:
        told = torch.stack([sharded, whole, flag.to(sharded)])
        dist.all_reduce(told, group=shard_group)
        sharded, whole, flag = told.unbind()
    # `whole * 0` is 0, or NaN if this rank's copy of a replicated gradient is not finite: all ranks then see it.
    told = group.sum_(torch.stack([sharded + whole * 0, flag.to(sharded)]))
    return (told[0] + whole).sqrt().to(gradients[0][0].dtype), told[1]


def _fixed_order_norm_and_flag(
    batches: Iterable[list[tuple[Tensor, bool]]], pieces: Sequence[tuple[int, int]], group: TensorGroup, flag: Tensor
) -> tuple[Tensor, Tensor]:
    """`batches`: the gradients in the order of `pieces`, in groups that may be in memory and measured together."""
    total = sum(count for _, count in pieces)
    squares, copies, dtype = torch.zeros(0), torch.zeros(0), torch.float32
    first = start = 0
    for gradients in batches:
        device, dtype = gradients[0][0].device, gradients[0][0].dtype
        if first == 0:
            # The last element carries the flags.
            squares = torch.zeros(total + 1, dtype=torch.float64, device=device)
            copies = torch.zeros((), dtype=torch.float64, device=device)
        parts, places, start = _own_pieces(gradients, pieces[first : first + len(gradients)], group, start)
        first += len(gradients)
        squares[_index(tuple(places), device)] = _squared_norms(parts, device)
        if group.rank > 0:
            copies += _squared_norms([gradient for gradient, sharded in gradients if not sharded], device).sum()
    squares[total] = flag
    squares[total] += copies * 0
    # Each square comes from one rank and the others add zeros to it, which is exact in any order.
    if group.communicates:
        dist.all_reduce(squares, group=group.group)
    flags = squares[total]
    return (squares[:total].sum().sqrt() + flags * 0).to(dtype), flags


@cache
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """An index tensor on the device. Cached, since it is the same in every step and sending it is a host sync."""
    return torch.tensor(places, dtype=torch.int64, device=device)


def _own_pieces(
    gradients: list[tuple[Tensor, bool]], pieces: Sequence[tuple[int, int]], group: TensorGroup, start: int
) -> tuple[list[Tensor], list[int], int]:
    """The pieces that this rank contributes, the index of each, and the index after the last parameter's pieces."""
    parts: list[Tensor] = []
    places: list[int] = []
    for (gradient, sharded), (dim, count) in zip(gradients, pieces, strict=True):
        # A replicated gradient is contributed by the first rank only.
        if sharded or group.rank == 0:
            local = count // group.size if sharded else count
            first = start + (group.rank * local if sharded else 0)
            parts += [laid_out(part, gradient.dtype) for part in gradient.chunk(local, dim)]
            places += range(first, first + local)
        start += count
    return parts, places, start


def _squared_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of each tensor, float64 [len(tensors)]."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type != "cpu":  # its norm is exact enough, and an index would be a host sync
        return torch.stack(torch._foreach_norm(list(tensors))).double().square()
    pieces = [tensor.reshape(-1).split(NORM_PIECE) for tensor in tensors]
    norms = torch.stack(torch._foreach_norm([piece for group in pieces for piece in group]))
    owners = torch.tensor([number for number, group in enumerate(pieces) for _ in group], device=device)
    totals = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    return totals.index_add_(0, owners, norms.double().square())


def clip_by_norm(gradients: list[tuple[Tensor, bool]], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place to reduce a norm above `max_norm` to it, as `torch.nn.utils.clip_grad_norm_` does.

    The factor stays on the device, without a host sync.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([gradient for gradient, _ in gradients], factor)
