"""Choosing the checkpoint to resume from, after the hashes of its files have been compared with those recorded.

`discover` looks at names and sizes, on one rank. Here all ranks divide the reading among them and decide together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from colonnade.checkpoint.discover import (
    GIVE_ANOTHER,
    CheckpointInfo,
    IncompleteCheckpoint,
    none_usable,
    survey,
    the_one_meant,
    warn_of_damaged,
)
from colonnade.checkpoint.manifest import Manifest, require_recorded_hash
from colonnade.checkpoint.remote_artifacts import FOLDER_NAME, discard_download, fetch_checkpoint, is_artifact
from colonnade.checkpoint.safe_reader import SafeFileSystemReader
from colonnade.errors import UsageError
from colonnade.runtime.vote import on_first_rank, vote

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Found = tuple[CheckpointInfo | None, list[IncompleteCheckpoint]]


def newest_verified(directory: Path, *, compare_hashes: bool = True, up_to: int | None = None) -> _Found:
    """The newest usable checkpoint of a run folder, and the newer damaged ones that were skipped. Collective.

    For each one skipped, a one-line warning names the file, the reason and the number of steps lost.

    Args:
        directory: the run folder; one that does not exist has no checkpoints.
        compare_hashes: if False, only names, sizes and `.metadata` are checked.
        up_to: highest step to consider; None for all.

    Returns:
        None and an empty list if nothing there is named like a checkpoint.

    Raises:
        UsageError: there are checkpoints, but none is usable.
    """

    complete: list[CheckpointInfo] = []
    damaged: list[IncompleteCheckpoint] = []

    def look() -> None:
        found, unusable = _readable(lambda: survey(directory), directory)
        complete.extend(info for info in found if up_to is None or (info.step or 0) <= up_to)
        damaged.extend(item for item in unusable if up_to is None or item.step <= up_to)

    on_first_rank(look)
    chosen = None
    for info in _one_by_one(complete):
        reason = damage_of(info, compare_hashes=compare_hashes)
        if reason is None:
            chosen = info
            break
        damaged.append(IncompleteCheckpoint(info.path, info.step or 0, reason))
    if chosen is not None:
        return chosen, on_first_rank(lambda: warn_of_damaged(chosen, damaged))
    refusal = on_first_rank(lambda: none_usable(directory, damaged))
    if refusal is not None:
        raise UsageError(refusal)
    return None, []


def _readable(look: Callable[[], T], path: Path) -> T:
    try:
        return look()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _one_by_one(infos: Sequence[CheckpointInfo]) -> Iterator[CheckpointInfo]:
    """The first rank's checkpoints, on all ranks. Each is sent only when requested, as manifests may be large."""
    rest = iter(infos)
    while (info := on_first_rank(lambda: next(rest, None))) is not None:
        yield info


def verified(
    path: Path, *, compare_hashes: bool = True, downloads: Path = Path(FOLDER_NAME)
) -> tuple[CheckpointInfo, tuple[Path, ...]]:
    """The checkpoint that `path` refers to, and the damaged ones that were skipped. Collective.

    `path` is a run folder (which refers to its newest usable checkpoint), a checkpoint folder, a `.pth` file, or the
    name of an artifact (`remote_artifacts`), which is downloaded into a subfolder of `downloads`.

    Raises:
        UsageError: `path` does not exist, a run folder has no usable checkpoint, or the checkpoint requested by name is
            damaged.
    """
    if is_artifact(path):
        return _verified_download(str(path), downloads, compare_hashes), ()
    named = on_first_rank(lambda: _readable(lambda: the_one_meant(path), path))
    if named is None:
        found, damaged = newest_verified(path, compare_hashes=compare_hashes)
        assert found is not None  # the_one_meant has checked that something is named like a checkpoint
        return found, tuple(item.path for item in damaged)
    reason = damage_of(named, compare_hashes=compare_hashes)
    if reason is not None:
        raise UsageError(f"{reason}; {GIVE_ANOTHER}")
    return named, ()


def _verified_download(reference: str, downloads: Path, compare_hashes: bool) -> CheckpointInfo:
    """The checkpoint of an artifact. A download that an earlier start left, and that is damaged, is fetched again."""
    path = fetch_checkpoint(reference, downloads)
    try:
        return verified(path, compare_hashes=compare_hashes)[0]
    except UsageError as error:
        if dist.get_rank() == 0:
            logger.warning("%s; it is downloaded again", str(error).removesuffix(f"; {GIVE_ANOTHER}"))
    discard_download(path)
    fetch_checkpoint(reference, downloads)
    try:
        return verified(path, compare_hashes=compare_hashes)[0]
    except UsageError as error:
        damage = str(error).removesuffix(f"; {GIVE_ANOTHER}")
        raise UsageError(f"{damage}, as it was downloaded: give another version than {reference}") from error


def damage_of(info: CheckpointInfo, *, compare_hashes: bool = True) -> str | None:
    """Why a checkpoint that looks complete is not what was written, in one line; None if it is intact. Collective.

    The files are divided among the ranks by size, and each rank reads its own. A single `.pth` file has no recorded
    hashes to compare with, so it counts as intact.
    """
    if info.manifest is None:
        return None
    try:
        with vote():
            if dist.get_rank() == 0:
                SafeFileSystemReader(info.path, info.manifest.files).read_checked_metadata()
            if compare_hashes and info.manifest.sha256:
                for name in _share_of(info.manifest, dist.get_rank(), dist.get_world_size()):
                    require_recorded_hash(info.path, info.manifest, name)
    except UsageError as error:
        return str(error)
    return None


def _share_of(manifest: Manifest, rank: int, ranks: int) -> list[str]:
    """The files that `rank` reads. Largest first, each file goes to the rank with the fewest bytes so far."""
    loads = [0] * ranks
    mine = []
    for name, size in sorted(manifest.files.items(), key=lambda item: (-item[1], item[0])):
        least = loads.index(min(loads))
        loads[least] += size + 1
        if least == rank:
            mine.append(name)
    return mine
