"""The order in which collectives start, compute goes on and results are waited for: that order is the overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.decoder.attention import SliceWeights
from colonnade.optim import overlapped_sum
from colonnade.optim.step import optimizer_step
from colonnade.parallel.pending import Pending
from distributed.pool import RankPool
from distributed.test_parity import CONFIG
from distributed.workers import build, compiling_with, loss_and_gradients, make_optimizer, tokens_for, whole
from model import ModelConfig, TensorParallelModel

LAYERS = CONFIG.num_hidden_layers
Event = tuple[str, int]
"""What happened, and to which: of collectives "start" and "wait", of segments "begin" and "end", and backward "weight",
when the gradient of its first projection is there.

Collectives and segments are numbered as they come, in the forward pass; two neighbours are those of the two halves.
"""


class Recorder:
    """Events of one pass."""

    def __init__(self, own: TensorParallelModel) -> None:
        self.events: list[Event] = []
        self._collectives = self._segments = 0
        for name in ("start_sum", "start_gather", "start_sum_part"):
            setattr(own.group, name, self._watched(getattr(own.group, name)))
        for name in ("attention", "mlp"):
            setattr(own.segments, name, self._numbered(getattr(own.segments, name)))

    def taken(self) -> list[Event]:
        events, self.events, self._collectives = self.events, [], 0
        return events

    def _watched(self, start: Callable[[Tensor], Pending[Tensor]]) -> Callable[[Tensor], Pending[Tensor]]:
        def call(tensor: Tensor) -> Pending[Tensor]:
            if tensor.ndim == 3 and tensor.shape[1] == 3:  # the statistics of the loss
                return start(tensor)
            number = self._collectives
            self._collectives += 1
            self.events.append(("start", number))
            pending = start(tensor)

            def finish() -> Tensor:
                self.events.append(("wait", number))
                return pending.wait()

            return Pending(finish=finish)

        return call

    def _numbered(self, segment: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(view: Tensor, *rest: Any) -> Tensor:
            number = self._segments
            self._segments += 1
            self.events.append(("begin", number))
            out = segment(view, *rest)
            self.events.append(("end", number))
            # Backward the gradient of what came out comes first, that of what went in last.
            out.register_hook(lambda _: self.events.append(("begin", number)))
            view.register_hook(lambda _: self.events.append(("end", number)))
            weight = rest[0].qkv if isinstance(rest[0], SliceWeights) else rest[0]
            weight.register_hook(lambda _: self.events.append(("weight", number)))
            return out

        return call


def passes(config: ModelConfig, **options: Any) -> tuple[list[Event], list[Event], list[Event]]:
    """Events of the forward pass, of the backward pass, and of the end of a step, where weights were kept for it."""
    with compiling_with("aot_eager"):
        _, own = build(config, 2, **options)
    recorder = Recorder(own)
    ids, labels = tokens_for(config, 4)
    with own.weights_kept():
        loss = own(ids, labels)
        forward = recorder.taken()
        loss.backward()
        backward = recorder.taken()
    return forward, backward, recorder.taken()


def exposed(events: list[Event]) -> list[int]:
    """Collectives between whose start and wait no whole segment ran."""
    count = sum(kind == "start" for kind, _ in events)
    waited = [number for kind, number in events if kind == "wait"]
    assert sorted(waited) == list(range(count)), "each is waited for once"
    found = []
    for number in range(count):
        between = events[events.index(("start", number)) + 1 : events.index(("wait", number))]
        begun = {segment for kind, segment in between if kind == "begin"}
        if not begun & {segment for kind, segment in between if kind == "end"}:
            found.append(number)
    return found


def test_a_half_computes_while_a_collective_of_the_other_is_under_way(rank_pool: RankPool) -> None:
    """Only at the ends of a pass nothing is left to compute."""
    count = 2 + 4 * LAYERS
    for forward, backward, after in rank_pool.run(2, passes, CONFIG, overlap_collectives=True):
        # Two of the embedding, and one after each attention and feed-forward of each half.
        assert exposed(forward) == [0, 1, count - 1]
        # Two of the head, and one after each feed-forward and attention.
        assert exposed(backward) == [0, count - 1]
        assert after == []
        for events, first in ((forward, 2), (backward, 2)):
            computed = [number for kind, number in events if kind == "end"]
            assert len(computed) == 4 * LAYERS
            for place, number in enumerate(computed[:-1]):
                # Its collective starts before the other half's segment begins, and is waited for after that has ended.
                other = computed[place + 1]
                start, wait = events.index(("start", first + place)), events.index(("wait", first + place))
                assert events.index(("end", number)) < start < events.index(("begin", other))
                assert events.index(("end", other)) < wait
                assert place % 2 or number // 2 == other // 2, "the same segment of the other half"


def test_without_overlap_no_segment_runs_meanwhile(rank_pool: RankPool) -> None:
    forward, backward, _ = rank_pool.run(2, passes, CONFIG)[0]
    for events in (forward, backward):
        assert exposed(events) == list(range(1 + 2 * LAYERS))


@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True}, {"compiled": True}, {"slices": 4}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_gradients_of_weights_are_computed_while_f_sums(rank_pool: RankPool, options: dict[str, Any]) -> None:
    for _, events, _ in rank_pool.run(2, passes, CONFIG, **options):
        late = [place for place, (kind, _) in enumerate(events) if kind == "weight"]
        # The slices of a rank have a weight each, and one sum for all.
        count = options.get("slices", 2) // 2
        assert len(late) == 2 * LAYERS * count
        for first in late[::count]:
            assert late[late.index(first) : late.index(first) + count] == list(range(first, first + count))
            start, wait = events[first - 1], events[first + count]
            assert (start[0], wait) == ("start", ("wait", start[1]))


@pytest.mark.parametrize("options", [{}, {"slices": 4, "sequence_parallel": True}, {"overlap_collectives": True}])
def test_when_gradients_of_weights_are_computed_changes_no_bit(rank_pool: RankPool, options: dict[str, Any]) -> None:
    found, expected = (
        rank_pool.run(2, loss_and_gradients, CONFIG, 2, seed=5, overlap_weight_gradients=hides, **options)[0]
        for hides in (True, False)
    )
    for name, value in expected["gradients"].items():
        assert torch.equal(found["gradients"][name], value), name
    assert torch.equal(found["loss"], expected["loss"])


def test_sequence_parallel_halves_overlap_in_part(rank_pool: RankPool) -> None:
    """A part of a layer has two collectives a half, one after the other, and one segment of the other half for both."""
    forward, backward, after = rank_pool.run(2, passes, CONFIG, overlap_collectives=True, sequence_parallel=True)[0]
    for events in (forward, backward):
        starts = sum(kind == "start" for kind, _ in events)
        # Two of the embedding, two of the head, and of each half two for each attention and feed-forward.
        assert starts == 4 + 8 * LAYERS
        assert starts - len(exposed(events)) >= 2 * 2 * LAYERS
    # The gradients of norms, once a step.
    assert [kind for kind, _ in after] == ["start", "wait"] * (2 * LAYERS + 1)


# ------------------------------------------------------------------------------------------------ data parallelism


def step_with_events(config: ModelConfig, plain: bool) -> tuple[list[str], dict[str, Tensor]]:
    """What happened in a step of two micro-batches at dp 2, and the parameters after it."""
    layout, own = build(config, 1)
    events: list[str] = []
    layers = iter(range(2 * LAYERS * 2))

    def watched(mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(view: Tensor, *rest: Any) -> Tensor:
            number = next(layers)
            out = mlp(view, *rest)
            out.register_hook(lambda _: events.append(f"layer {number % LAYERS} of {number // LAYERS}"))
            return out

        return call

    own.segments.mlp = watched(own.segments.mlp)
    all_reduce = dist.all_reduce

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() >= SMALLEST:
            events.append("sum")
        return all_reduce(tensor, *args, **kwargs)

    smallest, overlapped_sum.SMALLEST_ALONE = overlapped_sum.SMALLEST_ALONE, 4 * SMALLEST
    dist.all_reduce = recorded
    try:
        ids, _ = tokens_for(config, 8)
        share = torch.cat((ids, ids[:, :1]), dim=1)[layout.dp_rank :: layout.dp]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer_step(
            own,
            make_optimizer("adamw", own),
            scaler,
            share,
            accumulation=2,
            targets=ids.numel(),
            max_grad_norm=0.5,
            plain=plain,
        )
    finally:
        dist.all_reduce, overlapped_sum.SMALLEST_ALONE = all_reduce, smallest
    return events, whole(own)


SMALLEST = 1024
"""Elements of a gradient with a sum of its own; those of norms have fewer."""


def test_sums_of_gradients_start_during_the_backward_pass(rank_pool: RankPool) -> None:
    plain = rank_pool.run(2, step_with_events, CONFIG, True)
    overlapped = rank_pool.run(2, step_with_events, CONFIG, False)
    for (events, parameters), (own_events, own_parameters) in zip(plain, overlapped, strict=True):
        assert "sum" in events
        assert events.index("sum") > events.index("layer 0 of 1")
        # Those of the first micro-batch are not final.
        assert own_events.index("layer 0 of 0") < own_events.index("sum")
        between = own_events[own_events.index("layer 1 of 1") : own_events.index("layer 0 of 1")]
        assert between.count("sum") >= 2, "the last layer's gradients"
        for name, parameter in parameters.items():
            assert torch.equal(parameter, own_parameters[name]), name
