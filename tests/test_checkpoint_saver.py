"""Saves while training goes on: what they hold, that one follows the other, and how their failures come out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from checkpoint_reference import adamw, assert_same_run, cut_model, local, mesh, train, values
from colonnade.checkpoint import save as save_module
from colonnade.checkpoint import saver as saver_module
from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.manifest import read_manifest
from colonnade.checkpoint.save import CommittingWriter
from colonnade.checkpoint.saver import CheckpointSaver
from colonnade.errors import RunError
from forked_commands import PATIENCE


def trained(last: int) -> tuple[nn.Module, torch.optim.AdamW]:
    model = cut_model(values(0), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    train(parameters, optimizer, 1, last)
    return model, optimizer


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    train(dict(model.named_parameters()), optimizer, first, last)


def assert_holds(folder: Path, last: int) -> None:
    """The checkpoint is that of the dense run after `last` steps, to the bit."""
    model = cut_model(values(7), mesh())
    optimizer = adamw(dict(model.named_parameters()))
    load_model_and_optimizer(folder, model=model, optimizer=optimizer)
    assert_same_run(model, optimizer, last)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


class Gate:
    """Holds every write back until it is opened, and writes down what happened in which order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.events = threading.Event(), list[str]()
        real = save_module.write_checkpoint

        def write(directory: Path, step: int, content: Callable[[], Any], **options: Any) -> Path:
            assert self.opened.wait(30)
            self.events.append(f"begin {step}")
            try:
                return real(directory, step, content, **options)
            finally:
                self.events.append(f"end {step}")

        patch.setattr(saver_module, "write_checkpoint", write)


# ---------------------------------------------------------------------------------------------------- on each rank


def a_save_holds_the_moment_it_was_asked_for(folder: Path) -> None:
    saver = CheckpointSaver(folder / "async", asynchronous=True, hashes=True)
    model, optimizer = trained(3)
    manifest: dict[str, Any] = {"loss": 2.5, "nested": {"rows": [1, 2]}}
    committed: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        saver.save(3, model=model, optimizer=optimizer, manifest=manifest, after_commit=committed.append)
        assert find_checkpoints(folder / "async") == []
        # Everything changes while nothing has been written yet.
        step_on(model, optimizer, 4, 5)
        manifest["loss"] = 0.0
        manifest["nested"]["rows"].append(3)
        gate.opened.set()
        # Collectives of the steps that go on, beside those of the save.
        for number in range(200):
            total = torch.tensor(number)
            dist.all_reduce(total)
            assert int(total) == number * dist.get_world_size()
        saver.wait()
    path = folder / "async" / "streaming_checkpoint_step_3"
    assert committed == ([path] if dist.get_rank() == 0 else [])
    assert_holds(path, 3)
    assert read_manifest(path).run == {"loss": 2.5, "nested": {"rows": [1, 2]}}
    # Both modes write the same bytes.
    plain = CheckpointSaver(folder / "sync", asynchronous=False, hashes=True)
    model, optimizer = trained(3)
    plain.save(3, model=model, optimizer=optimizer, manifest={})
    other = folder / "sync" / "streaming_checkpoint_step_3"
    assert shards(other) == shards(path)
    assert len(shards(path)) == dist.get_world_size()
    plain.close()
    saver.close()


def one_save_at_a_time(folder: Path) -> None:
    saver = CheckpointSaver(folder / "queue", asynchronous=True, hashes=True)
    model, optimizer = trained(1)
    saver.reserve(model, optimizer)
    buffers = {name: buffer.data_ptr() for name, buffer in saver._buffers.items()}
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        threading.Timer(0.3, gate.opened.set).start()
        for step in (1, 2, 2):  # the last one again: the run was stopped and went on
            saver.save(step, model=model, optimizer=optimizer, manifest={})
            if step == 1:
                step_on(model, optimizer, 2, 2)
        saver.wait()
        assert gate.events == ["begin 1", "end 1", "begin 2", "end 2", "begin 2", "end 2"]
    assert_holds(folder / "queue" / "streaming_checkpoint_step_1", 1)
    assert_holds(folder / "queue" / "streaming_checkpoint_step_2", 2)
    assert {name: buffer.data_ptr() for name, buffer in saver._buffers.items()} == buffers
    dist.barrier()
    assert len(os.listdir(folder / "queue")) == 2
    saver.close()


