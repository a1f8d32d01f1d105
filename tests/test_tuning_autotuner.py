"""The search and its vote, with simulated failures: which sizes are tried, in which order, and what is chosen."""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from colonnade.errors import RunError, UsageError
from colonnade.tuning.autotuner import (
    LARGEST_MICRO_BATCH,
    Agree,
    SearchPlan,
    TunedMicroBatch,
    agree_alone,
    find_micro_batch,
    plan_search,
    tune_micro_batch,
)
from colonnade.tuning.batch_record import record_out_of_memory, stored_answer

ANY_SIZE = range(1, 1025)


def proportional(size: int) -> float:
    """Seconds of a device that is equally efficient at every size."""
    return float(size)


@dataclass
class SimulatedDevice:
    """Fits sizes up to ``largest``; notes the sizes it was asked for."""

    largest: int
    seconds: Callable[[int], float] = proportional
    limit_bytes: int = 2**30
    flat_doublings: int | None = None
    asked: list[int] = field(default_factory=list)

    def __call__(self, size: int) -> tuple[bool, float]:
        self.asked.append(size)
        return (True, self.seconds(size)) if size <= self.largest else (False, math.inf)


@pytest.mark.parametrize(
    ("largest", "asked"),
    [
        (1, [1, 2]),
        (2, [1, 2, 4, 3]),
        (5, [1, 2, 4, 8, 6, 5]),
        (6, [1, 2, 4, 8, 6, 7]),
        (7, [1, 2, 4, 8, 6, 7]),
    ],
)
def test_auto_doubles_and_then_bisects(largest: int, asked: list[int]) -> None:
    device = SimulatedDevice(largest)
    result = find_micro_batch(ANY_SIZE, device)
    assert device.asked == asked
    assert result.size == largest
    assert [(trial.size, trial.fits) for trial in result.trials] == [(size, size <= largest) for size in asked]


@pytest.mark.parametrize("from_above", [False, True])
@pytest.mark.parametrize("candidates", [range(1, 65), [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], [1, 7], [1]])
def test_the_largest_candidate_that_fits_is_found(from_above: bool, candidates: Sequence[int]) -> None:
    for largest in range(1, 70):
        device = SimulatedDevice(largest)
        result = find_micro_batch(candidates, device, from_above=from_above)
        assert result.size == max(size for size in candidates if size <= largest)  # by looking at all of them
        assert len(device.asked) == len(set(device.asked)), "a size was tried twice"


def test_candidates_that_do_not_double_are_not_skipped() -> None:
    device = SimulatedDevice(largest=100)
    assert find_micro_batch([1, 3, 5, 15], device).size == 15
    assert device.asked == [1, 3, 5, 15]


@pytest.mark.parametrize(
    ("largest", "asked", "size"),
    [(24, [24], 24), (12, [24, 4, 8, 12], 12), (5, [24, 4, 8, 6], 4), (1, [24, 4, 2, 1], 1)],
)
def test_a_number_is_tried_first_and_never_exceeded(largest: int, asked: list[int], size: int) -> None:
    device = SimulatedDevice(largest)
    plan = plan_search(24, gradient_accumulation_steps=1)
    assert plan.candidates == [1, 2, 3, 4, 6, 8, 12, 24]
    assert find_micro_batch(plan.candidates, device, from_above=plan.from_above).size == size
    assert device.asked == asked


def test_nothing_fits() -> None:
    for from_above in (False, True):
        with pytest.raises(RunError, match=r"size 1 does not fit in the 1\.50 GiB.*--block-size.*--memory-limit-gib"):
            find_micro_batch([1, 2, 4], SimulatedDevice(0), from_above=from_above, limit_bytes=3 * 2**29)


def test_a_smaller_size_is_preferred_only_if_faster_by_more_than_noise() -> None:
    # Samples a second at size:        1    2    4    8
    for throughputs, size in (
        ({1: 10.0, 2: 18.0, 4: 20.0, 8: 20.0}, 8),
        ({1: 10.0, 2: 18.0, 4: 20.3, 8: 20.0}, 8),  # 1.5% is noise
        ({1: 10.0, 2: 18.0, 4: 20.5, 8: 20.0}, 4),  # 2.5% is not
        ({1: 10.0, 2: 30.0, 4: 29.9, 8: 20.0}, 4),  # the largest of those as fast as the best
    ):
        device = SimulatedDevice(8, seconds=lambda size, rate=throughputs: size / rate[size])  # type: ignore[misc]
        assert find_micro_batch([1, 2, 4, 8], device).size == size


