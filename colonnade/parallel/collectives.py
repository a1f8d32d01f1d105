"""The conjugate collectives f and g of tensor parallelism, over slices.

Megatron-LM (arXiv:1909.08053, section 3) calls *f* the operator that is the identity in the forward pass and an
all-reduce in the backward pass, and *g* its conjugate: an all-reduce forward and the identity backward. Here both work
on slices: the model is cut into V slices, each rank holds V/tp adjacent ones, and

    fan_out (f)           x -> one view of x per local slice;  backward: sum of all slices' gradients
    reduce_partials (g)   one partial result per local slice -> sum over all slices;  backward: the gradient to each

If V is given, sums follow one fixed binary tree: a rank's slices form a subtree, and the ranks form the levels above.
Floating-point addition is commutative but not associative, so a fixed tree gives the same bits no matter which ranks
compute it. A rank with nothing to add adds -0.0, the neutral element: x + -0.0 equals x to the bit for every x, whereas
x + 0.0 turns -0.0 into 0.0.

Everything here runs outside compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.parallel.pending import Pending
from colonnade.parallel.shared_memory import SharedMemory

ALIGNMENT = {"cpu": 64, "cuda": 512}
"""Alignment of torch's allocations in bytes, by device type."""

# The names from torch 2.13 on, where the earlier ones raise a warning.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TensorGroup:
    """The tensor-parallel ranks that together hold one model, and the slices that each of them computes.

    Args:
        group: the process group of the mesh dimension "tp".
        slices: V, the number of slices of the whole model, a multiple of the group's size; None for one per rank.
            A given V fixes the order of every sum (the tree), so that any group size that divides V gives the same
            bits. With None, each rank computes one merged product and sums use the library's own all-reduce.
        memory: shared memory through which ranks of one machine exchange tensors; None to use the library alone.
    """

    def __init__(
        self, group: dist.ProcessGroup, slices: int | None = None, *, memory: SharedMemory | None = None
    ) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.slices = self.size if slices is None else slices
        self.fixed_order = slices is not None
        self.local_slices = self.slices // self.size
        self.memory = memory
        self._identity = False

    @property
    def communicates(self) -> bool:
        return self.size > 1 and not self._identity

    @property
    def is_identity(self) -> bool:
        """Whether collectives are currently the identity, so that this rank computes alone."""
        return self._identity

    @contextmanager
    def collectives_as_identity(self) -> Iterator[None]:
        """Compute this rank's share alone, as the autotuner does: no peer is waited for, and values are meaningless."""
        self._identity = True
        try:
            yield
        finally:
            self._identity = False

    def sum_(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the ranks, which may overwrite `partial`."""
        return self.start_sum(partial).wait()

    def start_sum(self, partial: Tensor) -> Pending[Tensor]:
        """Start `sum_` and return while it is in flight; do not use `partial` until it has been waited for."""
        if not self.communicates:
            return Pending(partial)
        partial = partial.contiguous()
        # With more than two ranks, each would have to read the whole tensors of all.
        shared = self._start_exchange(partial, tree_sum) if self.size == 2 else None
        if shared is not None:
            return shared
        # Two addends have only one order, so for two ranks the library's all-reduce is the tree.
        if self.fixed_order and self.size > 2:
            return start_tree_all_reduce(partial, self.group)
        return _under_way(partial, dist.all_reduce(partial, group=self.group, async_op=True))

    def start_gather(self, part: Tensor) -> Pending[Tensor]:
        """All-gather: the parts [R, ...] of all ranks, concatenated to [tp * R, ...]."""
        if self.size == 1:
            return Pending(part)
        if self._identity:
            return Pending(part.repeat(self.size, *[1] * (part.ndim - 1)))
        part = part.contiguous()
        shared = self._start_exchange(part, torch.cat)
        if shared is not None:
            return shared
        whole = part.new_empty(part.shape[0] * self.size, *part.shape[1:])
        work = all_gather(whole, part, group=self.group, async_op=True)
        return _under_way((whole, part), work, whole)

    def start_sum_part(self, partial: Tensor) -> Pending[Tensor]:
        """Reduce-scatter: this rank's part [R, ...] of the sum of all ranks' [tp * R, ...]."""
        if not self.communicates:
            return Pending(self.own_part(partial))
        partial = partial.contiguous()
        shared = self._start_exchange(partial, lambda addends: tree_sum([self.own_part(whole) for whole in addends]))
        if shared is not None:
            return shared
        if self.fixed_order and self.size > 2:
            return start_tree_reduce_scatter(partial, self.group)
        part = partial.new_empty(partial.shape[0] // self.size, *partial.shape[1:])
        work = reduce_scatter(part, partial, group=self.group, async_op=True)
        return _under_way((part, partial), work, part)

    def _start_exchange(self, tensor: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Pending[Tensor] | None:
        return None if self.memory is None else self.memory.start(tensor, read)

    def own_part(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that every rank holds: [tp * R, ...] -> [R, ...]."""
        return whole.chunk(self.size)[self.rank]


def _under_way(held: Any, work: Any, value: Tensor | None = None) -> Pending[Tensor]:
    """The result of the collective `work` in flight: `value`, or else `held`, which is kept alive until it is done."""

    def finish() -> Tensor:
        work.wait()
        return held if value is None else value

    return Pending(finish=finish)


def tree_sum(addends: Sequence[Tensor]) -> Tensor:
    """Sum tensors of one shape in a fixed binary tree over their order; a single addend is returned as it is."""
    if len(addends) == 1:
        return addends[0]
    middle = len(addends) // 2
    return tree_sum(addends[:middle]) + tree_sum(addends[middle:])


def tree_all_reduce(partial: Tensor, group: dist.ProcessGroup, ranks: Sequence[int] | None = None) -> Tensor:
    """All-reduce (sum) in the fixed binary tree over the ranks of `group`, for any power-of-two group.

    An all-to-all gives each rank one piece from every rank, which it sums in the tree over rank order (or the order
    `ranks`); an all-gather returns the summed pieces to all ranks. It sends as many bytes as a ring all-reduce, but the
    order of the sum is the same for every piece.
    """
    return start_tree_all_reduce(partial, group, ranks).wait()


def start_tree_all_reduce(
    partial: Tensor, group: dist.ProcessGroup, ranks: Sequence[int] | None = None
) -> Pending[Tensor]:
    """`tree_all_reduce` with its all-to-all in flight; `wait` sums and all-gathers."""
    size = dist.get_world_size(group)
    flat = partial.reshape(-1)
    piece = -(-flat.numel() // size)
    if piece * size != flat.numel():
        flat = torch.nn.functional.pad(flat, (0, piece * size - flat.numel()))
    scattered = start_tree_reduce_scatter(flat, group, ranks)

    def finish() -> Tensor:
        gathered = torch.empty_like(flat)
        all_gather(gathered, scattered.wait(), group=group)
        return gathered[: partial.numel()].view(partial.shape)

    return Pending(finish=finish)


def start_tree_reduce_scatter(
    partial: Tensor, group: dist.ProcessGroup, ranks: Sequence[int] | None = None
) -> Pending[Tensor]:
    """Reduce-scatter in the tree: this rank's part [R, ...] of the sum of contiguous tensors [ranks * R, ...]."""
    size = dist.get_world_size(group)
    parts = torch.empty_like(partial)
    work = dist.all_to_all_single(parts, partial, group=group, async_op=True)

    def finish() -> Tensor:
        assert work is not None
        work.wait()
        addends = parts.chunk(size)
        return tree_sum(addends if ranks is None else [addends[rank] for rank in ranks]).contiguous()

    return Pending(finish=finish)


class InFlight:
    """Hands a collective in flight from the backward node that starts it to that of `awaiting`, which waits."""

    def __init__(self) -> None:
        self.pending: Pending[Tensor] | None = None

    def hold(self, pending: Pending[Tensor], placeholder: Tensor) -> Tensor:
        """Store `pending` and return `placeholder`, a gradient of the right shape that nothing reads."""
        self.pending = pending
        return placeholder

    def wait(self) -> Tensor:
        assert self.pending is not None
        gradient, self.pending = self.pending.wait(), None
        return gradient


class _Awaiting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight: InFlight, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.in_flight, ctx.count = in_flight, len(xs)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *([ctx.in_flight.wait()] * ctx.count))


_late = count()


def run_late(x: Tensor) -> None:
    """Make the backward pass of the node that produced `x` run only when no other node can.

    Autograd runs the ready node with the highest sequence number, that is, the one created last. This function assigns
    numbers below those of all other nodes, increasing with each call. That works as long as a single thread creates the
    nodes of a forward pass, because autograd counts sequence numbers per thread.
    """
    node: Any = x.grad_fn
    node._set_sequence_nr(next(_late))


def awaiting(xs: Sequence[Tensor], in_flight: InFlight | None) -> Sequence[Tensor]:
    """The identity; its backward pass waits for the collective that the backward pass of a later node has started.

    Everything that does not depend on the collective runs first: that is the overlap.

    Args:
        xs: tensors that all receive the gradient that the collective delivers.
        in_flight: holds that collective; None if the node that starts it also waits for it.
    """
    if in_flight is None or not any(x.requires_grad for x in xs):
        return xs
    xs = _Awaiting.apply(in_flight, *xs)
    run_late(xs[0])
    return xs


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup, in_flight: InFlight | None) -> tuple[Tensor, ...]:
        ctx.group, ctx.in_flight = group, in_flight
        return tuple(x.view_as(x) for _ in range(group.local_slices))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        partial = tree_sum(gradients)
        pending = ctx.group.start_sum(partial)
        return pending.wait() if ctx.in_flight is None else ctx.in_flight.hold(pending, partial), None, None