def a_disk_full_on_one_rank(folder: Path) -> None:
    directory = folder / "full"
    saver = CheckpointSaver(directory, asynchronous=True, hashes=True)
    model, optimizer = trained(1)
    saver.save(1, model=model, optimizer=optimizer, manifest={})
    saver.wait()

    def write_data(self: CommittingWriter, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> None:
        (self.temporary / "__1_0.distcp").write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(CommittingWriter, "write_data", write_data)
        saver.save(2, model=model, optimizer=optimizer, manifest={})
        saver.settle(PATIENCE)
        assert saver.has_failed
        words = r"^checkpoint of step 2 was not saved in .*full: rank 1: OSError: \[Errno 28\] No space left on device"
        with pytest.raises(RunError, match=words) as caught:
            saver.wait()
    assert "\n" not in str(caught.value)
    assert not saver.has_failed
    saver.wait()  # told once
    dist.barrier()
    assert os.listdir(directory) == ["streaming_checkpoint_step_1"]
    dist.barrier()  # the next save begins only when all ranks have looked
    # What failed before is raised by the save after it, too.
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(CommittingWriter, "write_data", write_data)
        saver.save(2, model=model, optimizer=optimizer, manifest={})
        with pytest.raises(RunError, match=words):
            saver.save(3, model=model, optimizer=optimizer, manifest={})
    saver.save(4, model=model, optimizer=optimizer, manifest={})
    saver.wait()
    assert [info.step for info in find_checkpoints(directory)] == [4, 1]
    saver.close()


def what_follows_a_save_fails(folder: Path) -> None:
    directory = folder / "after"
    saver = CheckpointSaver(directory, asynchronous=True, hashes=True)
    model, optimizer = trained(1)

    def after_commit(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "data_ledger.json")

    saver.save(1, model=model, optimizer=optimizer, manifest={}, after_commit=after_commit)
    saver.settle(PATIENCE)
    assert saver.has_failed == (dist.get_rank() == 0)
    with pytest.raises(RunError, match="what follows a save failed: OSError") as caught:
        saver.wait()
    assert str(caught.value).startswith("rank 0: ") == (dist.get_rank() == 1)
    assert [info.step for info in find_checkpoints(directory)] == [1]
    saver.close()


def nothing_to_save_on_one_rank(folder: Path) -> None:
    def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
        raise RunError("this rank has nothing to save")

    for mode in (True, False):
        saver = CheckpointSaver(folder / f"nothing-{mode}", asynchronous=mode, hashes=True)
        model, optimizer = trained(1)

        def save(saver: CheckpointSaver = saver, model: Any = model, optimizer: Any = optimizer) -> None:
            saver.save(1, model=model, optimizer=optimizer, manifest={})
            saver.wait()

        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(save_module, "model_tensors", model_tensors)
            with pytest.raises(RunError, match="rank 1: this rank has nothing to save"):
                save()
        dist.barrier()
        assert os.listdir(folder / f"nothing-{mode}") == []
        saver.close()


def without_hashes(folder: Path) -> None:
    saver = CheckpointSaver(folder / "plain", asynchronous=False, hashes=False)
    model, optimizer = trained(2)
    saver.save(2, model=model, optimizer=optimizer, manifest={})
    manifest = read_manifest(folder / "plain" / "streaming_checkpoint_step_2")
    assert manifest.sha256 == {}
    assert_holds(folder / "plain" / "streaming_checkpoint_step_2", 2)
    assert local(next(model.parameters())).shape[0] in (5, 6)
    saver.close()


def a_save_uses_the_device_of_its_rank(folder: Path) -> None:
    chosen: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_device", dist.get_rank)
        patch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread().name)))
        saver = CheckpointSaver(folder / "device", asynchronous=False, hashes=True)
        model, optimizer = trained(1)
        saver.save(1, model=model, optimizer=optimizer, manifest={})
        saver.close()
    assert chosen == [(dist.get_rank(), "checkpoint-save_0")]


CHECKS = [
    a_save_uses_the_device_of_its_rank,
    a_save_holds_the_moment_it_was_asked_for,
    one_save_at_a_time,
    a_disk_full_on_one_rank,
    what_follows_a_save_fails,
    nothing_to_save_on_one_rank,
    without_hashes,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_two_ranks(rank_pool: Any, tmp_path: Path, check: Callable[[Path], None]) -> None:
    rank_pool.run(2, check, tmp_path)
