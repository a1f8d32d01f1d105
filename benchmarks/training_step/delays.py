"""Collectives with an artificial delay, and the passes that `benchmarks/overlap.py` measures with them."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import model as decoder
from benchmarks.training_step.work import work
from colonnade.optim.gradients import local_gradients, sum_over_data_parallel
from colonnade.optim.overlapped_sum import OverlappedSum
from colonnade.parallel.collectives import TensorGroup
from colonnade.parallel.mesh import init_parallel
from colonnade.parallel.pending import Pending
from model import TensorParallelModel

# Large enough that the head's p W takes about as long as a segment, small enough that the layers dominate.
VOCABULARY, BLOCK = 16_384, 256
PLACES = ("layers", "head")
WARM_UPS = 2

Pass = Callable[[], object]
Times = list[dict[str, tuple[float, float]]]


class Delay:
    """The minimum seconds that a collective takes, by the place in the model it belongs to.

    Attributes:
        started: number of collectives since the last `set`, by place.
        slept: seconds of their delays that were still left when the collectives were waited for.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PLACES, 0.0)
        self.started = dict.fromkeys(PLACES, 0)
        self.slept = 0.0
        self.place = PLACES[0]

    def set(self, seconds: float, places: Sequence[str] = PLACES) -> None:
        self.seconds = {place: seconds if place in places else 0.0 for place in PLACES}
        self.started, self.slept = dict.fromkeys(PLACES, 0), 0.0

    def held_back(self, pending: Pending[Tensor]) -> Pending[Tensor]:
        """The same value, delivered no earlier than the delay after now."""
        self.started[self.place] += 1
        due = time.perf_counter() + self.seconds[self.place]

        def finish() -> Tensor:
            self.slept += sleep_until(due)
            return pending.wait()

        return Pending(finish=finish)

    @contextmanager
    def within(self, place: str) -> Iterator[None]:
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before


def sleep_until(due: float) -> float:
    """Sleep until `due`, which leaves the core to the communication library. Returns the seconds that were left."""
    left = max(0.0, due - time.perf_counter())
    time.sleep(left)
    return left


def delay_group(group: TensorGroup, delay: Delay) -> None:
    """Delay every collective that `group` starts; those within the head's loss count as the head's."""
    for name in ("start_sum", "start_gather", "start_sum_part"):
        setattr(group, name, _held_back(getattr(group, name), delay))
    head_loss = decoder.head_loss

    def delayed_loss(*args: Any) -> Tensor:
        with delay.within("head"):
            return head_loss(*args)

    setattr(decoder, "head_loss", delayed_loss)  # noqa: B010 - a function of another signature, for the checker


def _held_back(start: Callable[[Tensor], Pending[Tensor]], delay: Delay) -> Callable[[Tensor], Pending[Tensor]]:
    return lambda tensor: delay.held_back(start(tensor))


class _DelayedWork:
    def __init__(self, work: Any, due: float, link: Link) -> None:
        self._work, self._due, self._link = work, due, link

    def wait(self) -> None:
        self._link.slept += sleep_until(self._due)
        self._work.wait()


