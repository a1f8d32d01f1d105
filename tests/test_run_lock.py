"""One job at a time in a run's folder, and nothing left of a lock whose job is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from colonnade.checkpoint import run_lock
from colonnade.checkpoint.run_lock import RunLock
from colonnade.errors import UsageError
from run.folder import clear_leftovers

HOLDER = """
import sys
from pathlib import Path
from colonnade.checkpoint.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take(create=True)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 0.2)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the folder `run`, until its input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_job_is_refused_by_name(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    with pytest.raises(UsageError) as caught:
        lock.take()
    assert str(caught.value) == (
        f"--checkpoint-dir {tmp_path / 'run'} is in use by process {holder.pid} on host {socket.gethostname()}; "
        "wait for that job, end it, or give another folder"
    )
    assert not lock.is_held
    # Its owner is not told wrong by who was refused.
    assert json.loads((tmp_path / "run" / "run.owner.json").read_text())["pid"] == holder.pid
    (tmp_path / "run" / "run.owner.json").write_text("{")
    with pytest.raises(UsageError, match="is in use by another job; wait"):
        lock.take()


def test_a_killed_owner_leaves_the_folder_free(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert sorted(os.listdir(tmp_path / "run")) == ["run.lock", "run.owner.json"]
    lock = RunLock(tmp_path / "run")
    lock.take()
    assert lock.is_held
    assert json.loads((tmp_path / "run" / "run.owner.json").read_text())["pid"] == os.getpid()
    lock.release()
    assert os.listdir(tmp_path / "run") == []


def test_an_orderly_end_leaves_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.communicate()
    assert holder.returncode == 0
    assert not (tmp_path / "run").exists()  # it was made by the holder and held nothing


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "a" / "run")
    lock.take()
    assert not lock.is_held
    assert os.listdir(tmp_path) == []
    lock.take(create=True)
    assert lock.is_held
    (lock.directory / "metrics.jsonl").write_text("")
    lock.release()
    assert os.listdir(lock.directory) == ["metrics.jsonl"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    leftover = tmp_path / ".tmp-streaming_checkpoint_step_4-00000000"
    leftover.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    lock = RunLock(tmp_path)
    lock.take()
    lock.take(create=True)
    assert not lock.is_held
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [f"{tmp_path} is on a file system without locks: nothing keeps a second job out of it"]
    # Whose they are cannot be known: they stay.
    assert not clear_leftovers(lock)
    assert os.listdir(tmp_path) == [leftover.name]
    lock.release()


def test_leftovers_go_under_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".tmp-streaming_checkpoint_step_4-00000000").mkdir()
    lock = RunLock(tmp_path)
    assert not clear_leftovers(lock)
    assert os.listdir(tmp_path) == [".tmp-streaming_checkpoint_step_4-00000000"]
    lock.take()
    assert not clear_leftovers(lock)  # no checkpoint came to light
    lock.release()
    assert os.listdir(tmp_path) == []