def test_growth_ends_after_two_flat_doublings_where_asked() -> None:
    def saturating(size: int) -> float:
        return size / min(size, 4)  # no more throughput beyond size 4

    device = SimulatedDevice(512, seconds=saturating)
    result = find_micro_batch(ANY_SIZE, device, flat_doublings=2)
    assert device.asked == [1, 2, 4, 8, 16]
    assert result.size == 16

    unbounded = SimulatedDevice(512, seconds=saturating)
    assert find_micro_batch(ANY_SIZE, unbounded).size == 512


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


def run_ranks(devices: Sequence[SimulatedDevice], work: Callable[[int, Agree], object]) -> list[object]:
    """Run ``work(rank, agree)`` in a thread a rank; the vote meets at a barrier, which breaks if a rank is missing."""
    meeting = threading.Barrier(len(devices), timeout=10)
    votes: list[tuple[bool, float]] = [(False, 0.0)] * len(devices)
    results: list[object] = [None] * len(devices)

    def rank_main(rank: int) -> None:
        def agree(fits: bool, seconds: float) -> tuple[bool, float]:
            votes[rank] = (fits, seconds)
            meeting.wait()
            outcome = min(fits for fits, _ in votes), max(seconds for _, seconds in votes)
            meeting.wait()  # nobody votes again before all have read
            return outcome

        results[rank] = work(rank, agree)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_failure_on_one_rank_leads_all_ranks_through_the_same_trials() -> None:
    devices = [SimulatedDevice(64), SimulatedDevice(5, seconds=lambda size: 2.0 * size)]
    first, second = run_ranks(devices, lambda rank, agree: find_micro_batch(ANY_SIZE, devices[rank], agree))
    assert devices[0].asked == devices[1].asked == [1, 2, 4, 8, 6, 5]
    assert first == second
    assert first.size == 5  # type: ignore[attr-defined]
    assert [trial.seconds for trial in first.trials] == [2.0, 4.0, 8.0, None, None, 10.0]  # type: ignore[attr-defined]


def test_from_above_with_a_failure_on_one_rank() -> None:
    devices = [SimulatedDevice(3), SimulatedDevice(64)]
    first, second = run_ranks(
        devices, lambda rank, agree: find_micro_batch([1, 2, 4, 8], devices[rank], agree, from_above=True)
    )
    assert devices[0].asked == devices[1].asked == [8, 2, 4]
    assert first == second
    assert first.size == 2  # type: ignore[attr-defined]


def gloo_rank(rank: int, rendezvous: str) -> tuple[int, list[int], list[float | None]]:
    import torch.distributed as dist

    from colonnade.tuning.autotuner import agree_over_group

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    device = SimulatedDevice((6, 3)[rank], seconds=lambda size: size * (1.0, 0.5)[rank])
    result = find_micro_batch(ANY_SIZE, device, agree_over_group(None, "cpu"))
    dist.barrier()
    dist.destroy_process_group()
    return result.size, device.asked, [trial.seconds for trial in result.trials]


def test_the_vote_over_two_gloo_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        ranks = [processes.submit(gloo_rank, rank, str(tmp_path / "rendezvous")) for rank in (0, 1)]
        results = [rank.result(timeout=60) for rank in ranks]
    assert results[0] == results[1] == (3, [1, 2, 4, 3], [1.0, 2.0, None, 3.0])  # rank 0 is slower, 1 has less memory


# ---------------------------------------------------------------------------------------------------------------------
# What the answer settles, and the record


def test_plans() -> None:
    auto = plan_search(None, gradient_accumulation_steps=4)
    assert auto.candidates == range(1, LARGEST_MICRO_BATCH + 1)
    assert not auto.from_above
    assert auto.settled(6).chunks_per_rank == 24

    number = plan_search(6, gradient_accumulation_steps=4)
    assert (number.candidates, number.from_above, number.chunks_per_rank) == ([1, 2, 3, 4, 6], True, 24)
    assert number.settled(3) is number

    given = plan_search(None, chunks_per_rank=24)
    assert (given.candidates, given.from_above) == ([1, 2, 3, 4, 6, 8, 12, 24], False)
    assert given == auto.settled(6)
    assert plan_search(7, chunks_per_rank=24).candidates == [1, 2, 3, 4, 6]


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="--initial-batch-size is 0"):
        plan_search(0, gradient_accumulation_steps=1)
    with pytest.raises(UsageError, match="--gradient-accumulation-steps is -2"):
        plan_search(4, gradient_accumulation_steps=-2)
    with pytest.raises(ValueError, match="either"):
        plan_search(4)


DEPENDS_ON = {"device": "simulated", "total_memory": 2**30, "tp": 2, "dp": 1}


