"""Compare the first steps of your own run on all ranks (tp k) with the same steps on one rank.

    torchrun --nproc_per_node=2 check_parity.py --model-config config.json --tokenizer-path TOKENIZER \
      --data-glob 'data/*.parquet' --precision bf16

1. Resolve the settings as `training.py` does, and read the blocks of the first steps.
2. Train these steps on all ranks, and also on the first rank alone, from the same weights on the same blocks:
   in fp32, and in the run's own precision, with --float8 if it is given.
3. Compare loss, gradient norm and every parameter's gradient in each step, and the parameters after the last step.

The exit code is 0 if everything is within the tolerance, 1 if something is not, and 2 if nothing could be compared.
Only the --json file is written (`docs/parity.md`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colonnade.command_settings import ParitySettings
from colonnade.errors import RunError, UsageError
from colonnade.files import require_place
from colonnade.flags import parse_parity
from colonnade.run_settings import RunSettings
from colonnade.runtime.launch import launch

if TYPE_CHECKING:
    from run.parity import Numerics, NumericsParity

# How these were measured: `docs/parity.md`.
FP32_TOLERANCE = 1e-4
LOW_PRECISION_TOLERANCE = 2.0


def main(arguments: list[str] | None = None) -> None:
    parity, given = parse_parity(arguments)
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from colonnade.parallel.mesh import first_rank_alone, init_parallel, world_size_from_environment
    from colonnade.runtime.vote import on_first_rank
    from run.parity import EXACT, Numerics, compare_sides
    from run.parity_report import conclude, describe, table
    from run.parity_subject import settle

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


if __name__ == "__main__":
    launch(main)
