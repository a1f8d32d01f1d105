"""Start a pretraining run, or go on with one where it stopped.

    torchrun --nproc_per_node=8 training.py --tokenizer-path TOKENIZER --data-glob 'data/*.parquet'
    python training.py --preset tiny

1. Read the settings: defaults, preset, --config, flags.
2. Prepare the run: ranks, data, model, micro-batch; a fresh state, or the newest checkpoint of the same run.
3. Train: `training_utils.train` is the loop.
"""

from __future__ import annotations

from colonnade.flags import parse_training
from colonnade.parallel.launch import launch


def main(arguments: list[str] | None = None) -> None:
    given = parse_training(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from run.start import start_run
    from training_utils import train

    run = start_run(given)
    if run is not None:
        train(run)


if __name__ == "__main__":
    launch(main)
