"""Ranks that do not come, at the start or in a step: they are named, and nobody waits for them for ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from colonnade.command_settings import ResumeSettings
from colonnade.parallel.mesh import record_collectives
from colonnade.runtime.watchdog import Watchdog, is_connection_lost
from faults import inject
from forked_commands import begin, start
from run.folder import folder_of_resumed


def test_a_rank_that_never_joins_is_named(flags: list[str], tmp_path: Path) -> None:
    these = [*flags, "--checkpoint-dir", str(tmp_path / "run"), "--startup-timeout", "2"]
    outcomes = begin("training", these, ranks=3, present=[0, 2]).finish()
    assert [outcome.code for outcome in outcomes] == [1, 1]
    said = [line for outcome in outcomes for line in outcome.errors.splitlines() if line.startswith("training.py")]
    assert len(said) == 1
    assert said[0].startswith("training.py: error: rank 0: 1 of 3 ranks did not join within 2 s: rank 1; ")
    assert not (tmp_path / "run").exists()


def test_a_rendezvous_that_is_not_there_is_named(flags: list[str], tmp_path: Path) -> None:
    these = [*flags, "--checkpoint-dir", str(tmp_path / "run"), "--startup-timeout", "2"]
    (outcome,) = begin("training", these, ranks=2, present=[1]).finish()
    assert outcome.code == 1
    last = outcome.errors.splitlines()[-1]
    assert last.startswith("training.py: error: rank 1: the rendezvous at localhost:")
    assert "could not be reached within 2 s" in last


def test_a_rank_that_hangs_is_named_and_every_rank_writes_its_stacks(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--step-timeout", "2"]
    outcomes = start("training", these, ranks=2, prepare=inject.rank_1_reads_for_ever)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    said = [line for outcome in outcomes for line in outcome.errors.splitlines() if "error:" in line]
    assert len(said) == 1
    assert "took longer than 2 s: rank 1 is behind, in reading the data of step 5 since" in said[0]
    assert "; rank 0 is in step 5 since" in said[0]
    assert f"stacks: {directory}/hangs/rank_*.txt" in said[0]
    stacks = [(directory / "hangs" / f"rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert "in train_step" in stacks[0]
    assert "in hanging" in stacks[1]


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        (
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            True,
        ),
        ("NCCL communicator was aborted on rank 3.", True),
        ("ncclSystemError: System call failed.\nLast error:\nsocketProgress: Connection closed by remote peer", True),
        ("ncclSystemError: System call failed.\nLast error:\nError while creating shared memory segment", False),
        ("ncclSystemError: System call failed.\nLast error:\nconnect to 10.0.0.2 returned Connection refused", False),
        (
            "ncclSystemError: System call failed.\nLast error:\nibv_modify_qp failed with 110 Connection timed out",
            False,
        ),
        ("ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'", False),
        ("ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", False),
    ],
)
def test_an_error_of_nccl_is_not_always_that_of_a_peer(said: str, is_lost: bool) -> None:
    """A rank whose peer is gone exits silently, and nobody else would tell of the other errors."""
    assert is_connection_lost(dist.DistBackendError(f"NCCL error in: ProcessGroupNCCL.cpp:94, {said}")) is is_lost
    assert is_connection_lost(dist.DistNetworkError("failed to recv, got 0 bytes"))


def test_nccl_records_into_the_folder_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What torch reads from the environment when a group is made; the user's own values are left."""
    for name in list(os.environ):
        if name.startswith(("TORCH_FR_", "TORCH_NCCL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    record_collectives(tmp_path / "hangs")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        assert os.environ[name] == str(tmp_path / "hangs" / "nccl_trace_rank_")


@pytest.mark.usefixtures("single_rank")
def test_the_folder_it_records_into_is_there_while_a_gpu_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "hangs"
    with Watchdog(folder, on_cuda=True):
        assert folder.is_dir()
    assert not folder.exists()
    with Watchdog(folder, on_cuda=True):
        (folder / "nccl_trace_rank_0").touch()
    assert os.listdir(folder) == ["nccl_trace_rank_0"]


@pytest.mark.parametrize(
    ("path", "checkpoint_dir", "expected"),
    [
        ("runs/a", None, "runs/a"),
        ("runs/a/streaming_checkpoint_step_4", None, "runs/a"),
        ("runs/a/weights.pth", None, "runs/a"),
        ("runs/a/base", None, "runs/a"),
        ("runs/a/base/.", None, "runs/a"),
        ("runs/a", "runs/b", "runs/b"),
    ],
)
def test_the_folder_of_a_resumed_run(
    path: str, checkpoint_dir: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a/base").mkdir(parents=True)
    Path("runs/a/base/MANIFEST.json").touch()
    Path("runs/a/weights.pth").touch()
    assert folder_of_resumed(ResumeSettings(checkpoint_path=path), checkpoint_dir) == Path(expected)


@pytest.mark.parametrize("name", ["base", "streaming_checkpoint_step_4"])
def test_the_folder_of_a_run_resumed_from_inside_its_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "run" / name / "deeper"
    inside.mkdir(parents=True)
    (inside.parent / "MANIFEST.json").touch()
    for where, path in ((inside.parent, "."), (inside.parent, "./"), (inside, "..")):
        monkeypatch.chdir(where)
        assert folder_of_resumed(ResumeSettings(checkpoint_path=path), None) == tmp_path / "run"
