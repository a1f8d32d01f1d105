"""Start a pretraining run, or resume one where it stopped.

    torchrun --nproc_per_node=8 training.py --tokenizer-path TOKENIZER --data-glob 'data/*.parquet'
    python training.py --preset tiny

1. Read the settings: defaults, preset, --config, flags.
2. Prepare the run: ranks, data, model, micro-batch; fresh state, or that of the run's newest checkpoint.
3. Train: `training_utils.train` is the loop.
"""

from __future__ import annotations

from colonnade.flags import parse_training
from colonnade.runtime.launch import launch


def main(arguments: list[str] | None = None) -> None:
    given = parse_training(arguments)
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from run.start import start_run
    from training_utils import train

    run = start_run(given)
    if run is not None:
        train(run)


if __name__ == "__main__":
    launch(main)
