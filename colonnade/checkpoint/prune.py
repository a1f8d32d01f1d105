"""Removing checkpoints: old ones after a save, and what dead runs left behind.

A folder is first renamed, so that it stops being a checkpoint in one step, and then deleted. Call these on one rank.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from colonnade.checkpoint.discover import find_checkpoints
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

    Damaged folders neither count nor are they removed, and single `.pth` files, which no run writes, are left alone.
    A removal that fails is reported in one line of warning and never ends a run.

    Args:
        directory: the run folder.
        keep: how many complete checkpoints stay; 0 keeps all.
        protect: checkpoints that stay whatever their age, such as the one just written.
        keep_every: checkpoints at multiples of so many steps stay, and do not count among the newest; 0 for none.
        damaged: checkpoints known to be damaged although their files have the right sizes.

    Returns:
        The paths that are no longer there.

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
        folders = [
            info.path
            for info in find_checkpoints(directory)
            if not (info.is_single_file or (keep_every and (info.step or 0) % keep_every == 0))
            and info.path.resolve() not in known_damaged
        ]
    except OSError as error:
        logger.warning("old checkpoints in %s were not pruned: %s", directory, error)
        return []
    for path in folders[keep:]:
        if path.resolve() in protected:
            continue
        try:
            shutil.rmtree(move_aside(path))
        except OSError as error:
            logger.warning("old checkpoint %s was not pruned: %s", path, error)
        if not path.exists():
            removed.append(path)
    return removed


def move_aside(path: Path) -> Path:
    """Rename a checkpoint to a `.trash-` name beside it, which no search looks at, and return that name."""
    aside = path.with_name(f"{TRASH_PREFIX}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def collect_leftovers(directory: Path) -> list[Path]:
    """Clear away what runs that died in a save or in a prune left in `directory`; call it when a run starts.

    A leftover that is complete while no checkpoint has its name is a commit cut short between two renames: it is put in
    its place instead of being deleted, the newly written one before the one it was to replace.

    The directory must not be in use by another run.

    Returns:
        The leftovers that are gone. What cannot be removed is reported in one line of warning and left.
    """
    if not directory.is_dir():
        return []
    names = [name for name in os.listdir(directory) if name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))]
    # ".tmp-" sorts before ".trash-": of two complete leftovers of one step the newly written one is restored.
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
    """The checkpoint's name inside that of a leftover, `<prefix><name>-<token>`; None for any other name."""
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
