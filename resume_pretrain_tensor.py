"""Resume a pretraining run from a checkpoint with changed settings, on any number of ranks.

    torchrun --nproc_per_node=8 resume_pretrain_tensor.py --checkpoint-path pretrained --rewarmup-steps 100
    torchrun --nproc_per_node=2 resume_pretrain_tensor.py --checkpoint-path pretrained --keep-optimizer

1. Read the given settings; all others are the run's own, from the checkpoint.
2. Restore weights and data position. Reset the optimizer and warm up the learning rate again, or, with
   --keep-optimizer, restore the optimizer state too.
3. Train: `training_utils.train` is the loop.
"""

from __future__ import annotations

from colonnade.flags import parse_resume
from colonnade.runtime.launch import launch


def main(arguments: list[str] | None = None) -> None:
    resume, given = parse_resume(arguments)
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from run.start import resume_run
    from training_utils import train

    run = resume_run(resume, given)
    if run is not None:
        train(run)


if __name__ == "__main__":
    launch(main)
