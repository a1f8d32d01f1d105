"""A checkpoint compared byte by byte with what was written, by ranks that share out the reading."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint_reference import adamw, cut_model, mesh, train, values
from colonnade.checkpoint import verify as verify_module
from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.manifest import Manifest, require_recorded_hash
from colonnade.checkpoint.save import save_checkpoint
from colonnade.checkpoint.verify import damage_of, newest_verified, verified
from colonnade.errors import UsageError


def save(directory: Path, step: int) -> Path:
    model = cut_model(values(0), mesh())
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    train(parameters, optimizer, 1, 2)
    return save_checkpoint(directory, step, model=model, optimizer=optimizer, manifest={})


def flip(file: Path, at: int) -> None:
    """Flip the lowest bit of a byte, on the first rank, for all."""
    dist.barrier()
    if dist.get_rank() == 0:
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
    dist.barrier()


def every_flipped_bit_is_seen_by_all(folder: Path) -> int:
    path = save(folder / "flips", 1)
    (info,) = find_checkpoints(path.parent)
    assert info.manifest is not None
    assert damage_of(info) is None
    seen = 0
    for name, size in info.manifest.files.items():
        for at in (0, size // 3, size // 2, size - 1):
            flip(path / name, at)
            reason = damage_of(info)
            assert reason is not None, (name, at)
            assert name in reason
            assert "\n" not in reason
            reasons = [""] * dist.get_world_size()
            dist.all_gather_object(reasons, reason)
            assert set(reasons) == {reason}
            flip(path / name, at)
            seen += 1
    assert damage_of(info) is None
    return seen


def the_reading_is_shared_out(folder: Path) -> list[str]:
    (info,) = find_checkpoints(save(folder / "shares", 1).parent)
    read: list[str] = []

    def note(path: Path, manifest: Manifest, name: str) -> None:
        read.append(name)
        require_recorded_hash(path, manifest, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "require_recorded_hash", note)
        assert damage_of(info) is None
        mine = list(read)
        assert damage_of(info, compare_hashes=False) is None
        assert read == mine
    return mine


def fallback(folder: Path) -> list[str]:
    """The lines each rank says on the way back to step 100."""
    directory = folder / "run"
    paths = {step: save(directory, step) for step in (100, 250, 300)}
    flip(paths[300] / "__1_0.distcp", 50)
    flip(paths[250] / ".metadata", 50)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("colonnade").addHandler(handler)
    try:
        found, damaged = newest_verified(directory)
    finally:
        logging.getLogger("colonnade").removeHandler(handler)
    assert found is not None
    assert found.step == 100
    assert [item.path for item in damaged] == [paths[300], paths[250]]
    assert verified(directory)[0] == found
    assert verified(directory)[1] == (paths[300], paths[250])
    assert newest_verified(directory, up_to=200)[1] == []
    # Without hashes a flipped bit in a shard has no witness.
    assert newest_verified(directory, compare_hashes=False)[0] == find_checkpoints(directory)[0]
    with pytest.raises(UsageError, match=r"__1_0.distcp has SHA-256 .*, its manifest says"):
        verified(paths[300])
    assert newest_verified(folder / "nothing") == (None, [])
    flip(paths[100] / "__0_0.distcp", 50)
    with pytest.raises(UsageError, match=r"holds 3 checkpoint\(s\) and none is usable; the newest: .*step_300 is dam"):
        newest_verified(directory)
    # Training the step again replaces what is damaged.
    save(directory, 300)
    found, damaged = newest_verified(directory)
    assert found is not None
    assert (found.step, damaged) == (300, [])
    return lines


def a_disk_that_one_rank_cannot_read(folder: Path) -> str | None:
    (info,) = find_checkpoints(save(folder / "unread", 1).parent)

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr("colonnade.checkpoint.manifest.file_sha256", fails)
        return damage_of(info)


def test_every_flipped_bit_is_seen_by_all_ranks(rank_pool: Any, tmp_path: Path) -> None:
    assert rank_pool.run(2, every_flipped_bit_is_seen_by_all, tmp_path) == [12, 12]


def test_each_file_is_read_by_one_rank(rank_pool: Any, tmp_path: Path) -> None:
    first, second = rank_pool.run(2, the_reading_is_shared_out, tmp_path)
    assert sorted(first + second) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert first
    assert second


def test_the_way_back_is_told_once_with_its_cost(rank_pool: Any, tmp_path: Path) -> None:
    first, second = rank_pool.run(2, fallback, tmp_path)
    assert second == []
    newest, other = first
    assert newest.startswith(f"{tmp_path}/run/streaming_checkpoint_step_300 is damaged: __1_0.distcp has SHA-256 ")
    assert newest.endswith("; going back to step 100, 200 steps lost")
    assert "streaming_checkpoint_step_250" in other
    assert other.endswith("; going back to step 100, 150 steps lost")


def test_what_one_rank_cannot_read_is_damaged_for_all(rank_pool: Any, tmp_path: Path) -> None:
    first, second = rank_pool.run(2, a_disk_that_one_rank_cannot_read, tmp_path)
    assert first == second
    assert "cannot be read: Input/output error" in first
