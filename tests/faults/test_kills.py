"""SIGKILL at random moments of a run that saves all the time: nothing is lost, and the end is the undisturbed one."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.launching import losses
from faults import inject
from faults.conftest import STEPS
from faults.runs import assert_same_end
from forked_commands import PATIENCE, begin, start


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
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or max(losses(directory), default=0) == before:
        if (directory / "COMPLETE.json").exists():
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "killed", "left"),
    [
        (inject.dies_in_the_middle_of_a_shard, 1, [6]),
        (inject.dies_before_the_metadata, 0, [6]),
        (inject.dies_before_the_manifest, 0, [6]),
        (inject.dies_before_the_rename, 0, [6]),
        (inject.dies_in_the_middle_of_a_prune, 0, [12]),
    ],
)
def test_a_kill_inside_a_save_or_a_prune(
    flags: list[str],
    undisturbed: Path,
    tmp_path: Path,
    fault: Callable[[], None],
    killed: int,
    left: list[int],
) -> None:
    """What is left is whole, the unfinished is told from it by its name, and the same command goes on."""
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--keep-checkpoints", "1"]
    outcomes = start("training", these, ranks=2, prepare=fault)
    assert outcomes[killed].code == -signal.SIGKILL
    assert outcomes[1 - killed].code == 1
    names = sorted(path.name for path in directory.iterdir() if path.is_dir())
    assert [name for name in names if name.startswith("streaming_")] == [f"streaming_checkpoint_step_{n}" for n in left]
    # The rank that is left may have removed it.
    assert sum(name.startswith((".tmp-", ".trash-")) for name in names) <= 1
    outcomes = start("training", these, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert_same_end(directory, undisturbed, STEPS, tmp_path)
    names = sorted(path.name for path in directory.iterdir() if path.is_dir())
    assert names == [f"streaming_checkpoint_step_{STEPS}"]
