"""Removing checkpoints: old ones after a save, and leftovers of runs that died.

A folder is first renamed, so that it atomically stops being a checkpoint, and then deleted. Call these functions on one
rank.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints
from colonnade.checkpoint.manifest import (
    TEMPORARY_PREFIX,
    TRASH_PREFIX,
    fsync_directory,
    read_complete_manifest,
    step_of_name,
)
from colonnade.errors import UsageError

logger = logging.getLogger(__name__)


def prune_checkpoints(
    directory: Path,
    keep: int,
    protect: Collection[Path] = (),
    *,
    keep_every: int = 0,
    damaged: Collection[Path] = (),
) -> list[Path]:
    """Remove all but the newest `keep` complete checkpoint folders of `directory`.

    Damaged folders are neither counted nor removed. Single `.pth` files, which no run writes, are left alone. A removal
    that fails is logged as a one-line warning and never ends a run.

    Args:
        directory: the run folder.
        keep: how many complete checkpoints to keep; 0 keeps all.
        protect: checkpoints to keep whatever their age, such as the one just written.
        keep_every: as for `milestones`, which are kept and not counted among the newest.
        damaged: checkpoints known to be damaged although their files have the right sizes.

    Returns:
        The paths that were removed.

    Raises:
        UsageError: `keep` or `keep_every` is negative.
    """
    if keep < 0:
        raise UsageError(f"cannot keep {keep} checkpoints; give 1 or more, or 0 to keep all")
    if keep_every < 0:
        raise UsageError(f"cannot keep every {keep_every}th step; give 1 or more, or 0 for none")
    if keep == 0:
        return []
    protected = {path.resolve() for path in protect}
    known_damaged = {path.resolve() for path in damaged}
    removed = []
    try:
        intact = [
            info
            for info in find_checkpoints(directory)
            if not info.is_single_file and info.path.resolve() not in known_damaged
        ]
    except OSError as error:
        logger.warning("old checkpoints in %s were not pruned: %s", directory, error)
        return []
    kept = milestones(intact, keep_every)
    for path in [info.path for info in intact if info.path not in kept][keep:]:
        if path.resolve() in protected:
            continue
        try:
            shutil.rmtree(move_aside(path))
        except OSError as error:
            logger.warning("old checkpoint %s was not pruned: %s", path, error)
        if not path.exists():
            removed.append(path)
    return removed


def milestones(infos: Iterable[CheckpointInfo], keep_every: int) -> set[Path]:
    """The checkpoints to keep for good: for each multiple of `keep_every`, the first at or after it; none if it is 0.

    Not only those at the multiples themselves, because there may be none: the interval of saves need not divide
    `keep_every`, and a save that is due at a skipped step comes later. A multiple's window ends before the next one.
    """
    first: dict[int, CheckpointInfo] = {}
    for info in sorted(infos, key=lambda info: info.step or 0):
        window = (info.step or 0) // keep_every if keep_every else 0
        if window > 0:
            first.setdefault(window, info)
    return {info.path for info in first.values()}


def move_aside(path: Path) -> Path:
    """Rename a checkpoint to a `.trash-` name in the same folder, which no search considers, and return its path."""
    aside = path.with_name(f"{TRASH_PREFIX}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def collect_leftovers(directory: Path) -> list[Path]:
    """Remove what runs that died during a save or a prune left in `directory`; call it when a run starts.

    A complete leftover is renamed to its checkpoint name instead of being deleted if no checkpoint has that name: its
    run died just before the final rename of a commit, or before a prune deleted anything. If there are two for a step,
    the newly written one is restored, not the one it was to replace.

    The directory must not be in use by another run.

    Returns:
        The leftovers that are gone. What cannot be removed is logged as a one-line warning and left.
    """
    if not directory.is_dir():
        return []
    names = [name for name in os.listdir(directory) if name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))]
    # ".tmp-" sorts before ".trash-", so of two complete leftovers of a step the newly written one is restored.
    leftovers = [directory / name for name in sorted(names) if _checkpoint_name_in(name) is not None]
    gone = []
    for leftover in leftovers:
        try:
            if not _restore(leftover):
                shutil.rmtree(leftover)
            gone.append(leftover)
        except OSError as error:
            logger.warning("leftover %s was not removed: %s", leftover, error)
    return gone


def _checkpoint_name_in(name: str) -> str | None:
    """The checkpoint name within a leftover's name, `<prefix><name>-<token>`; None for any other name."""
    inner = name.removeprefix(TEMPORARY_PREFIX).removeprefix(TRASH_PREFIX).rpartition("-")[0]
    return None if step_of_name(inner) is None else inner


def _restore(leftover: Path) -> bool:
    name = _checkpoint_name_in(leftover.name)
    assert name is not None
    target = leftover.with_name(name)
    if target.exists():
        return False
    try:
        manifest = read_complete_manifest(leftover)
    except UsageError:
        return False
    if manifest.step != step_of_name(name):
        return False
    os.rename(leftover, target)
    fsync_directory(leftover.parent)
    logger.warning("%s was complete but not in its place; restored as %s", leftover.name, target)
    return True
