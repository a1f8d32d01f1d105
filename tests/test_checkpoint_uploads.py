"""Checkpoints on their way to a store and back: order, pruning, dropping, failures; the client's artifact calls."""

from __future__ import annotations

import dataclasses
import hashlib
import queue
import threading
from pathlib import Path

import pytest

from colonnade.checkpoint import remote_artifacts
from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.manifest import read_manifest, write_manifest
from colonnade.checkpoint.prune import prune_checkpoints
from colonnade.checkpoint.remote_artifacts import upload_checkpoint
from colonnade.checkpoint.retention import Retention
from colonnade.checkpoint.uploads import MOST_WAITING, CheckpointUploads, StoreClosed, uploaded
from colonnade.checkpoint.verify import verified
from colonnade.errors import UsageError
from test_checkpoint_discover import make
from wandb_records import Store

STORE = {"project": "demo", "entity": None}
pytestmark = pytest.mark.usefixtures("single_rank")


class Gate:
    """A store that confirms what it is told to: `let(outcome)` lets one upload end."""

    def __init__(self) -> None:
        self.began: queue.Queue[Path] = queue.Queue()
        self._outcomes: queue.Queue[Exception | None] = queue.Queue()

    def upload(self, path: Path) -> str:
        assert path.is_dir()
        self.began.put(path)
        outcome = self._outcomes.get(timeout=30)
        if outcome is not None:
            raise outcome
        assert path.is_dir()
        return f"remote/{path.name}"

    def let(self, outcome: Exception | None = None) -> Path:
        path = self.began.get(timeout=30)
        self._outcomes.put(outcome)
        return path


def local(directory: Path) -> list[int]:
    return sorted(info.step or 0 for info in find_checkpoints(directory))


