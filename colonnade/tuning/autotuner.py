"""The micro-batch autotuner: the largest micro-batch that fits every rank, or a smaller one that is faster.

1. ``plan_search``: which sizes may be used. The global batch (in chunks) = micro-batch x accumulation x dp is fixed
   when a run is created; before that, ``auto`` keeps the accumulation and lets the global batch follow.
2. ``find_micro_batch``: tries sizes. A trial runs on each rank alone, with collectives replaced by the identity
   (``memory.TrialRunner``), so it cannot fail between two collectives. The ranks vote on its outcome (fits = minimum,
   seconds = maximum over ranks), so that all of them run the same sequence of trials.
3. ``tune_micro_batch``: combines both with the record of earlier answers (``batch_record``), which a restart reuses
   without trials.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.errors import RunError, UsageError
from colonnade.tuning.batch_record import Trial, micro_batch_candidates, store_answer, stored_answer
from colonnade.tuning.memory import GIB, TrialRunner

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

# Step times for the same work vary by about this fraction between trials; a smaller gain does not count as faster.
THROUGHPUT_NOISE = 0.02

# Upper bound for ``auto``, for tiny models that never fill a device's memory.
LARGEST_MICRO_BATCH = 2**16

# (fits, seconds) of this rank -> (fits on every rank, seconds of the slowest rank). A collective: every rank calls it.
Agree = Callable[[bool, float], tuple[bool, float]]


# ---------------------------------------------------------------------------------------------------------------------
# Which sizes


@dataclass(frozen=True)
class SearchPlan:
    """The sizes a search may use, and what its answer determines.

    Exactly one of ``chunks_per_rank`` (the global batch divided by dp) and ``gradient_accumulation_steps`` is given: it
    is fixed, and the other follows from the micro-batch.
    """

    candidates: Sequence[int]
    from_above: bool
    at_most: int | None
    chunks_per_rank: int | None
    gradient_accumulation_steps: int | None

    def settled(self, micro_batch_size: int) -> SearchPlan:
        """The plan once a run has been created with this size: its global batch is fixed from then on."""
        if self.chunks_per_rank is not None or self.gradient_accumulation_steps is None:
            return self
        return plan_search(self.at_most, chunks_per_rank=micro_batch_size * self.gradient_accumulation_steps)

    def key_fields(self, depends_on: Mapping[str, Any]) -> dict[str, Any]:
        """The record's key (``batch_record``): ``depends_on`` plus the fields of this plan."""
        return {
            **depends_on,
            "chunks_per_rank": self.chunks_per_rank,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "at_most": self.at_most,
        }


