"""The residual stream between attention and feed-forward, and the collectives f and g that lead out of it and back.

There are two ways to store it. `ReplicatedResidual`: every rank holds all tokens, [B, T, H]; f sums in the backward
pass, g in the forward pass. `ShardedResidual`: each rank holds its share of the tokens, [R, H] (sequence parallelism,
arXiv:2205.05198, section 4.2.2). There f all-gathers the tokens in the forward pass and reduce-scatters their gradients
in the backward pass, and g is its conjugate:

    x [R, H] -> norm -> f: all-gather [B, T, H] -> slices -> partial [B, T, H] -> g: reduce-scatter -> update [R, H]

Operations on a rank's share alone - norms, biases, additions - give partial gradients of their parameters, so these
parameters go through f as well. Tokens are sharded as rows of [B * T, H], zero-padded to a multiple of V; any block
size works.

In the backward pass, the sums of f are only started, and waited for once everything that does not need them is done.
With `overlaps` this holds for all collectives, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.decoder.step_weights import StepWeights
from colonnade.parallel.collectives import (
    InFlight,
    TensorGroup,
    awaiting,
    fan_out,
    reduce_partials,
    summed_in_float32,
    tree_sum,
)
from colonnade.parallel.pending import Pending
from colonnade.parallel.slices import local_part

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


class ReplicatedResidual:
    """All tokens on every rank.

    Args:
        overlaps: in the forward pass, only start the sums of g and wait for them later, as the backward pass always
            does with those of f.
    """

    gathers = False

    def __init__(self, group: TensorGroup, *, overlaps: bool = False) -> None:
        self.group, self.overlaps = group, overlaps

    def spread(self, x: Tensor) -> Pending[tuple[Tensor, ...]]:
        """*f*: tokens [B, T, H] -> one view per local slice."""
        return Pending(fan_out(x, self.group, InFlight()))

    def collect(self, partials: Sequence[Tensor]) -> Pending[Tensor]:
        """*g*: one partial [B, T, H] per local slice -> their sum over all slices."""
        pending = reduce_partials(partials, self.group)
        return pending if self.overlaps else Pending(pending.wait())

    def apply(self, function: Callable[..., T], tensors: Sequence[Tensor], parameter: Tensor) -> T:
        """`function(*tensors, parameter)` on the stream and a replicated parameter."""
        return function(*tensors, local_part(parameter))

    def own(self, x: Tensor) -> Tensor:
        """The part that this rank keeps of tokens [B, T, H]: here all of them."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens [B, T, H], for computations that every rank repeats."""
        return x


class ShardedResidual:
    """A share of the tokens on each rank; `shape` is (B, T), that of all tokens."""

    gathers = True

    def __init__(
        self, group: TensorGroup, shape: tuple[int, int], weights: StepWeights, *, overlaps: bool = False
    ) -> None:
        self.group, self.shape, self.weights, self.overlaps = group, shape, weights, overlaps
        self.tokens = shape[0] * shape[1]
        self.filling = -self.tokens % group.slices

    def spread(self, x: Tensor) -> Pending[tuple[Tensor, ...]]:
        """*f*: [R, H] -> all tokens [B, T, H], one view per local slice."""
        in_flight = InFlight()
        (x,) = awaiting((x,), in_flight)
        with torch.no_grad():
            pending = self.group.start_gather(x.detach())
        if not self.overlaps:
            pending = Pending(pending.wait())

        def finish() -> tuple[Tensor, ...]:
            views = _Gather.apply(self.group, in_flight, pending.wait(), x)
            return tuple(self._batched(view) for view in views)

        return Pending(finish=finish)

    def collect(self, partials: Sequence[Tensor]) -> Pending[Tensor]:
        """*g*: one partial [B, T, H] per local slice -> this rank's share [R, H] of their sum over all slices."""
        in_flight = InFlight() if self.overlaps else None
        rows = awaiting([self._rows(partial) for partial in partials], in_flight)
        with torch.no_grad():
            pending = self.group.start_sum_part(tree_sum([partial.detach() for partial in rows]))
        if not self.overlaps:
            pending = Pending(pending.wait())
        return Pending(finish=lambda: _Scatter.apply(self.group, in_flight, pending.wait(), *rows))

    def apply(self, function: Callable[..., Any], tensors: Sequence[Tensor], parameter: Tensor) -> Any:
        """`function(*tensors, parameter)` on the stream and a replicated parameter.

        With a fixed order of sums, the function is applied to each slice's share of the tokens separately.
        """
        views = self.weights.get(
            parameter,
            lambda: fan_out(summed_in_float32(local_part(parameter)), self.group),
            parameter.dtype,
            is_summed=True,
        )
        if len(views) == 1:
            return function(*tensors, views[0])
        pieces = zip(*(tensor.chunk(len(views)) for tensor in tensors), strict=True)
        results = [function(*piece, view) for piece, view in zip(pieces, views, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def own(self, x: Tensor) -> Tensor:
        """This rank's share [R, H] of tokens [B, T, H] that every rank holds; backward all-gathers the gradient."""
        return _Own.apply(self._rows(x), self.group)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens [B, T, H], for computations that every rank repeats; backward takes this rank's share."""
        return self._batched(_Whole.apply(x, self.group))

    def _rows(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return F.pad(x, (0, 0, 0, self.filling)) if self.filling else x

    def _batched(self, x: Tensor) -> Tensor:
        return x[: self.tokens].view(*self.shape, -1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorGroup, in_flight: InFlight, whole: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.in_flight = group, in_flight
        return tuple(whole.view_as(whole) for _ in range(group.local_slices))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        partial = tree_sum(gradients)
        pending = ctx.group.start_sum_part(partial)
        return None, None, None, ctx.in_flight.hold(pending, ctx.group.own_part(partial))


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: TensorGroup, in_flight: InFlight | None, part: Tensor, *partials: Tensor) -> Tensor:
        ctx.group, ctx.in_flight, ctx.shapes = group, in_flight, [partial.shape for partial in partials]
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pending = ctx.group.start_gather(gradient)
        if ctx.in_flight is None:
            whole = pending.wait()
        else:
            whole = ctx.in_flight.hold(pending, gradient.new_zeros(()).expand(ctx.shapes[0]))
        return (None, None, None, *([whole] * len(ctx.shapes)))


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.own_part(x).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.start_gather(gradient).wait(), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        whole = group.start_gather(x).wait()
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.own_part(gradient).contiguous(), None
