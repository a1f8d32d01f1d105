"""Saving at one number of ranks and restoring at another, and saves that fail on one rank.

The two ranks are spawned once; each check runs on both and its outcome comes back by name.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoint_reference import (
    PARAMETERS,
    adamw,
    assert_same_run,
    cut_model,
    dense_run,
    local,
    mesh,
    train,
    values,
    whole,
)
from colonnade.checkpoint import load as load_module
from colonnade.checkpoint import save as save_module
from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.manifest import read_manifest
from colonnade.checkpoint.save import save_checkpoint
from colonnade.checkpoint.single_file import load_single_file
from colonnade.errors import RunError, UsageError
from colonnade.runtime.vote import on_first_rank, vote

# ------------------------------------------------------------------------------------------------ checks on two ranks


def save_at_tp2(folder: Path) -> None:
    model = cut_model(values(0), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    train(parameters, optimizer, 1, 3)
    saved = save_checkpoint(folder / "tp2", 3, model=model, optimizer=optimizer, manifest={"loss": 2.5})
    assert saved == folder / "tp2" / "streaming_checkpoint_step_3"


def restore_at_tp2(folder: Path) -> None:
    model = cut_model(values(7), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters, reverse=True)
    load_model_and_optimizer(folder / "tp1" / "streaming_checkpoint_step_3", model=model, optimizer=optimizer)
    assert local(parameters["lm_head.weight"]).shape == ((6, 4) if dist.get_rank() == 0 else (5, 4))
    assert_same_run(model, optimizer, 3)
    train(parameters, optimizer, 4, 6)
    assert_same_run(model, optimizer, 6)


def restore_and_save_at_dp2(folder: Path) -> None:
    model = cut_model(values(7), mesh(dp=2))
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    load_model_and_optimizer(folder / "tp1" / "streaming_checkpoint_step_3", model=model, optimizer=optimizer)
    train(parameters, optimizer, 4, 4)
    assert_same_run(model, optimizer, 4)
    save_checkpoint(folder / "dp2", 4, model=model, optimizer=optimizer, manifest={})


def full_disk_on_one_rank(folder: Path) -> None:
    directory = folder / "full_disk"
    model = cut_model(values(0), mesh())
    save_checkpoint(directory, 1, model=model, optimizer=None, manifest={})
    before = _contents(directory)

    def write_data(self: save_module.CommittingWriter, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> None:
        (self.temporary / "__1_0.distcp").write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(save_module.CommittingWriter, "write_data", write_data)
        with pytest.raises(RunError, match=r"step 2 .*rank 1: OSError: \[Errno 28\] No space left on device") as caught:
            save_checkpoint(directory, 2, model=model, optimizer=None, manifest={})
    assert "\n" not in str(caught.value)
    dist.barrier()
    assert _contents(directory) == before
    save_checkpoint(directory, 2, model=model, optimizer=None, manifest={})
    assert [info.step for info in find_checkpoints(directory)] == [2, 1]


def failure_at_the_commit(folder: Path) -> None:
    directory = folder / "commit"
    model = cut_model(values(0), mesh())
    save_checkpoint(directory, 1, model=model, optimizer=None, manifest={})
    before = _contents(directory)

    def rename(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        real_rename(source, target)

    real_rename = os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module.os, "rename", rename)
        # The same step again: the old folder was already moved aside and has to come back.
        with pytest.raises(RunError, match="rank 0: OSError"):
            save_checkpoint(directory, 1, model=model, optimizer=None, manifest={})
    dist.barrier()
    assert _contents(directory) == before


def failure_before_the_first_write(folder: Path) -> None:
    def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        raise RunError("this rank has nothing to save")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(save_module, "model_tensors", model_tensors)
        with pytest.raises(RunError, match="rank 1: this rank has nothing to save"):
            save_checkpoint(folder / "early", 1, model=torch.nn.Module(), optimizer=None, manifest={})
    dist.barrier()
    assert list((folder / "early").iterdir()) == []


def damage_seen_by_one_rank(folder: Path) -> None:
    def read_complete_manifest(path: Path) -> None:
        raise UsageError(f"{path} is damaged")

    model = cut_model(values(7), mesh())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(load_module, "read_complete_manifest", read_complete_manifest)
        with pytest.raises(UsageError, match="is damaged"):
            load_model_and_optimizer(folder / "tp1" / "streaming_checkpoint_step_3", model=model, optimizer=None)
    assert_same_run(model, None, 0, seed=7)


def vote_and_share(folder: Path) -> None:
    assert on_first_rank(dist.get_rank) == 0
    with pytest.raises(UsageError, match=r"^no such thing$"):
        on_first_rank(_refuse)
    with pytest.raises(RunError, match=r"^rank 1: OSError: gone$"):
        _second_rank_loses_its_disk()


def _second_rank_loses_its_disk() -> None:
    with vote():
        if dist.get_rank() == 1:
            raise OSError("gone")


def _refuse() -> None:
    raise UsageError("no such thing")


def single_file_at_tp2(folder: Path) -> None:
    weights = values(3)
    weights["lm_head.weight"][7:] = 0
    model, wanted = cut_model(values(7), mesh()), cut_model(weights, mesh())
    load_single_file(folder / "weights.pth", model=model)
    for (name, parameter), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(local(parameter), local(expected)), name


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


CHECKS: list[Callable[[Path], None]] = [
    save_at_tp2,
    restore_at_tp2,
    restore_and_save_at_dp2,
    full_disk_on_one_rank,
    failure_at_the_commit,
    failure_before_the_first_write,
    damage_seen_by_one_rank,
    vote_and_share,
    single_file_at_tp2,
]

# ------------------------------------------------------------------------------------------------ this process


def _run_checks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # A rank left waiting by a failing check must not hold the suite up.
    timeout = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timeout)
    outcome = {}
    for check in CHECKS:
        try:
            check(folder)
            outcome[check.__name__] = ""
        except BaseException:  # noqa: BLE001  # whatever it is, it is that check's outcome
            outcome[check.__name__] = traceback.format_exc()
            break
    torch.save(outcome, folder / f"outcome-{rank}.pt")
    os._exit(0)  # a broken group would wait for its peer on the way out


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The folder the two ranks worked in, and the outcome of each check on each: empty, or a traceback."""
    folder = tmp_path_factory.mktemp("two_ranks")
    model = cut_model(values(0), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    train(parameters, optimizer, 1, 3)
    save_checkpoint(folder / "tp1", 3, model=model, optimizer=optimizer, manifest={})
    unpadded = {f"_orig_mod.{name}": value for name, value in values(3).items()}
    unpadded["_orig_mod.lm_head.weight"] = unpadded["_orig_mod.lm_head.weight"][:7].clone()
    torch.save({"model_state_dict": unpadded}, folder / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(_run_checks, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"outcome-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks(two_ranks: tuple[Path, list[dict[str, str]]], check: str) -> None:
    for rank, outcome in enumerate(two_ranks[1]):
        assert outcome.get(check, "not reached") == "", f"rank {rank}: {outcome.get(check, 'not reached')}"


@pytest.mark.parametrize("reverse", [False, True], ids=["same groups", "other groups"])
def test_two_ranks_to_one(two_ranks: tuple[Path, list[dict[str, str]]], reverse: bool) -> None:
    checkpoint = two_ranks[0] / "tp2" / "streaming_checkpoint_step_3"
    model = cut_model(values(7), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters, reverse=reverse)
    train(parameters, optimizer, 1, 5)  # state to be overwritten
    load_model_and_optimizer(checkpoint, model=model, optimizer=optimizer)
    assert_same_run(model, optimizer, 3)
    train(parameters, optimizer, 4, 6)
    assert_same_run(model, optimizer, 6)
    assert read_manifest(checkpoint).run == {"loss": 2.5}


def test_each_value_is_stored_once(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    stored = dcp.FileSystemReader(two_ranks[0] / "dp2" / "streaming_checkpoint_step_4").read_metadata()
    for name, (shape, _) in PARAMETERS.items():
        entry = stored.state_dict_metadata[f"model.{name}"]
        assert isinstance(entry, dcp.TensorStorageMetadata)
        assert [chunk.sizes for chunk in entry.chunks] == [torch.Size(shape)]


def test_other_programs_read_it(two_ranks: tuple[Path, list[dict[str, str]]], tmp_path: Path) -> None:
    dcp_to_torch_save(two_ranks[0] / "tp2" / "streaming_checkpoint_step_3", tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=True)
    model = cut_model({name: stored[f"model.{name}"] for name in PARAMETERS}, mesh())
    assert_same_run(model, None, 3)
    assert {key for key in stored if key.startswith("optimizer.")} == {
        f"optimizer.{state}.{name}" for state in ("step", "exp_avg", "exp_avg_sq") for name in PARAMETERS
    }


def test_optimizer_none_leaves_the_optimizer_alone(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    model = cut_model(values(7), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    load_model_and_optimizer(two_ranks[0] / "tp2" / "streaming_checkpoint_step_3", model=model, optimizer=None)
    assert not optimizer.state
    train(parameters, optimizer, 1, 3)
    # The same three steps by plain AdamW from the stored weights: a step counted by the load would show here.
    fresh = {name: torch.nn.Parameter(value) for name, value in _dense_weights(3).items()}
    train(fresh, adamw(fresh), 1, 3)
    for name, parameter in parameters.items():
        assert torch.equal(whole(parameter), fresh[name]), name


def _dense_weights(last: int) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in dense_run(last)[0].items()}
