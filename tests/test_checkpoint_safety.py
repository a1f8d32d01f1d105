"""What a save makes durable and when, and what a load refuses. One rank."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from checkpoint_reference import adamw, assert_same_run, cut_model, local, mesh, train, values
from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.manifest import read_manifest, write_manifest
from colonnade.checkpoint.save import CommittingWriter, save_checkpoint
from colonnade.checkpoint.verify import verified
from colonnade.errors import RunError, UsageError


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the reference run after step 3."""
    return save_run(tmp_path, 3)


def save_run(directory: Path, last: int, seed: int = 0) -> Path:
    model = cut_model(values(seed), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    train(parameters, optimizer, 1, last)
    return save_checkpoint(directory, last, model=model, optimizer=optimizer, manifest={"loss": 2.5, "rng": [1, 2]})


def fresh() -> tuple[nn.Module, torch.optim.AdamW]:
    model = cut_model(values(7), mesh())
    return model, adamw(dict(model.named_parameters()))


def seal(folder: Path) -> None:
    """Bring the manifest in line with the files as they are now, as whoever altered them on purpose would."""
    manifest = read_manifest(folder)
    (folder / "MANIFEST.json").unlink()
    files = sorted(folder.iterdir())
    sizes = {path.name: path.stat().st_size for path in files}
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    write_manifest(folder, replace(manifest, files=sizes, sha256=sha256))


# ------------------------------------------------------------------------------------------------ saving


def test_everything_is_durable_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int, int]] = []  # what, inode, size at that time
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        status = os.fstat(descriptor)
        events.append(("fsync", status.st_ino, status.st_size))

    def rename(source: Any, target: Any) -> None:
        events.append(("rename", Path(source).stat().st_ino, 0))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    # One parameter: DCP leaves a .metadata this small in the stream's buffer when it calls fsync.
    model = cut_model({"model.norm.weight": torch.ones(4)}, mesh())
    folder = save_checkpoint(tmp_path / "run", 3, model=model, optimizer=None, manifest={})
    commit = events.index(("rename", folder.stat().st_ino, 0))
    synced = events[:commit]
    for path in folder.iterdir():
        assert ("fsync", path.stat().st_ino, path.stat().st_size) in synced, path.name
    assert any(inode == folder.stat().st_ino for what, inode, _ in synced if what == "fsync")
    assert any(inode == folder.parent.stat().st_ino for what, inode, _ in events[commit:] if what == "fsync")


def test_the_manifest_says_what_is_there(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest.step == 3
    assert manifest.optimizer == "AdamW"
    assert manifest.run == {"loss": 2.5, "rng": [1, 2]}
    # A build for CUDA tells its "+cu130" only when it is asked itself.
    assert manifest.libraries["torch"].split("+")[0] == torch.__version__.split("+")[0]
    written = {path.name: path.read_bytes() for path in saved.iterdir() if path.name != "MANIFEST.json"}
    assert manifest.files == {name: len(content) for name, content in written.items()}
    assert manifest.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
    assert str(saved.parent).encode() not in (saved / ".metadata").read_bytes()


def test_saving_a_step_again_replaces_it(saved: Path) -> None:
    assert save_run(saved.parent, 3, seed=1) == saved
    assert os.listdir(saved.parent) == [saved.name]
    model, optimizer = fresh()
    load_model_and_optimizer(saved, model=model, optimizer=optimizer)
    assert_same_run(model, optimizer, 3, seed=1)


def test_shards_on_a_disk_of_their_own_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_finish = dcp.FileSystemWriter.finish

    def finish(self: CommittingWriter, *args: Any, **kwargs: Any) -> None:
        real_finish(self, *args, **kwargs)
        (self.temporary / "__0_0.distcp").unlink()

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", finish)
    with pytest.raises(RunError, match=r"__0_0.distcp, written by rank 0, .* must be on a file system all ranks share"):
        save_run(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("a"), {1, 2}])
