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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.parallel.pending import Pending
from colonnade.parallel.shared_memory import SharedMemory

ALIGNMENT = 64
"""Bytes to which torch aligns memory on the CPU (on CUDA it is 512)."""

# Names of torch 2.13 on; the earlier ones warn there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TensorGroup:
    """The ranks that share one model, and the slices each of them computes.

    Args:
        group: the process group of the mesh dimension "tp".
        slices: V, the number of slices of the whole model; a multiple of the group's size. None: one a rank.
            A given V fixes the order of every sum (the tree), so that any group size dividing V gives the same
            bits; without it a rank's product is one merged product and sums are the library's own all-reduce.
        memory: through which ranks of one machine exchange tensors; None for the library's way between machines.
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
        """The sum of `partial` over the ranks, in its place or not."""
        return self.start_sum(partial).wait()

    def start_sum(self, partial: Tensor) -> Pending[Tensor]:
        """`sum_`, under way when this returns: until it is waited for nothing may touch `partial`."""
        if not self.communicates:
            return Pending(partial)
        partial = partial.contiguous()
        # Of more ranks each would read the whole tensors of all.
        shared = self._start_exchange(partial, tree_sum) if self.size == 2 else None
        if shared is not None:
            return shared
        # Two addends have one order only, so the tree is the library's all-reduce there.
        if self.fixed_order and self.size > 2:
            return start_tree_all_reduce(partial, self.group)
        return _under_way(partial, dist.all_reduce(partial, group=self.group, async_op=True))

    def start_gather(self, part: Tensor) -> Pending[Tensor]:
        """The parts [R, ...] of all ranks, one after the other: [tp * R, ...]."""
        if self.size == 1:
            return Pending(part)
        if self._identity:
            return Pending(part.repeat(self.size, *[1] * (part.ndim - 1)))
        shared = self._start_exchange(part.contiguous(), torch.cat)
        if shared is not None:
            return shared
        whole = part.new_empty(part.shape[0] * self.size, *part.shape[1:])
        work = all_gather(whole, part.contiguous(), group=self.group, async_op=True)
        return _under_way(whole, work)

    def start_sum_part(self, partial: Tensor) -> Pending[Tensor]:
        """This rank's part [R, ...] of the sum of all ranks' [tp * R, ...]: a reduce-scatter."""
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
        """This rank's rows of what all ranks hold: [tp * R, ...] -> [R, ...]."""
        return whole.chunk(self.size)[self.rank]


def _under_way(held: Any, work: Any, value: Tensor | None = None) -> Pending[Tensor]:
    """The value of a collective under way; `held` lives until it is done."""

    def finish() -> Tensor:
        work.wait()
        return held if value is None else value

    return Pending(finish=finish)


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
    return start_tree_all_reduce(partial, group, ranks).wait()


def start_tree_all_reduce(
    partial: Tensor, group: dist.ProcessGroup, ranks: Sequence[int] | None = None
) -> Pending[Tensor]:
    """`tree_all_reduce`, its all-to-all under way; `wait` sums and gathers."""
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
    """This rank's part [R, ...] of the sum of contiguous tensors [ranks * R, ...], in the tree over ranks."""
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
    """Where the backward pass of a collective's start leaves what that of `awaiting` waits for."""

    def __init__(self) -> None:
        self.pending: Pending[Tensor] | None = None

    def hold(self, pending: Pending[Tensor], placeholder: Tensor) -> Tensor:
        """What the node returns meanwhile: a tensor of the right shape that nobody reads."""
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
    """Let the backward pass of the node that made `x` wait for all others that can run.

    Autograd runs the ready node with the highest sequence number, the one made last. These get numbers below those of
    all others, and among each other in the order they are made. That holds as long as one thread makes the nodes of a
    forward pass: autograd counts for each thread by itself.
    """
    node: Any = x.grad_fn
    node._set_sequence_nr(next(_late))


def awaiting(xs: Sequence[Tensor], in_flight: InFlight | None) -> Sequence[Tensor]:
    """The identity, whose backward pass waits for the collective that a later node's backward pass has started.

    Whatever does not depend on the collective runs first: that is the overlap.

    Args:
        xs: tensors that all get the gradient which the collective delivers.
        in_flight: of that collective; None where its start waits for it.
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
    """*f*: one view of the replicated `x` for each local slice; backward sums the gradients over all slices.

    The all-reduce may overwrite the incoming gradient, so what consumes a view must produce a gradient of its own
    (a matrix product does; a bare addition passes one tensor to two inputs). With `in_flight` the backward pass only
    starts the all-reduce.
    """
    if group.local_slices == 1 and group.size == 1:
        return (x,)
    (x,) = awaiting((x,), in_flight)
    return _FanOut.apply(x, group, in_flight)


def reduce_partials(partials: Sequence[Tensor], group: TensorGroup) -> Pending[Tensor]:
    """*g*: the sum over all slices of one partial result each, under way; backward hands the gradient to each of them.

    A lone partial may be overwritten: nothing may have saved it for a backward pass (a matrix product's output is not).
    """
    if len(partials) == 1 and group.size == 1:
        return Pending(partials[0])
    with torch.no_grad():
        pending = group.start_sum(tree_sum([partial.detach() for partial in partials]))
    return Pending(finish=lambda: _ReducePartials.apply(pending.wait(), *partials))


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
