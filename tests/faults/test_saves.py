"""Saves and prunes that fail, on one rank or on all, and a second job in the folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import inject
from faults.conftest import STEPS
from faults.runs import assert_same_end
from forked_commands import begin, start


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name != "hangs")


@pytest.mark.parametrize(
    ("mode", "fault", "step"),
    [
        ("async", inject.rank_1_has_no_room_at_step_12, 12),
        ("sync", inject.rank_1_has_no_room_at_step_12, 12),
        ("async", inject.rank_1_has_no_room_at_the_end, STEPS),
    ],
)
def test_a_disk_that_is_full_for_one_rank_ends_the_run_and_loses_nothing(
    flags: list[str], undisturbed: Path, tmp_path: Path, mode: str, fault: Callable[[], None], step: int
) -> None:
    """Rank 1 may write no file as large as its shard from a step on: the save fails on all ranks, the last one too."""
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--checkpoint-mode", mode]
    outcomes = start("training", these, ranks=2, prepare=fault)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    (line,) = [line for line in outcomes[0].errors.splitlines() if "error" in line]
    assert f"checkpoint of step {step} was not saved" in line
    assert "rank 1: " in line
    assert "File too large" in line
    assert checkpoints(directory) == sorted(f"streaming_checkpoint_step_{done}" for done in range(6, step, 6))
    assert not (directory / "COMPLETE.json").exists()
    outcomes = start("training", these, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert_same_end(directory, undisturbed, STEPS, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_ends_the_run_with_its_checkpoints_whole(
    flags: list[str], undisturbed: Path, tmp_path: Path, small_disk: Path
) -> None:
    directory = small_disk / "run"
    outcomes = start("training", [*flags, "--checkpoint-dir", str(directory)], ranks=2)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    assert "No space left on device" in outcomes[0].errors
    saved = checkpoints(directory)
    assert saved[0].startswith("streaming_checkpoint_step_")
    assert not any(name.startswith(".tmp-") for name in saved)
    roomy = tmp_path / "roomy"
    shutil.copytree(directory, roomy)
    (outcome,) = start("training", [*flags, "--checkpoint-dir", str(roomy)])
    assert outcome.code == 0, outcome.errors
    assert_same_end(roomy, undisturbed, STEPS, tmp_path)


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_room_for_fingerprints_ends_a_run_only_where_an_audit_needs_them(
    flags: list[str], tmp_path: Path, deterministic: bool
) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--total-steps", "12"]
    if not deterministic:
        these.remove("--deterministic")
    (outcome,) = start("training", these, prepare=inject.no_room_for_fingerprints)
    message = f"cannot write metrics to {directory}/fingerprints.jsonl: No space left on device"
    assert outcome.code == int(deterministic)
    assert "Traceback" not in outcome.errors
    if deterministic:
        assert message in outcome.errors
    else:
        assert outcome.output.count(f"warning: {message}; the run goes on without it") == 1
        assert (directory / "COMPLETE.json").exists()


def test_a_prune_that_fails_is_a_warning(flags: list[str], undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--keep-checkpoints", "1"]
    (outcome,) = start("training", these, prepare=inject.nothing_can_be_pruned)
    assert outcome.code == 0, outcome.errors
    assert "streaming_checkpoint_step_6 was not pruned: [Errno 13] Permission denied" in outcome.errors
    assert len(checkpoints(directory)) == 4
    assert_same_end(directory, undisturbed, STEPS, tmp_path)


def test_a_full_disk_is_pruned_before_the_ledger_whose_failure_is_a_warning(
    flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--keep-checkpoints", "2"]
    (outcome,) = start("training", these, prepare=inject.room_for_a_ledger_beside_two_checkpoints)
    assert outcome.code == 0, outcome.errors
    assert outcome.errors.count(f"{directory / 'data_ledger.json'} cannot be written: No space left on device") == 1
    assert checkpoints(directory) == ["streaming_checkpoint_step_18", "streaming_checkpoint_step_24"]
    assert (directory / "data_ledger.json").read_text() == (undisturbed / "data_ledger.json").read_text()


def test_a_second_job_in_the_folder_is_refused_and_a_dead_one_is_not_waited_for(
    flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    first = begin("training", these, prepare=inject.step_9_for_ever)
    first.until(r"step +8/")
    for script, second in (
        ("training", these),
        ("resume_pretrain_tensor", ["--checkpoint-path", str(directory), "--total-steps", "30"]),
    ):
        (outcome,) = start(script, second)
        assert outcome.code == 2
        assert f"is in use by process {first.processes[0].pid} on host {os.uname().nodename}" in outcome.errors
    first.signal(signal.SIGKILL)
    first.finish()
    (outcome,) = start("training", these)
    assert outcome.code == 0, outcome.errors
    assert_same_end(directory, undisturbed, STEPS, tmp_path)
