"""SIGKILL at random moments of a run that saves all the time: nothing is lost, and the end is the undisturbed one."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from distributed.launching import losses
from faults.conftest import STEPS
from faults.runs import assert_same_end
from forked_commands import begin


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(
    flags: list[str], undisturbed: Path, tmp_path: Path, kills: int
) -> None:
    """One rank or both, while reading, in a step, in a save or in pruning; the same command goes on each time."""
    dice = random.Random(kills)
    number = done = 0
    while done < kills:
        directory = tmp_path / str(number)
        these = [*flags, "--checkpoint-dir", str(directory), "--checkpoint-interval", "1", "--keep-checkpoints", "2"]
        is_complete = False
        while not is_complete:
            running = begin("training", these, ranks=2)
            if done < kills:
                _wait_for_a_new_step(directory)
                time.sleep(dice.uniform(0.0, 0.4))
                if all(process.is_alive() for process in running.processes.values()):
                    running.signal(signal.SIGKILL, *dice.choice([(0,), (1,), (0, 1)]))
                    done += 1
            outcomes = running.finish()
            assert all(outcome.code in (0, 1, -signal.SIGKILL) for outcome in outcomes), outcomes
            is_complete = all(outcome.code == 0 for outcome in outcomes)
        assert (directory / "COMPLETE.json").exists()
        assert_same_end(directory, undisturbed, STEPS, tmp_path)
        # Neither a save nor a prune that was cut off leaves anything behind.
        names = {path.name for path in directory.iterdir() if not path.is_file()}
        assert names <= {f"streaming_checkpoint_step_{step}" for step in (STEPS - 1, STEPS)} | {"hangs"}
        number += 1


def _wait_for_a_new_step(directory: Path) -> None:
    metrics = directory / "metrics.jsonl"
    before = max(losses(directory), default=0) if metrics.exists() else 0
    deadline = time.monotonic() + 60
    while not metrics.exists() or max(losses(directory), default=0) == before:
        if (directory / "COMPLETE.json").exists():
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)