def test_what_json_cannot_hold_is_refused_before_writing(tmp_path: Path, value: Any) -> None:
    with pytest.raises(RunError, match="the manifest is not JSON"):
        save_checkpoint(tmp_path, 1, model=fresh()[0], optimizer=None, manifest={"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_state_a_checkpoint_would_lose_is_refused(tmp_path: Path) -> None:
    model, optimizer = fresh()
    model.register_buffer("count", torch.zeros(1))
    with pytest.raises(RunError, match="buffer 'count' would be lost"):
        save_checkpoint(tmp_path, 1, model=model, optimizer=None, manifest={})
    with pytest.raises(RunError, match="'weight' is not a DTensor"):
        save_checkpoint(tmp_path, 1, model=nn.Linear(2, 2, bias=False), optimizer=None, manifest={})
    with pytest.raises(RunError, match=r"the optimizer updates a parameter of shape \(11, 4\) not in the model"):
        save_checkpoint(tmp_path, 1, model=fresh()[0], optimizer=optimizer, manifest={})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ fitting


def test_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    model = cut_model(values(0), mesh())
    parameters = dict(model.named_parameters())
    folder = save_checkpoint(tmp_path, 0, model=model, optimizer=adamw(parameters), manifest={})
    model, optimizer = fresh()
    parameters = dict(model.named_parameters())
    train(parameters, optimizer, 1, 2)  # its state has to go: the saved optimizer had none
    load_model_and_optimizer(folder, model=model, optimizer=optimizer)
    assert not optimizer.state
    train(parameters, optimizer, 1, 3)
    assert_same_run(model, optimizer, 3)


@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_state_lies_where_the_optimizer_expects_it(saved: Path, option: str) -> None:
    model = cut_model(values(7), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    for group in optimizer.param_groups:
        group[option] = True
    load_model_and_optimizer(saved, model=model, optimizer=optimizer)
    assert_same_run(model, optimizer, 3)
    train(parameters, optimizer, 4, 4)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_what_does_not_fit_is_named_and_nothing_is_changed(saved: Path) -> None:
    whole = values(7)
    cases = [
        (
            whole | {"lm_head.weight": torch.ones(12, 4)},
            r"'lm_head.weight' has shape \(11, 4\) in .* and shape \(12, 4\)",
        ),
        (whole | {"extra.weight": torch.ones(2)}, r"has no parameter 'extra.weight', .* shape \(2,\)"),
        ({n: v for n, v in whole.items() if n != "lm_head.weight"}, r"'lm_head.weight' with shape \(11, 4\), this"),
        (
            whole | {"model.norm.weight": torch.ones(4).double()},
            r"'model.norm.weight' is torch.float32 .* torch.float64",
        ),
    ]
    for weights, message in cases:
        model = cut_model(weights, mesh())
        optimizer = adamw(dict(model.named_parameters()))
        with pytest.raises(UsageError, match=message):
            load_model_and_optimizer(saved, model=model, optimizer=optimizer)
        assert not optimizer.state
        for name, parameter in model.named_parameters():
            assert torch.equal(local(parameter), weights[name])


def test_optimizers_that_do_not_fit(saved: Path) -> None:
    model, _ = fresh()
    with pytest.raises(UsageError, match="holds the state of AdamW, this run uses SGD"):
        load_model_and_optimizer(saved, model=model, optimizer=torch.optim.SGD(model.parameters()))
    some = torch.optim.AdamW([p for name, p in model.named_parameters() if name != "lm_head.weight"])
    with pytest.raises(UsageError, match=r"optimizer state 'step' of 'lm_head.weight', which this optimizer lacks"):
        load_model_and_optimizer(saved, model=model, optimizer=some)
    alone = save_checkpoint(saved.parent, 4, model=model, optimizer=None, manifest={})
    with pytest.raises(UsageError, match="holds no optimizer state; load the model alone"):
        load_model_and_optimizer(alone, model=model, optimizer=torch.optim.AdamW(model.parameters()))


# ------------------------------------------------------------------------------------------------ hostile files


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def alter_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    with (folder / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    replaced = change(metadata)
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(metadata if replaced is None else replaced, stream)
    seal(folder)


def assert_refused(folder: Path, message: str) -> None:
    model, optimizer = fresh()
    for load in (verified, lambda path: load_model_and_optimizer(path, model=model, optimizer=optimizer)):
        with pytest.raises(UsageError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
    assert_same_run(model, None, 0, seed=7)
    assert not optimizer.state


@pytest.mark.parametrize("where", ["whole file", "planner data", "an entry"])
def test_malicious_metadata_runs_nothing(saved: Path, tmp_path: Path, where: str) -> None:
    trace = tmp_path / "it ran"
    evil = Malicious(trace)

    def change(metadata: Metadata) -> Any:
        if where == "whole file":
            return evil
        if where == "planner data":
            metadata.planner_data = {"a": evil}
        else:
            metadata.state_dict_metadata["extra"] = evil  # type: ignore[assignment]
        return None

    alter_metadata(saved, change)
    assert_refused(saved, r"\.metadata is refused: it names \w+.mkdir, which no checkpoint needs")
    assert not trace.exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert trace.exists()  # the file does what the test says it does


@pytest.mark.parametrize(
    "module", ["builtins", "torch", "torch.serialization", "torch.distributed.checkpoint.metadata"]
)
def test_only_records_are_admitted_not_their_modules(saved: Path, module: str) -> None:
    name = {"builtins": "eval", "torch": "load", "torch.serialization": "load"}.get(module, "os.mkdir")
    pickled = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93)R.".encode("latin-1")
    (saved / ".metadata").write_bytes(pickled)
    seal(saved)
    assert_refused(saved, f"it names {module}.{name}")


def test_entries_that_are_not_tensors_are_refused(saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    state: dict[str, Any] = {f"model.{name}": value for name, value in values(0).items()}
    (saved / ".metadata").unlink()
    dcp.save(state | {"note": Malicious(trace)}, storage_writer=dcp.FileSystemWriter(saved))
    alter_metadata(saved, lambda metadata: setattr(metadata.storage_meta, "checkpoint_id", None))
    assert_refused(saved, "entry 'note' is not a tensor")
    assert not trace.exists()


def test_altered_metadata_is_refused(saved: Path) -> None:
    original = (saved / ".metadata").read_bytes()

    def leave_out(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.model.norm.weight"].chunks.clear()  # type: ignore[union-attr]

    def point_outside(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../weights"

    def transform(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd"]

    def turn_to_bytes(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.model.norm.weight"] = BytesStorageMetadata()

    def drop_fields(metadata: Metadata) -> None:
        del metadata.state_dict_metadata["model.model.norm.weight"].size  # type: ignore[union-attr]

    for change, message in (
        (leave_out, "lists 0 of the 4 values of 'model.model.norm.weight'"),
        (point_outside, r"points at '\.\./weights', which the manifest does not list"),
        (transform, "stored with a transformation"),
        (turn_to_bytes, "'model.model.norm.weight' is not a tensor"),
        (drop_fields, "is damaged"),
        (lambda _: [1], "it holds a list"),
    ):
        (saved / ".metadata").write_bytes(original)
        alter_metadata(saved, change)
        assert_refused(saved, message)


def test_damaged_metadata_is_refused(saved: Path) -> None:
    original = (saved / ".metadata").read_bytes()
    for damaged in (b"", original[:100], b"\xff" + original[1:], b"not a pickle"):
        (saved / ".metadata").write_bytes(damaged)
        seal(saved)
        assert_refused(saved, r"\.metadata is refused: it is damaged")


def test_unreadable_shard_is_a_run_error(saved: Path) -> None:
    shard = saved / "__0_0.distcp"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert [info.step for info in find_checkpoints(saved.parent)] == [3]  # sizes alone cannot tell
    model, optimizer = fresh()
    with pytest.raises(RunError, match="could not be read: rank 0: ") as caught:
        load_model_and_optimizer(saved, model=model, optimizer=optimizer)
    assert "\n" not in str(caught.value)
    assert not optimizer.state