def plan_search(
    initial_batch_size: int | None,
    *,
    gradient_accumulation_steps: int | None = None,
    chunks_per_rank: int | None = None,
) -> SearchPlan:
    """The search plan for ``--initial-batch-size`` (None: ``auto``). The candidates are:

    - with ``chunks_per_rank`` (an existing run, or ``--tokens-per-step``): its divisors, up to the given size if any;
    - with a given size n and the accumulation: the divisors of n x accumulation up to n, because the global batch is
      n x accumulation x dp whatever fits;
    - with ``auto`` and the accumulation: any size; the global batch follows.

    A given size is where the search starts, going down; ``auto`` starts at 1, going up.

    Raises:
        UsageError: a size below 1.
        ValueError: not exactly one of ``gradient_accumulation_steps`` and ``chunks_per_rank``.
    """
    if (gradient_accumulation_steps is None) == (chunks_per_rank is None):
        raise ValueError("give either gradient_accumulation_steps or chunks_per_rank")
    for name, value in (
        ("--initial-batch-size", initial_batch_size),
        ("--gradient-accumulation-steps", gradient_accumulation_steps),
        ("the global batch a data-parallel rank", chunks_per_rank),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, but must be at least 1")
    if initial_batch_size is not None and gradient_accumulation_steps is not None:
        chunks_per_rank, gradient_accumulation_steps = initial_batch_size * gradient_accumulation_steps, None
    return SearchPlan(
        candidates=(
            range(1, LARGEST_MICRO_BATCH + 1)
            if chunks_per_rank is None
            else micro_batch_candidates(chunks_per_rank, initial_batch_size)
        ),
        from_above=initial_batch_size is not None,
        at_most=initial_batch_size,
        chunks_per_rank=chunks_per_rank,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The vote


def agree_alone(fits: bool, seconds: float) -> tuple[bool, float]:
    """The vote of a single rank."""
    return fits, seconds


def agree_over_group(group: ProcessGroup | None, device: torch.device | str) -> Agree:
    """A vote by one all-reduce over ``group`` (None: all ranks), on a ``device`` that its backend supports.

    No other collective of the group may be in flight: the vote could be matched with it on another rank.
    """

    def agree(fits: bool, seconds: float) -> tuple[bool, float]:
        import torch
        import torch.distributed as dist

        # One MIN all-reduce covers both: max(seconds) = -min(-seconds).
        vote = torch.tensor([float(fits), -seconds], dtype=torch.float64, device=device)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=group)
        lowest_fits, minus_seconds = vote.tolist()
        return lowest_fits > 0, -minus_seconds

    return agree


# ---------------------------------------------------------------------------------------------------------------------
# The search


@dataclass(frozen=True)
class SearchResult:
    """The chosen size and all trials in the order they ran."""

    size: int
    trials: tuple[Trial, ...]


def find_micro_batch(
    candidates: Sequence[int],
    run_trial: Callable[[int], tuple[bool, float]],
    agree: Agree = agree_alone,
    *,
    from_above: bool = False,
    flat_doublings: int | None = None,
    limit_bytes: int | None = None,
) -> SearchResult:
    """Find the largest of ``candidates`` (ascending) that fits on every rank, or a smaller one that is faster.

    From below: start with the smallest candidate and double (to the largest candidate within twice the size, else the
    next one) until a size does not fit, then bisect between the last that fits and the first that does not.
    From above: try the largest candidate and use it if it fits; else bisect below it.

    Of all sizes that fit, the largest whose throughput (size / seconds) is within ``THROUGHPUT_NOISE`` of the best is
    chosen: a smaller size is preferred only if it is faster than all larger ones by more than that.

    Args:
        candidates: the sizes to choose from; a ``range`` or a list.
        run_trial: runs one trial on this rank, without collectives, and returns ``(fits, seconds)``.
        agree: the vote. Every rank calls it once after each trial.
        from_above: start from the largest candidate.
        flat_doublings: from below, stop growing after this many doublings in a row that did not raise the best
            throughput by ``THROUGHPUT_NOISE``; None: grow until memory runs out.
        limit_bytes: the memory limit to name in the error, if known.

    Raises:
        RunError: not even the smallest candidate fits.
    """
    trials: list[Trial] = []

    def attempt(position: int) -> Trial:
        fits, seconds = agree(*run_trial(candidates[position]))
        trials.append(Trial(candidates[position], fits, seconds if fits else None))
        return trials[-1]

    fitting, failing = _descend(candidates, attempt) if from_above else _grow(candidates, attempt, flat_doublings)
    while failing is not None and failing - fitting > 1:
        middle = (fitting + failing) // 2
        if attempt(middle).fits:
            fitting = middle
        else:
            failing = middle

    if fitting < 0:
        limit = "the memory" if limit_bytes is None else f"the {limit_bytes / GIB:.2f} GiB"
        raise RunError(
            f"micro-batch size {candidates[0]} does not fit in {limit} of a rank: use a smaller --block-size, a larger "
            "--tensor-parallel-size, --precision bf16 or a higher --memory-limit-gib"
        )
    return SearchResult(_prefer_faster(trials), tuple(trials))


def _grow(
    candidates: Sequence[int], attempt: Callable[[int], Trial], flat_doublings: int | None
) -> tuple[int, int | None]:
    """Positions of the last size that fits (-1: none) and of the first that does not (None: every trial fitted)."""
    best, flat = 0.0, 0
    fitting, position = -1, 0
    while True:
        trial = attempt(position)
        if not trial.fits:
            return fitting, position
        throughput = _throughput(trial)
        flat = 0 if throughput > best * (1 + THROUGHPUT_NOISE) else flat + 1
        best = max(best, throughput)
        if position + 1 == len(candidates) or (flat_doublings is not None and flat >= flat_doublings):
            return position, None
        fitting = position
        position = max(position + 1, bisect_right(candidates, 2 * candidates[position]) - 1)


def _descend(candidates: Sequence[int], attempt: Callable[[int], Trial]) -> tuple[int, int | None]:
    """Like ``_grow``, but from a single trial of the largest candidate; smaller ones stay untried."""
    last = len(candidates) - 1
    return (last, None) if attempt(last).fits else (-1, last)


def _throughput(trial: Trial) -> float:
    """Sequences per second; infinite if the measured time is 0, as for a simulated or tiny step."""
    return trial.size / trial.seconds if trial.seconds else math.inf


def _prefer_faster(trials: Sequence[Trial]) -> int:
    fitting = [trial for trial in trials if trial.fits]
    best = max(_throughput(trial) for trial in fitting)
    return max(trial.size for trial in fitting if _throughput(trial) * (1 + THROUGHPUT_NOISE) >= best)


# ---------------------------------------------------------------------------------------------------------------------
# With the record


@dataclass(frozen=True)
class TunedMicroBatch:
    """The autotuner's answer: chunks per micro-batch on each rank, and micro-batches per optimizer step."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    trials: tuple[Trial, ...]  # empty if the answer came from the record
    plan: SearchPlan  # with the run's global batch fixed; ``record_out_of_memory`` needs its key and candidates


def tune_micro_batch(
    plan: SearchPlan,
    trials: TrialRunner,
    agree: Agree,
    *,
    directory: Path,
    depends_on: Mapping[str, Any],
    is_writer: bool,
) -> TunedMicroBatch:
    """Use the recorded micro-batch for this plan, or search for one and record it.

    Every rank calls this. The ranks vote on the record too: if one cannot read an answer, all search; if they read
    different ones, the smallest counts.

    Args:
        plan: the sizes allowed.
        trials: this rank's trials (``memory.trial_runner``).
        agree: the vote.
        directory: the run's checkpoint folder.
        depends_on: what the answer depends on besides the plan, as JSON values: device name, its total memory (not
            the free memory, which differs at each start), memory limit, model, block size, tp, dp, precision, ...
        is_writer: true on the one rank that writes the record.

    Raises:
        RunError: no size fits, or the record cannot be written.
    """
    known = _recorded_by_all(plan, agree, directory, depends_on)
    result = SearchResult(known, ()) if known is not None else None
    if result is None:
        result = find_micro_batch(
            plan.candidates,
            trials,
            agree,
            from_above=plan.from_above,
            flat_doublings=trials.flat_doublings,
            limit_bytes=trials.limit_bytes,
        )
    size, settled = result.size, plan.settled(result.size)
    if known is not None and settled is not plan:
        # A run that ran out of memory before its first checkpoint has left a bound for the global batch it had.
        size = min(size, _recorded_by_all(settled, agree, directory, depends_on) or size)
    if is_writer and known is None:
        store_answer(directory, plan.key_fields(depends_on), size, result.trials)
        if settled is not plan:  # a restart knows the run's global batch, so it looks under this key
            store_answer(directory, settled.key_fields(depends_on), size, result.trials)
    assert settled.chunks_per_rank is not None
    return TunedMicroBatch(size, settled.chunks_per_rank // size, result.trials, settled)


def _recorded_by_all(plan: SearchPlan, agree: Agree, directory: Path, depends_on: Mapping[str, Any]) -> int | None:
    """The recorded size, the smallest if ranks read different ones; None if one of them reads none. Collective."""
    answer = stored_answer(directory, plan.key_fields(depends_on))
    # A stored size that is not a candidate (an edited record) is replaced by the next candidate below it.
    position = bisect_right(plan.candidates, answer) - 1 if answer is not None else -1
    known = position >= 0
    all_know, minus_size = agree(known, -float(plan.candidates[position]) if known else -math.inf)
    return int(-minus_size) if all_know else None