def tune(
    plan: SearchPlan, device: SimulatedDevice, directory: Path, agree: Agree = agree_alone, is_writer: bool = True
) -> TunedMicroBatch:
    return tune_micro_batch(plan, device, agree, directory=directory, depends_on=DEPENDS_ON, is_writer=is_writer)


def test_a_restart_uses_the_record_without_a_trial(tmp_path: Path) -> None:
    plan = plan_search(None, gradient_accumulation_steps=2)
    first = tune(plan, SimulatedDevice(6), tmp_path)
    assert (first.micro_batch_size, first.gradient_accumulation_steps, len(first.trials)) == (6, 2, 6)

    for restart in (plan, plan_search(None, chunks_per_rank=12)):  # before and after the global batch is on disk
        device = SimulatedDevice(6)
        again = tune(restart, device, tmp_path)
        assert device.asked == []
        assert (again.micro_batch_size, again.gradient_accumulation_steps, again.trials) == (6, 2, ())

    changed = SimulatedDevice(6)
    tune_micro_batch(plan, changed, agree_alone, directory=tmp_path, depends_on={**DEPENDS_ON, "tp": 4}, is_writer=True)
    assert changed.asked == [1, 2, 4, 8, 6, 7]


def test_the_global_batch_stays_when_a_number_does_not_fit(tmp_path: Path) -> None:
    tuned = tune(plan_search(12, gradient_accumulation_steps=3), SimulatedDevice(10), tmp_path)
    assert tuned.micro_batch_size == 9
    assert tuned.micro_batch_size * tuned.gradient_accumulation_steps == 36


def test_after_out_of_memory_the_same_command_uses_the_next_smaller_size(tmp_path: Path) -> None:
    tuned = tune(plan_search(None, gradient_accumulation_steps=2), SimulatedDevice(6), tmp_path)
    settled = tuned.plan
    assert settled.candidates == [1, 2, 3, 4, 6, 12]
    failed, sizes = tuned.micro_batch_size, []
    for _ in range(4):
        record_out_of_memory(tmp_path, settled.key_fields(DEPENDS_ON), failed, settled.candidates)
        restart = tune(plan_search(None, chunks_per_rank=12), SimulatedDevice(6), tmp_path)
        assert restart.micro_batch_size * restart.gradient_accumulation_steps == 12
        assert restart.trials == ()
        failed = restart.micro_batch_size
        sizes.append(failed)
    assert sizes == [4, 3, 2, 1]
    with pytest.raises(RunError, match="size 1 ran out of memory and no smaller one exists"):
        record_out_of_memory(tmp_path, settled.key_fields(DEPENDS_ON), failed, settled.candidates)


def test_out_of_memory_before_the_first_checkpoint_keeps_the_global_batch_too(tmp_path: Path) -> None:
    """No checkpoint tells the next start of the global batch: it asks as the first one did."""
    plan, sizes = plan_search(None, gradient_accumulation_steps=2), []
    tuned = tune(plan, SimulatedDevice(6), tmp_path)
    for _ in range(4):
        record_out_of_memory(tmp_path, tuned.plan.key_fields(DEPENDS_ON), tuned.micro_batch_size, tuned.plan.candidates)
        tuned = tune(plan, SimulatedDevice(6), tmp_path)
        assert tuned.micro_batch_size * tuned.gradient_accumulation_steps == 12
        assert tuned.trials == ()
        sizes.append(tuned.micro_batch_size)
    assert sizes == [4, 3, 2, 1]


def test_ranks_that_read_different_records_still_agree(tmp_path: Path) -> None:
    plan = plan_search(None, chunks_per_rank=8)
    folders = [tmp_path / "0", tmp_path / "1"]
    tune(plan, SimulatedDevice(8), folders[0])
    devices = [SimulatedDevice(8), SimulatedDevice(4)]

    def restart(rank: int, agree: Agree) -> TunedMicroBatch:
        return tune(plan, devices[rank], folders[rank], agree, is_writer=rank == 0)

    first, second = run_ranks(devices, restart)  # rank 1 has no record: all search
    assert first == second
    assert devices[0].asked == devices[1].asked == [1, 2, 4, 8]
    assert stored_answer(folders[0], plan.key_fields(DEPENDS_ON)) == 4
    assert stored_answer(folders[1], plan.key_fields(DEPENDS_ON)) is None

    tune(plan, SimulatedDevice(2), folders[1])
    third, fourth = run_ranks(devices, restart)  # 4 and 2: the smaller counts
    assert third == fourth
    assert third.micro_batch_size == 2  # type: ignore[attr-defined]
    assert devices[0].asked == [1, 2, 4, 8]
