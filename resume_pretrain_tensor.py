"""Go on with a pretraining run from a checkpoint, at any number of ranks.

    torchrun --nproc_per_node=8 resume_pretrain_tensor.py --checkpoint-path pretrained --rewarmup-steps 100
    torchrun --nproc_per_node=2 resume_pretrain_tensor.py --checkpoint-path pretrained --keep-optimizer

1. Read the settings that were given; the others are the run's own, from the checkpoint.
2. Restore the run: weights and data position; the optimizer afresh with its learning rate warmed up again, or exactly.
3. Train: `training_utils.train` is the loop.
"""

from __future__ import annotations

from colonnade.flags import parse_resume
from colonnade.parallel.launch import launch


def main(arguments: list[str] | None = None) -> None:
    resume, given = parse_resume(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from run.start import resume_run
    from training_utils import train

    run = resume_run(resume, given)
    if run is not None:
        train(run)


if __name__ == "__main__":
    launch(main)
