"""A process killed in the middle of a save. It is forked for each place, after one start with torch imported."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoint_reference import assert_same_run, cut_model, mesh, values
from colonnade.checkpoint import save as save_module
from colonnade.checkpoint.discover import find_checkpoints, survey
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.prune import collect_leftovers
from colonnade.checkpoint.save import save_checkpoint


@dataclass(frozen=True)
class Place:
    """Where the save of step 2 dies: at the first call of `owner.name` for whose first argument `when` holds."""

    owner: Any
    name: str
    found: dict[int, int]  # step -> seed of its weights, as a search finds them after the kill
    cleared: dict[int, int]  # the same after clearing up
    when: Callable[[Any], bool] = lambda argument: True
    replaces: bool = False  # a complete step 2 was there before, with the weights of seed 9


def is_temporary(path: Any) -> bool:
    return Path(path).name.startswith(".tmp-")


OLD, NEW = {1: 1}, {1: 1, 2: 2}
PLACES = {
    "folder created": Place(dcp, "save", OLD, OLD),
    "shards half written": Place(torch, "save", OLD, OLD, lambda tensor: tensor.shape == (4,)),
    "shards written": Place(dcp.FileSystemWriter, "finish", OLD, OLD),
    "before the manifest": Place(save_module, "write_manifest", OLD, OLD),
    "after the manifest": Place(save_module, "commit", OLD, NEW),
    "before the replacement": Place(save_module, "move_aside", {1: 1, 2: 9}, {1: 1, 2: 9}, replaces=True),
    "between the two renames": Place(os, "rename", OLD, NEW, is_temporary, replaces=True),
    "after the replacement": Place(shutil, "rmtree", NEW, NEW, replaces=True),
}


def _victims(folder: Path) -> None:
    """Fork one process a place; write down how each ended."""
    torch.set_num_threads(1)
    for number, place in enumerate(PLACES.values()):
        child = os.fork()
        if child == 0:
            _save_and_die(folder / str(number), place)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{number}.exit").write_text(str(code))


def _save_and_die(directory: Path, place: Place) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(step: int, seed: int) -> None:
        save_checkpoint(directory, step, model=cut_model(values(seed), mesh()), optimizer=None, manifest={})

    save(1, 1)
    if place.replaces:
        save(2, 9)
    real = getattr(place.owner, place.name)

    def killer(*args: Any, **kwargs: Any) -> Any:
        if place.when(next(value for value in args if not isinstance(value, dcp.FileSystemWriter)) if args else None):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(place.owner, place.name, killer)
    save(2, 2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        process = multiprocessing.get_context("spawn").Process(target=_victims, args=(folder,))
        process.start()
        process.join()
    assert process.exitcode == 0
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield folder
    dist.destroy_process_group()


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_leaves_whole_checkpoints_only(scenes: Path, place: str) -> None:
    number, expected = list(PLACES).index(place), PLACES[place]
    directory = scenes / str(number)
    assert (scenes / f"{number}.exit").read_text() == str(-signal.SIGKILL)
    assert_found(directory, expected.found)
    leftovers = [name for name in os.listdir(directory) if name.startswith((".tmp-", ".trash-"))]
    assert leftovers
    assert len(os.listdir(directory)) == len(leftovers) + len(expected.found)
    collect_leftovers(directory)
    assert_found(directory, expected.cleared)
    assert len(os.listdir(directory)) == len(expected.cleared)


def assert_found(directory: Path, seeds: dict[int, int]) -> None:
    found = find_checkpoints(directory)
    assert {info.step for info in found} == set(seeds)
    assert survey(directory)[1] == []
    for info in found:
        assert info.step is not None
        model = cut_model(values(7), mesh())
        load_model_and_optimizer(info.path, model=model, optimizer=None)
        assert_same_run(model, None, 0, seed=seeds[info.step])
