"""Sequences per step and per micro-batch, from the settings and from a run's record.

All functions here return sizes, or raise a `UsageError` that names the bad value and, where possible, valid ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colonnade.config import sequences_of_step
from colonnade.errors import UsageError
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import MAX_TOKENS_PER_STEP, RunSettings
from colonnade.tuning.batch_record import micro_batch_candidates


def requested_global_batch(settings: RunSettings, dp: int) -> int | None:
    """Sequences per optimizer step that the settings ask for; None if the tuner determines it.

    Raises:
        UsageError: --tokens-per-step is not a multiple of the sequence length, or the step is too large.
    """
    block = settings.block_size
    assert block is not None
    if settings.tokens_per_step is not None:
        return sequences_of_step(settings.tokens_per_step, block)
    if settings.initial_batch_size == "auto":
        check_step_size(1, settings, dp)
        return None
    micro_batch = int(settings.initial_batch_size)
    check_step_size(micro_batch, settings, dp)
    return micro_batch * settings.gradient_accumulation_steps * dp


def check_step_size(micro_batch: int, settings: RunSettings, dp: int) -> None:
    """Raise UsageError if a step would be too large, most likely because of a typo in one of its sizes."""
    tokens = micro_batch * settings.gradient_accumulation_steps * dp * (settings.block_size or 0)
    if tokens > MAX_TOKENS_PER_STEP:
        raise UsageError(
            f"micro-batch {micro_batch} x --gradient-accumulation-steps {settings.gradient_accumulation_steps} x {dp} "
            f"data-parallel ranks of {settings.block_size} tokens are {tokens:,} tokens a step; at most "
            f"{MAX_TOKENS_PER_STEP:,} can be: lower one of them"
        )


def batch_of_resumed(
    record: Mapping[str, Any], settings: RunSettings, given: Mapping[str, Any], layout: ParallelLayout
) -> int | None:
    """Sequences per optimizer step of a resumed run: its own, unless a new accumulation or token count is given.

    A new micro-batch alone does not change it, nor does a settings file that repeats the run's own settings.
    """
    names = ("initial_batch_size", "gradient_accumulation_steps", "tokens_per_step")
    if record:
        own = RunSettings(**record["settings"])
        changed = any(getattr(settings, name) != getattr(own, name) for name in names)
        if not (changed and given.keys() & set(names[1:])):
            return int(record["global_batch"])
    return requested_global_batch(settings, layout.dp)


def fixed_micro_batch(settings: RunSettings, record: Mapping[str, Any]) -> int | None:
    """The micro-batch of a deterministic run, which must not be lowered: the given one, otherwise the checkpoint's.

    None if the deterministic mode is off.

    Raises:
        UsageError: neither exists. The bits depend on the micro-batch, and a tuned one depends on ranks and timing.
    """
    if not settings.deterministic:
        return None
    if settings.initial_batch_size != "auto":
        return int(settings.initial_batch_size)
    size = (record.get("arithmetic") or record).get("micro_batch_size")
    if type(size) is not int or size < 1:
        raise UsageError(
            "--deterministic fixes the micro-batch, which --initial-batch-size auto would choose by the ranks at hand: "
            "give --initial-batch-size N, a number that fits at every rank count you mean to use"
        )
    return size


def check_shares(global_batch: int | None, dp: int) -> None:
    """Raise UsageError if the step's sequences cannot be divided evenly over the data-parallel ranks."""
    if global_batch is not None and global_batch % dp:
        sizes = [size for size in micro_batch_candidates(global_batch) if size <= 2 * dp]
        raise UsageError(
            f"{dp} data-parallel ranks cannot share out the {global_batch} sequences of a step; "
            f"data-parallel sizes that can: {', '.join(map(str, sizes))}"
        )