class _ReducePartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *partials: Tensor) -> Tensor:
        ctx.count = len(partials)
        return total.view_as(total)

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


def fan_out(x: Tensor, group: TensorGroup, in_flight: InFlight | None = None) -> tuple[Tensor, ...]:
    """*f*: one view of the replicated `x` per local slice; the backward pass sums the gradients over all slices.

    The all-reduce may overwrite the incoming gradient, so whatever consumes a view must produce a new gradient tensor
    (a matrix product does; a plain addition passes the same tensor to both inputs). With `in_flight`, the node only
    starts the all-reduce, and `awaiting` waits for it.
    """
    if group.local_slices == 1 and group.size == 1:
        return (x,)
    (x,) = awaiting((x,), in_flight)
    return _FanOut.apply(x, group, in_flight)


def reduce_partials(partials: Sequence[Tensor], group: TensorGroup) -> Pending[Tensor]:
    """*g*: the sum over all slices of their partial results, in flight; backward passes the gradient to each of them.

    A single partial may be overwritten, so no node may have saved it for its backward pass (a matrix product does not
    save its output).
    """
    if len(partials) == 1 and group.size == 1:
        return Pending(partials[0])
    with torch.no_grad():
        pending = group.start_sum(tree_sum([partial.detach() for partial in partials]))
    return Pending(finish=lambda: _ReducePartials.apply(pending.wait(), *partials))


