"""Which of the ways to run `plan_run.py` recommends, against every way tried one by one; ties by hand."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest

from colonnade.config import complete_settings
from colonnade.tuning.communication import step_traffic
from colonnade.tuning.cost_model import Memory, ParallelConfig, step_memory
from colonnade.tuning.recommendation import Candidate, best_first, memory_for_tensors
from colonnade.tuning.step_time import LATENCY_ACROSS, LATENCY_IN_NODE, Machine, StepTime, link_of, step_time
from plans import LARGE, planned
from run.inputs import named_model


def test_of_the_fastest_the_one_with_free_memory_is_recommended(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LARGE, "--gpus", "8", "--gpu", "H200", "--no-write")
    candidates = plan["candidates"]
    assert candidates[0]["parallel"] == plan["parallel"]
    seen = {(one["parallel"]["tp"], one["parallel"]["data_parallel_shard"]) for one in candidates}
    assert seen == {(tp, mode) for tp in (1, 2, 4) for mode in ("none", "zero2", "zero3")} | {(8, "none")}
    assert all(one["memory"]["total"] <= plan["memory_limit"] for one in candidates if one["fits"])
    fitting = [one for one in candidates if one["fits"]]
    fastest = min(one["step_time"]["seconds"] for one in fitting)
    equal = [one for one in fitting if one["step_time"]["seconds"] <= 1.02 * fastest]
    at_lowest_tp = [one for one in equal if one["parallel"]["tp"] == 1]
    assert len(fitting) > len(equal) >= len(at_lowest_tp) > 1
    assert plan["memory"]["total"] == min(one["memory"]["total"] for one in at_lowest_tp)
    assert plan["memory"]["total"] < max(one["memory"]["total"] for one in at_lowest_tp)


def fastest_of_all(gpus: int, plan: dict[str, Any], machine: Machine) -> float:
    """Seconds of a step: every way to run LARGE in whole nodes of 8 that fits, with every micro-batch, one by one."""
    config = named_model(complete_settings({"preset": "argonne-2b"}), 151669)
    chunks, block = plan["tokens_per_step"] // 4096, 4096
    best = math.inf
    for tp, shard, mode in product((1, 2, 4, 8), ("none", "zero2", "zero3"), ("none", "selective", "full")):
        dp = gpus // tp
        for replicas, sequence, overlap, size in product((1, gpus // 8), (False, True), (False, True), range(1, 65)):
            if chunks // dp % size or (replicas > 1 and shard == "none") or dp // replicas < 2:
                continue
            parallel = ParallelConfig(
                tp, dp, "bf16", "adamw", mode, sequence, overlap, data_parallel_shard=shard, replicas=replicas
            )
            accumulation = chunks // dp // size
            if step_memory(config, parallel, size, block, accumulation).total > plan["memory_limit"]:
                continue
            traffic = step_traffic(config, parallel, size, block, accumulation)
            sizes = {"tokens": chunks * block, "block": block, "accumulation": accumulation}
            best = min(best, step_time(config, parallel, machine, traffic, **sizes).seconds)
    return best


def test_nothing_that_fits_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    """At a slow network, where replicas, sequence parallelism and overlap count."""
    rates = ("--network", "5", "--interconnect", "50", "--link-utilisation", "1", "--tokens-per-step", str(2**18))
    plan = planned(capsys, *LARGE, "--gpus", "16", "--gpu", "H100", *rates, "--no-write")
    inside, network = link_of("", "50", LATENCY_IN_NODE), link_of("", "5", LATENCY_ACROSS)
    machine = Machine(989.4e12, 0.4, 1.0, 8, inside, network)
    seconds = [one["step_time"]["seconds"] for one in plan["candidates"] if one["fits"]]
    assert min(seconds) == pytest.approx(fastest_of_all(16, plan, machine), rel=1e-6)
    assert plan["step_time"]["seconds"] <= 1.02 * min(seconds)


def test_all_ways_to_run_are_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    def ways(*flags: str) -> set[tuple[Any, ...]]:
        plan = planned(capsys, *LARGE, "--gpus", "16", "--gpu", "H100", "--no-write", *flags)
        names = ("tp", "data_parallel_shard", "replicas", "sequence_parallel", "overlap_collectives")
        found = [tuple(one["parallel"][name] for name in names) for one in plan["candidates"]]
        assert len(found) == 3 * len(set(found))  # kinds of checkpointing
        return set(found)

    replicas = {("none", 1), ("zero2", 1), ("zero3", 1), ("zero2", 2), ("zero3", 2)}
    switches = set(product((False, True), repeat=2))
    whole = {(1, *kind, False, False) for kind in replicas}
    cut = {(tp, *kind, *switch) for tp in (2, 4) for kind in replicas for switch in switches}
    # At tp 8 a node holds one part of each parameter, so there is nothing to share out within it.
    cut |= {(8, *kind, *switch) for kind in replicas if kind[1] == 1 for switch in switches}
    assert ways() == whole | cut
    assert {way[3] for way in ways("--sequence-parallel")} == {True}
    assert {way[4] for way in ways("--overlap-collectives")} == {True}
    assert {way[4] for way in ways("--plain-step")} == {False}
    assert {way[2] for way in ways("--data-parallel-shard", "zero3", "--data-parallel-replicate-size", "4")} == {4}
    assert {way[3:] for way in ways("--deterministic")} == {(False, False)}


def candidate(seconds: float, gib: float, *, hidden: float = 0.0, fits: bool = True, **parallel: Any) -> Candidate:
    """A candidate of which only the time and the memory count."""
    memory = Memory(0, 0, 0, 0, 0, 0, 0, total=int(gib * 2**30))
    return Candidate(ParallelConfig(**parallel), 1, 1, memory, fits, (), StepTime(seconds, hidden, hidden))


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([candidate(10, 70), candidate(10.1, 60), candidate(10.3, 45)], 1),  # the last is 3% slower
        ([candidate(10, 70), candidate(10, 20, fits=False)], 0),
        ([candidate(10, 70), candidate(10, 60, tp=2)], 0),  # more ranks do not count for their memory
        ([candidate(10, 70), candidate(10, 60, hidden=0.9)], 1),
        ([candidate(10, 70), candidate(10, 60, hidden=1.1)], 0),  # 11% longer if nothing is hidden
        ([candidate(11, 70), candidate(10, 60, hidden=9)], 1),  # but faster by more than 2%
        (
            [
                candidate(10, 39, activation_checkpointing="none"),
                candidate(10, 20, data_parallel_shard="zero3", dp=2, activation_checkpointing="none"),
                candidate(10, 5, activation_checkpointing="full"),
            ],
            0,  # less than half of the 80 GiB: the simplest
        ),
    ],
)
def test_which_of_several_is_recommended(candidates: list[Candidate], best: int) -> None:
    for order in (candidates, candidates[::-1]):
        assert best_first(order, 80 * 2**30)[0] is candidates[best]


@pytest.mark.parametrize(
    ("memory", "given", "left"),
    [(100, None, 90), (20, None, 17), (100, 50.0, 45), (100, 20.0, 17), (40, 200.0, 36), (2, None, 0)],
)
def test_what_tensors_may_take_of_a_device(memory: int, given: float | None, left: int) -> None:
    """A tenth, at least 3 GiB, is left of the memory or of --memory-limit-gib where that is lower."""
    assert memory_for_tensors(memory * 2**30, given) == left * 2**30


def test_links_run_below_their_rate(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("--tensor-parallel-size", "2", "--plain-step", "--no-sequence-parallel")
    common = (*LARGE, "--gpus", "2", "--gpu", "H200", *fixed, "--no-write")
    plan = planned(capsys, *common)
    # 450 GB/s, a ring of two sends an all-reduce's bytes once and half of an all-gather's; 10 us a call.
    sent = sum(one["size"] / (2 if one["collective"] == "all-gather" else 1) for one in plan["traffic"])
    calls = sum(one["calls"] for one in plan["traffic"])
    time = plan["step_time"]
    assert time["communication"] == pytest.approx(sent / (0.8 * 450e9) + calls * 10e-6)
    full = planned(capsys, *common, "--link-utilisation", "1")["step_time"]
    assert full["communication"] == pytest.approx(sent / 450e9 + calls * 10e-6)


def test_a_plan_tells_what_hangs_on_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LARGE, "--gpus", "16", "--gpu", "H100", "--data-parallel-shard", "zero3", "--no-write")
    time = plan["step_time"]
    slowest = time["compute"] + time["communication"]
    (said,) = [line for line in plan["assumptions"] if line.startswith("overlap: ")]
    assert f"the step would take {slowest:.3g} s, {100 * (slowest - time['seconds']) / time['seconds']:.1f}% " in said
    assert slowest > 1.01 * time["seconds"]


def test_a_slow_network_keeps_a_replica_in_its_node(capsys: pytest.CaptureFixture[str]) -> None:
    common = (*LARGE, "--gpus", "16", "--gpu", "H100", "--tokens-per-step", str(2**20), "--no-write")
    fast, slow = (planned(capsys, *common, "--network", rate) for rate in ("450", "0.5"))
    assert fast["parallel"]["tp"] == 1 < slow["parallel"]["tp"]
    assert slow["step_time"]["seconds"] > fast["step_time"]["seconds"]


def test_of_equals_the_simplest_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """What is computed again takes as long as the sums that it hides: only the last bit of the times differs."""
    common = ("--preset", "tiny", "--vocab-size", "4096", "--gpus", "8", "--gpu", "H200", "--no-write")
    again = planned(capsys, *common, "--activation-checkpointing", "selective")["step_time"]["seconds"]
    plan = planned(capsys, *common)
    assert plan["parallel"]["activation_checkpointing"] == "none"
    assert plan["step_time"]["seconds"] == pytest.approx(again, rel=1e-6)
