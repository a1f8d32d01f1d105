"""What `check_parity.py` prints and writes."""

from __future__ import annotations

import json

from colonnade.command_settings import ParitySettings
from colonnade.files import write_text
from colonnade.optim.shard_limits import shard_count
from colonnade.parallel.mesh import ParallelLayout
from colonnade.telemetry.differences import Difference
from run.parity import NumericsParity, Subject


def describe(subject: Subject, layout: ParallelLayout) -> str:
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
    """The comparison in one kind of numerics, as a text table."""
    ranks, numerics = f"tp {layout.tp}", parity.numerics
    # Below fp32 the tolerance is a multiple of the numerics' own effect, unless that could not be measured.
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
    """Write --json; print that the sides agree, or return the problems. Call it on the first rank."""
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