def fan_out_locally(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` views of `x` for local slices that share it; the backward pass sums their gradients in the tree."""
    return (x,) if count == 1 else _FanOutLocal.apply(x, count)


def take_part(x: Tensor, start: int, length: int, group: TensorGroup) -> Tensor:
    """*f* for a replicated parameter of which this rank uses rows start .. start + length; sums its gradient."""
    return _TakePart.apply(x, start, length, group)


def summed_in_float32(parameter: Tensor) -> Tensor:
    """A replicated parameter, in float32 if data-parallel ranks have gathered it in half precision.

    Whatever comes after it sums the parameter's gradient over tensor-parallel ranks in this dtype.
    """
    return parameter.float() if parameter.dtype.itemsize < torch.float32.itemsize else parameter


def laid_out(part: Tensor, dtype: torch.dtype) -> Tensor:
    """`part` of a parameter in `dtype`, laid out as a tensor of its own: contiguous, and aligned as torch allocates.

    A matrix library may choose its kernel by strides and alignment, and the kernel may then sum in another order (seen
    with MKL 2024.2 for [72, 64] x [64, 8] in float32). A slice that is a view into a rank's larger shard is therefore
    copied if its layout differs from that of a slice alone on its rank; a cast has already made a copy.
    """
    part = part.to(dtype)
    if part.is_contiguous() and part.data_ptr() % ALIGNMENT.get(part.device.type, 512) == 0:
        return part
    return part.clone(memory_format=torch.contiguous_format)