def test_what_waits_is_not_pruned_and_goes_in_order(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    uploads = CheckpointUploads(Retention(tmp_path), gate.upload, store=STORE, say=said.append)
    made = [make(tmp_path, step) for step in (1, 2, 3)]
    for path in made:
        uploads.add(path)
    prune_checkpoints(tmp_path, 1, protect=(made[-1], *uploads.pending))
    assert local(tmp_path) == [1, 2, 3]
    assert [gate.let(), gate.let()] == made[:2]
    assert gate.began.get(timeout=30) == made[2]
    prune_checkpoints(tmp_path, 1, protect=(made[-1], *uploads.pending))
    assert local(tmp_path) == [3]
    gate.began.put(made[2])
    gate.let()
    uploads.close(30)
    assert uploaded(tmp_path, STORE) == {path.name: f"remote/{path.name}" for path in made}
    assert uploads.pending == ()


def test_a_local_copy_goes_once_it_is_confirmed_and_never_the_newest(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    uploads = CheckpointUploads(Retention(tmp_path, keep_every=4), gate.upload, store=STORE, say=said.append, drop=True)
    made = [make(tmp_path, step) for step in (2, 4, 5, 6, 7)]
    for path in made[:4]:
        uploads.add(path)
    gate.let()
    gate.let()
    gate.let(ValueError("the store\nrefused it"))
    assert gate.began.get(timeout=30) == made[3]
    assert local(tmp_path) == [4, 5, 6, 7]  # 2 is gone, 4 is kept for good, 5 is only here
    gate.began.put(made[3])
    gate.let()
    uploads.add(made[4])
    gate.let()
    uploads.close(30)
    assert local(tmp_path) == [4, 5, 7]
    (warning,) = [line for line in said if line.startswith("warning")]
    assert f"{made[2].name} is not uploaded (ValueError: the store refused it); the local copy stays" in warning
    assert made[2].name not in uploaded(tmp_path, STORE)


def test_what_the_run_has_gone_back_to_is_not_dropped_for_a_newer_damaged_one(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    older, start, damaged = (make(tmp_path, step) for step in (1, 2, 3))  # by its sizes, 3 is whole
    retention = Retention(tmp_path, damaged=[tmp_path / "." / damaged.name], resumed_from=start)
    uploads = CheckpointUploads(retention, gate.upload, store=STORE, say=said.append, drop=True)
    uploads.resend(step=2)
    assert [gate.let(), gate.let()] == [older, start]
    uploads.close(30)
    assert local(tmp_path) == [2, 3]
    # Step 3 is trained and saved again: now its checkpoint is the newest.
    retention.committed(damaged)
    uploads = CheckpointUploads(retention, gate.upload, store=STORE, say=said.append, drop=True)
    uploads.add(damaged)
    gate.let()
    uploads.close(30)
    assert local(tmp_path) == [3]


def test_until_its_first_save_a_start_keeps_what_it_resumed_from(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    start, newer = (make(tmp_path, step) for step in (2, 3))
    retention = Retention(tmp_path, keep=1, resumed_from=start)
    uploads = CheckpointUploads(retention, gate.upload, store=STORE, say=said.append, drop=True)
    uploads.resend(step=2)
    gate.let()
    uploads.close(30)
    assert retention.prune() == []
    assert local(tmp_path) == [2, 3]
    retention.committed(newer)
    assert retention.prune() == [start]


@pytest.mark.parametrize("change", [{"project": "another"}, {"entity": "me"}])
def test_what_another_store_has_confirmed_is_uploaded_to_this_one(tmp_path: Path, change: dict[str, str]) -> None:
    gate, said = Gate(), list[str]()
    made = [make(tmp_path, step) for step in (1, 2)]
    first = CheckpointUploads(Retention(tmp_path), gate.upload, store=STORE, say=said.append)
    first.resend(2)
    assert [gate.let(), gate.let()] == made
    first.close(30)
    another = CheckpointUploads(Retention(tmp_path), gate.upload, store={**STORE, **change}, say=said.append, drop=True)
    another.resend(2)
    gate.let(ValueError("no room"))
    gate.let()
    another.close(30)
    assert local(tmp_path) == [1, 2]  # 1 is in the first store alone
    assert uploaded(tmp_path, STORE) == {}
    assert uploaded(tmp_path, {**STORE, **change}).keys() == {made[1].name}


def test_a_step_saved_once_more_is_not_taken_for_what_was_uploaded_of_it(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    uploads = CheckpointUploads(Retention(tmp_path), gate.upload, store=STORE, say=said.append, drop=True)
    twice = make(tmp_path, 2)
    uploads.add(twice)
    gate.let()
    uploads.add(twice)
    gate.let(ValueError("no room"))
    uploads.add(make(tmp_path, 3))
    later = gate.let()
    uploads.close(30)
    assert local(tmp_path) == [2, 3]
    assert uploaded(tmp_path, STORE).keys() == {later.name}


def test_the_next_start_sends_what_the_last_one_has_not(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    made = [make(tmp_path, step) for step in (1, 2, 3, 9)]
    first = CheckpointUploads(Retention(tmp_path), gate.upload, store=STORE, say=said.append)
    first.add(made[0])
    gate.let()
    first.add(made[1])
    assert gate.began.get(timeout=30) == made[1]
    first.close(0.0)
    assert f"not uploaded in time: {made[1].name}" in said[-1]
    again = Gate()
    second = CheckpointUploads(Retention(tmp_path), again.upload, store=STORE, say=said.append)
    second.resend(step=3)  # 9 is of a future that this start computes again
    assert [again.let(), again.let()] == made[1:3]
    second.close(30)
    assert uploaded(tmp_path, STORE).keys() == {path.name for path in made[:3]}


def test_a_store_that_hangs_holds_few_checkpoints(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    uploads = CheckpointUploads(Retention(tmp_path), gate.upload, store=STORE, say=said.append)
    made = [make(tmp_path, step) for step in range(1, MOST_WAITING + 4)]
    uploads.add(made[0])
    assert gate.began.get(timeout=30) == made[0]
    for path in made[1:]:
        uploads.add(path)
    assert uploads.pending == (made[0], *made[-MOST_WAITING:])
    assert [line.split()[1] for line in said] == [path.name for path in made[1:-MOST_WAITING]]


def test_a_store_that_is_closed_is_told_once(tmp_path: Path) -> None:
    told = threading.Event()
    said: list[str] = []

    def closed(path: Path) -> str:
        told.wait(30)
        raise StoreClosed("it is offline")

    uploads = CheckpointUploads(Retention(tmp_path), closed, store=STORE, say=said.append)
    for step in (1, 2):
        uploads.add(make(tmp_path, step))
    told.set()
    uploads.close(30)
    uploads.add(make(tmp_path, 3))
    assert uploads.pending == ()
    assert [line for line in said if line.startswith("warning")] == [
        "warning: checkpoints are not uploaded (it is offline)"
    ]


# The client's artifacts ----------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    import wandb

    found = Store(tmp_path / "store")
    monkeypatch.setattr(wandb, "Api", lambda: found.api)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_checkpoint_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    made = [make(tmp_path / "run", step) for step in (4, 8)]
    names = [upload_checkpoint(store.run, path) for path in made]
    assert names == ["me/demo/checkpoint-1a2b3c4d:v0", "me/demo/checkpoint-1a2b3c4d:v1"]
    assert store.logged[1]["metadata"] == {
        "step": 8,
        "folder": made[1].name,
        "loss": 1.5,
        "tokens_seen": None,
        "began_at": None,
    }
    assert store.logged[1]["aliases"] == ["latest", "step-8", "v1"]
    found, _ = verified(Path("wandb:me/demo/checkpoint-1a2b3c4d:step-4"))
    assert found.step == 4
    assert found.path == Path("artifacts/me/demo/checkpoint-1a2b3c4d/v0/streaming_checkpoint_step_4")
    for path in made[0].iterdir():
        assert (found.path / path.name).read_bytes() == path.read_bytes()
    (found.path / "mark").touch()  # a second start does not fetch it again
    assert verified(Path("wandb:me/demo/checkpoint-1a2b3c4d:v0"))[0].path == found.path
    assert (found.path / "mark").exists()
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]


def test_a_damaged_download_is_refused(store: Store, tmp_path: Path) -> None:
    upload_checkpoint(store.run, make(tmp_path / "run", 4))
    (tmp_path / "store" / "v0" / "__0_0.distcp").write_bytes(b"x" * 99)
    with pytest.raises(UsageError, match="has 99 bytes, its manifest says 100"):
        verified(Path("wandb:me/demo/checkpoint-1a2b3c4d:latest"))
    (tmp_path / "store" / "v0" / "__0_0.distcp").write_bytes(b"x" * 100)
    assert verified(Path("wandb:me/demo/checkpoint-1a2b3c4d:latest"))[0].step == 4  # fetched again


def test_a_download_damaged_since_is_fetched_again(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(tmp_path / "run", 4)
    shard = made / "__0_0.distcp"
    hashes = {name: hashlib.sha256((made / name).read_bytes()).hexdigest() for name in (".metadata", shard.name)}
    manifest = read_manifest(made)
    (made / "MANIFEST.json").unlink()
    write_manifest(made, dataclasses.replace(manifest, sha256=hashes))
    upload_checkpoint(store.run, made)
    name = Path("wandb:me/demo/checkpoint-1a2b3c4d:v0")
    there = verified(name)[0].path
    (there / shard.name).write_bytes(b"y" * 100)
    assert verified(name)[0].path == there
    assert (there / shard.name).read_bytes() == shard.read_bytes()
    (message,) = caplog.messages
    assert f"{there} is damaged: __0_0.distcp has SHA-256" in message
    assert message.endswith("; it is downloaded again")
    # The store's own copy is damaged: no start can be helped by another download.
    (tmp_path / "store" / "v0" / shard.name).write_bytes(b"z" * 100)
    (there / shard.name).write_bytes(b"y" * 100)
    with pytest.raises(UsageError, match="as it was downloaded: give another version than wandb:me/demo/"):
        verified(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandb:checkpoint", "names no artifact: wandb:ENTITY/PROJECT/NAME:VERSION"),
        ("wandb:me/demo/checkpoint", "names no artifact"),
        ("wandb:me/demo/../x:v0", "names no artifact"),
        ("wandb:me/../checkpoint:v0", "names no artifact"),
        ("wandb:me/demo/checkpoint-1a2b3c4d:v7", "cannot be fetched .*not found"),
        ("wandb:me/demo/no-checkpoint:v0", "the artifact holds no checkpoint"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(store: Store, tmp_path: Path, name: str, said: str) -> None:
    import wandb

    artifact = wandb.Artifact("no-checkpoint", "model")
    (tmp_path / "readme").write_text("")
    artifact.add_file(str(tmp_path / "readme"))
    store.run.log_artifact(artifact, aliases=["latest"]).wait()
    with pytest.raises(UsageError, match=said) as refused:
        verified(Path(name))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "artifacts").rglob("streaming*"))


def test_without_the_client_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_artifacts, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'colonnade\[wandb\]'"):
        verified(Path("wandb:me/demo/checkpoint:v0"))