class Link:
    """Replaces `torch.distributed.all_reduce` by a simulated link: sums pass one after the other, each in `seconds`.

    All sums of gradients are in flight at once, so delays counted from the start of each would overlap into one.
    """

    def __init__(self) -> None:
        self.seconds, self.started, self.slept = 0.0, 0, 0.0
        self._free = 0.0
        self._all_reduce = dist.all_reduce

    def __call__(self, tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        self.started += 1
        self._free = max(self._free, time.perf_counter()) + self.seconds
        kwargs["async_op"] = True
        work = _DelayedWork(self._all_reduce(tensor, *args, **kwargs), self._free, self)
        return work if async_op else work.wait()


# ---------------------------------------------------------------------------------------------- tensor parallelism


def measure_tensor_parallel(fractions: Sequence[float], rounds: int, sequence_parallel: bool) -> dict[str, Any]:
    """Seconds of passes with and without overlap at each delay; delays are fractions of a segment's time. Collective.

    Returns:
        segments: seconds of attention and of feed-forward for half a micro-batch, in the forward pass.
        delay: the delay at fraction 1.0: the shorter of the two segments.
        started: for each case, with and without overlap, the number of collectives in a pass, by place.
        rounds: for each round and case, the seconds of a pass and how many of them the first rank slept.
    """
    job = dataclasses.replace(work(VOCABULARY, "fp32"), block=BLOCK)
    layout = init_parallel(int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    delay, ids = Delay(), job.share(layout.device)

    def passes(*, overlap: bool) -> tuple[TensorParallelModel, Pass]:
        own = TensorParallelModel(job.config, layout, overlap_collectives=overlap, sequence_parallel=sequence_parallel)
        delay_group(own.group, delay)
        return own, lambda: _pass(own, ids)

    own, overlapped = passes(overlap=True)
    plain = passes(overlap=False)[1]
    segments = _segment_seconds(own, overlapped)
    unit = torch.tensor(min(segments.values()))
    dist.broadcast(unit, 0)
    cases: dict[str, tuple[Pass, float, Sequence[str]]] = {
        "overlap/0": (overlapped, 0.0, PLACES),
        **{f"overlap/{fraction:.2f}": (overlapped, fraction, PLACES) for fraction in fractions},
        "overlap/1.00/head": (overlapped, 1.0, ("head",)),
        "plain/0": (plain, 0.0, PLACES),
        "plain/1.00": (plain, 1.0, PLACES),
    }
    started: dict[str, dict[str, int]] = {}

    def seconds(name: str) -> tuple[float, float]:
        one, fraction, places = cases[name]
        delay.set(fraction * float(unit), places)
        taken = timed(one)
        started[name] = delay.started
        return taken, delay.slept

    taken = _in_turns(list(cases), seconds, rounds)
    return {"segments": segments, "delay": float(unit), "started": started, "rounds": taken}


def _pass(own: TensorParallelModel, ids: Tensor) -> None:
    own.zero_grad(set_to_none=True)
    with own.weights_kept():
        own(ids[:, :-1], ids[:, 1:], scale=1 / ids[:, 1:].numel()).backward()


def _segment_seconds(own: TensorParallelModel, one: Pass) -> dict[str, float]:
    """Median seconds of each segment in a forward pass, while both ranks compute."""
    taken: dict[str, list[float]] = {"attention": [], "mlp": []}

    def watched(name: str, segment: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            began = time.perf_counter()
            out = segment(*args)
            taken[name].append(time.perf_counter() - began)
            return out

        return call

    for _ in range(WARM_UPS):
        one()
    before = {name: getattr(own.segments, name) for name in taken}
    for name, segment in before.items():
        setattr(own.segments, name, watched(name, segment))
    one()
    one()
    for name, segment in before.items():
        setattr(own.segments, name, segment)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def timed(one: Pass) -> float:
    """Seconds of a pass, from the moment all ranks begin until the last one ends."""
    dist.barrier()
    began = time.perf_counter()
    one()
    dist.barrier()
    return time.perf_counter() - began


def _in_turns(names: Sequence[str], seconds: Callable[[str], tuple[float, float]], rounds: int) -> Times:
    for name in names:
        seconds(name)
    taken = []
    for number in range(rounds):
        taken.append({name: seconds(name) for name in names[:: -1 if number % 2 else 1]})
        if dist.get_rank() == 0:
            one = "  ".join(f"{name} {passed:.2f} ({slept:.2f})" for name, (passed, slept) in taken[-1].items())
            print(f"  round {number + 1} of {rounds}, seconds (asleep): {one}", file=sys.stderr, flush=True)
    return taken


# ------------------------------------------------------------------------------------------------ data parallelism


def measure_data_parallel(fractions: Sequence[float], rounds: int) -> dict[str, Any]:
    """Seconds of a backward pass with all-reduces of its gradients during it, and after it. Collective.

    All all-reduces of a pass together take the given fractions of the backward pass's time.

    Returns:
        backward: seconds of a backward pass without all-reduces.
        started: number of all-reduces in a pass, with overlap and without.
        rounds: for each round and case, the seconds and how many of them the first rank slept.
    """
    job = dataclasses.replace(work(VOCABULARY, "fp32"), block=BLOCK)
    layout = init_parallel(1, torch.device("cpu"))
    link = Link()
    dist.all_reduce = link
    own = TensorParallelModel(job.config, layout)
    ids = job.share(layout.device)

    def loss() -> Tensor:
        own.zero_grad(set_to_none=True)
        return own(ids[:, :-1], ids[:, 1:], scale=1 / ids[:, 1:].numel())

    def overlapped(value: Tensor) -> None:
        sums = OverlappedSum(layout.dp_group)
        sums.watch(own.gradient_holders())
        value.backward()
        sums.finish(value.detach())

    def afterwards(value: Tensor) -> None:
        value.backward()
        gradients = [gradient for gradient, _ in local_gradients(own.parameters())]
        sum_over_data_parallel([*gradients, value.detach()], layout.dp_group)

    def seconds_of(way: Callable[[Tensor], None], total: float) -> tuple[float, float]:
        value = loss()
        link.seconds, link.started, link.slept = total / max(1, sums_of.get(way, 1)), 0, 0.0
        taken = timed(lambda: way(value))
        sums_of[way] = link.started
        return taken, link.slept

    sums_of: dict[Callable[[Tensor], None], int] = {}
    for way in (overlapped, afterwards):
        seconds_of(way, 0.0)
    alone = [seconds_of(lambda value: value.backward(), 0.0)[0] for _ in range(3)]
    backward = torch.tensor(statistics.median(alone))
    dist.broadcast(backward, 0)
    cases = {"overlap/0": (overlapped, 0.0), "plain/0": (afterwards, 0.0)}
    for fraction in fractions:
        cases[f"overlap/{fraction:.2f}"] = (overlapped, fraction)
        cases[f"plain/{fraction:.2f}"] = (afterwards, fraction)
    taken = _in_turns(list(cases), lambda name: seconds_of(cases[name][0], cases[name][1] * float(backward)), rounds)
    started = {"overlap": sums_of[overlapped], "plain": sums_of[afterwards]}
    return {"backward": float(backward), "started": started, "rounds": taken}
