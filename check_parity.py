"""Compare the first steps of your own run at tp k with the same steps on one rank.

    torchrun --nproc_per_node=2 check_parity.py --model-config config.json --tokenizer-path TOKENIZER \
      --data-glob 'data/*.parquet' --precision bf16

1. Read the settings as `training.py` does, and the blocks of the first steps.
2. Train these steps on all ranks, and beside it on the first rank alone, from the same weights on the same blocks: in
   fp32, and in the run's own precision, with --float8 where that is given.
3. Compare loss, gradient norm and every parameter's gradient of each step, and the parameters after the last.

The exit code is 0 when all is within the tolerance, 1 when something is not, and 2 when nothing could be compared.
Nothing is written but --json (`docs/parity.md`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.command_settings import ParitySettings
from colonnade.errors import RunError, UsageError
from colonnade.files import require_place, write_text
from colonnade.flags import parse_parity
from colonnade.parallel.launch import launch

if TYPE_CHECKING:
    from colonnade.model_config import ModelConfig
    from colonnade.parallel.mesh import ParallelLayout
    from colonnade.run_settings import RunSettings
    from colonnade.telemetry.differences import Difference
    from run.parity import Numerics, NumericsParity, Subject

# Measured: `docs/parity.md`.
FP32_TOLERANCE = 1e-4
LOW_PRECISION_TOLERANCE = 2.0


def main(arguments: list[str] | None = None) -> None:
    parity, given = parse_parity(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from colonnade.parallel.mesh import first_rank_alone, init_parallel, world_size_from_environment
    from colonnade.parallel.vote import on_first_rank
    from colonnade.run_settings import RunSettings
    from run.parity import EXACT, Numerics, compare_sides

    if world_size_from_environment() == 1:
        raise UsageError("one rank has nothing to be compared with: start it as torchrun --nproc_per_node=2, or more")
    layout = init_parallel(given.get("tensor_parallel_size"), timeout=RunSettings(**given).startup_timeout)
    on_first_rank(lambda: require_place("--json", parity.json))
    alone = first_rank_alone(layout.device)
    subject = settle(parity, given, layout, alone)
    compared = list(dict.fromkeys([EXACT, Numerics.of(subject.settings)]))
    if layout.is_main:
        print(describe(subject, layout), flush=True)
    done: list[NumericsParity] = []
    for numerics in compared:
        done.append(
            compare_sides(
                subject,
                layout,
                alone,
                numerics,
                tolerance_of(parity, subject.settings, numerics),
                against=done[0] if done else None,
                keep=len(compared) > 1 and not done,
            )
        )
        if layout.is_main:
            print(table(done[-1], layout), flush=True)
    problem = on_first_rank(lambda: conclude(parity, subject, layout, done))
    if problem is not None:
        raise RunError(f"tp {layout.tp} x dp {layout.dp} is not the model of one rank: {problem}")


def tolerance_of(parity: ParitySettings, settings: RunSettings, numerics: Numerics) -> float:
    from run.parity import EXACT

    given = parity.tolerance if numerics == EXACT else parity.low_precision_tolerance
    if given is not None:
        return given
    if settings.deterministic:
        return 0.0
    return FP32_TOLERANCE if numerics == EXACT else LOW_PRECISION_TOLERANCE


# ---------------------------------------------------------------------------------------------- what is compared


def settle(parity: ParitySettings, given: Mapping[str, Any], layout: ParallelLayout, alone: ParallelLayout) -> Subject:
    """The run that is meant, settled as `training.py` settles it, and the blocks of its first steps. Collective."""
    import torch

    from colonnade.checkpoint.run_record import run_record
    from colonnade.checkpoint.verify import verified
    from colonnade.config import check_contradictions, override
    from colonnade.optim.idle_switches import idle_switches
    from colonnade.parallel.vote import on_first_rank, vote
    from colonnade.run_settings import RunSettings
    from run.data import resolve_data
    from run.folder import require_own_model
    from run.inputs import (
        check_sizes,
        model_of_record,
        resolve_device_settings,
        resolve_model,
        resolve_model_settings,
        with_preset,
    )
    from run.parity import EXACT, Numerics, Subject

    notes: list[str] = []
    found, record = None, {}
    if parity.checkpoint_path is not None:
        found, _ = verified(Path(parity.checkpoint_path))
    with vote():
        if found is not None:
            record = run_record(found)
        if found is not None and record:
            own = {**record["settings"], "tensor_parallel_size": None}
            require_own_model(found.path, own, given)
            settings = check_contradictions(RunSettings(**override(own, given)))
        else:
            settings = with_preset(given, layout, notes)
    settings = resolve_device_settings(settings, layout, notes)
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(
        lambda: model_of_record(found.path, record) if found is not None and record else resolve_model(settings)
    )
    settings = resolve_model_settings(settings, config)
    with vote():
        check_sizes(settings, config, layout)
        kept = 0 if Numerics.of(settings) == EXACT else parity.steps + 1
        require_memory_for_both(config, settings.optimizer, layout, kept)
        micro_batch, global_batch = batch_of(settings, layout)
    blocks = on_first_rank(lambda: read_blocks(settings, config, alone, parity.steps, global_batch, notes))
    notes += idle_switches(settings, layout.tp, layout.dp, micro_batch)
    if layout.is_main:
        print("\n".join(notes))
    path = None if found is None else found.path
    return Subject(settings, config, path, bool(record), micro_batch, torch.from_numpy(blocks))


def batch_of(settings: RunSettings, layout: ParallelLayout) -> tuple[int, int]:
    """Sequences of a micro-batch and of a step. Where the tuner would choose the micro-batch it is 1."""
    from colonnade.parallel.determinism import check_micro_batches
    from run.batch_sizes import check_shares, fixed_micro_batch, requested_global_batch

    fixed_micro_batch(settings, {})
    if settings.initial_batch_size == "auto":
        settings = settings.replace(initial_batch_size="1")
    micro_batch, global_batch = int(settings.initial_batch_size), requested_global_batch(settings, layout.dp)
    assert global_batch is not None
    check_shares(global_batch, layout.dp)
    if settings.deterministic:
        check_micro_batches(global_batch, micro_batch, layout.dp)
    # As the tuner does: the largest number up to the one given that shares out a rank's part of the step.
    share = global_batch // layout.dp
    return next(size for size in range(min(micro_batch, share), 0, -1) if share % size == 0), global_batch


def require_memory_for_both(config: ModelConfig, optimizer: str, layout: ParallelLayout, kept: int) -> None:
    """Refuse a model that the first rank cannot hold whole beside its share of it.

    Args:
        kept: copies of the whole model's size, 4 bytes a parameter, that stay in host memory for a second precision.

    Raises:
        UsageError: parameters, gradients and moments alone exceed the memory there is.
    """
    from colonnade.tuning.cost_model import ParallelConfig, state_memory
    from colonnade.tuning.memory import GIB
    from run.inputs import memory_here

    ranks, memory = memory_here(layout.device)
    whole, share = (sum(state_memory(config, ParallelConfig(tp=tp, optimizer=optimizer))) for tp in (1, layout.tp))
    needed = whole + ranks * share
    if layout.device.type == "cpu":
        needed += 4 * config.num_parameters * kept
    if needed > memory:
        raise UsageError(
            f"a model of {config.num_parameters:,} parameters takes {needed / GIB:.1f} GiB where the first rank is, "
            f"whole and cut over tp {layout.tp}, and there are {memory / GIB:.1f} GiB; compare one of the same sizes "
            "with fewer layers (--model-config), or on a machine with more memory"
        )


def read_blocks(
    settings: RunSettings,
    config: ModelConfig,
    alone: ParallelLayout,
    steps: int,
    global_batch: int,
    notes: list[str],
) -> Any:
    """The blocks of the run's first steps, int32 [steps, sequences, T + 1]; on the first rank."""
    import numpy as np

    from run.data import open_stream, run_tokenizer, settle_backend, stream_notes

    tokenizer = run_tokenizer(settings)
    backend = settle_backend(settings, tokenizer, {}, notes)
    stream, chunks = open_stream(settings, tokenizer, backend, config, alone, None, allow_change=False)
    try:
        notes += stream_notes(stream, None)
        rows = [next(chunks).tokens for _ in range(steps * global_batch)]
    finally:
        stream.close()
    return np.stack(rows).reshape(steps, global_batch, -1)


# -------------------------------------------------------------------------------------------------- what is said


def describe(subject: Subject, layout: ParallelLayout) -> str:
    from colonnade.optim.shard_limits import shard_count

    settings = subject.settings
    steps, sequences, width = subject.blocks.shape
    weights = subject.checkpoint or settings.init_from or f"seed {settings.seed}"
    shared = ""
    if shard_count(settings, layout.dp) > 1:
        replicas = settings.data_parallel_replicate_size
        shared = f" ({settings.data_parallel_shard}{f' in {replicas} replicas' if replicas > 1 else ''})"
    return (
        f"{subject.config.num_parameters:,} parameters of {weights}; {steps} steps of {sequences} sequences of "
        f"{width - 1} tokens; tp {layout.tp} x dp {layout.dp}{shared} against one rank on {layout.device.type}"
    )


def table(parity: NumericsParity, layout: ParallelLayout) -> str:
    """The comparison in the same numerics, for people."""
    ranks, numerics = f"tp {layout.tp}", parity.numerics
    # A multiple of what the numerics by themselves change, except where there is no other to measure that by.
    is_low = parity.parameters_rounding is not None
    unit = f" times what {numerics} differs from fp32 by on one rank" if is_low else ""
    lines = [
        f"\n{numerics}, tolerance {parity.tolerance:g}{unit}",
        f"{'step':>4}  {'loss alone':>10} {'loss ' + ranks:>10} {'differs':>8}  {'norm alone':>10} "
        f"{'norm ' + ranks:>10} {'differs':>8}  {'limit':>8} {'differs':>8} worst gradient",
    ]
    for step in parity.steps:
        gradient = "skipped on both sides" if step.gradient is None else _shown(step.gradient)
        lines.append(
            f"{step.step:>4}  {step.losses[0]:>10.6f} {step.losses[1]:>10.6f} {step.loss_difference:>8.1e}  "
            f"{step.norms[0]:>10.6f} {step.norms[1]:>10.6f} {step.norm_difference:>8.1e}  "
            f"{parity.limit(step.rounding):>8.1e} {gradient}"
        )
    if parity.parameters is not None:
        limit = parity.limit(parity.parameters_rounding)
        lines.append(f"parameters after step {parity.steps[-1].step}: limit {limit:.1e},{_shown(parity.parameters)}")
    return "\n".join(lines)


def _shown(difference: Difference) -> str:
    return f"{difference.value:>8.1e} {difference.name if difference.value else '(none differs)'}"


def conclude(
    parity: ParitySettings, subject: Subject, layout: ParallelLayout, done: list[NumericsParity]
) -> str | None:
    """Write --json, say that all is well, or return what is not. On the first rank."""
    problems = [f"{each.numerics}: {problem}" for each in done if (problem := each.problem()) is not None]
    if parity.json is not None:
        report = {
            "tensor_parallel_size": layout.tp,
            "data_parallel_size": layout.dp,
            "settings": subject.settings.to_dict(),
            "equal": not problems,
            "problems": problems,
            "precisions": [each.to_dict() for each in done],
        }
        write_text(parity.json, json.dumps(report, indent=1) + "\n", f"--json {parity.json}")
    if problems:
        return "; ".join(problems)
    bits = " to the bit" if all(each.tolerance == 0 for each in done) else ""
    precisions = " and ".join(str(each.numerics) for each in done)
    print(f"\nparity: tp {layout.tp} x dp {layout.dp} and one rank agree{bits} in {precisions}")
    return None


if __name__ == "__main__":
    launch(main)
