"""Finding checkpoints: which look complete, by names and sizes, and why another is not usable.

Everything here looks at the local file system and involves no other rank. `verify` has all ranks go on from the same
checkpoint, after its content was compared with what was written.
"""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

from colonnade.checkpoint.manifest import (
    MANIFEST_NAME,
    SINGLE_FILE_SUFFIX,
    Manifest,
    read_complete_manifest,
    step_of_name,
)
from colonnade.errors import UsageError

logger = logging.getLogger(__name__)

GIVE_ANOTHER = "give another checkpoint, or the run's folder for its newest that is usable"
"""What to do where one that was asked for by name is not usable."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A usable checkpoint.

    Attributes:
        path: the folder, or the single file.
        step: optimizer steps taken; None for a single file whose name does not tell.
        manifest: None for a single file.
    """

    path: Path
    step: int | None
    manifest: Manifest | None

    @property
    def is_single_file(self) -> bool:
        return self.manifest is None


@dataclass(frozen=True)
class IncompleteCheckpoint:
    """Something with a checkpoint's name that cannot be used, and why, in one line that names the path."""

    path: Path
    step: int
    reason: str


def find_checkpoints(directory: Path) -> list[CheckpointInfo]:
    """Complete checkpoints directly inside `directory`, newest (highest step) first; a folder before a file.

    Only the exact names count: a folder `streaming_checkpoint_step_N` whose manifest can be read and whose listed files
    are there with their sizes, or a file `streaming_checkpoint_step_N.pth`. A directory that does not exist has none.
    """
    return survey(directory)[0]


def none_usable(directory: Path, damaged: list[IncompleteCheckpoint]) -> str | None:
    """The line that refuses a folder whose checkpoints are all damaged; None where there are none at all."""
    if not damaged:
        return None
    newest = max(damaged, key=lambda item: item.step)
    return (
        f"{directory} holds {len(damaged)} checkpoint(s) and none is usable; the newest: {newest.reason}; restore one, "
        "or move them away"
    )


def warn_of_damaged(chosen: CheckpointInfo, damaged: list[IncompleteCheckpoint]) -> list[IncompleteCheckpoint]:
    """Say of each damaged checkpoint newer than the chosen one why it is passed over and what that costs; those."""
    step = chosen.step or 0
    newer = sorted((item for item in damaged if item.step > step), key=lambda item: item.step, reverse=True)
    for item in newer:
        lost = item.step - step
        logger.warning("%s; going back to step %d, %d step%s lost", item.reason, step, lost, "s" if lost > 1 else "")
    return newer


def the_one_meant(path: Path) -> CheckpointInfo | None:
    """The checkpoint at `path` itself; None for a run folder, which holds at least something named like one.

    Raises:
        UsageError: nothing is there, a run folder holds no checkpoint, or the one asked for by name is damaged.
    """
    if path.is_file():
        if path.suffix != SINGLE_FILE_SUFFIX:
            raise UsageError(
                f"{path} is not a checkpoint: a folder or a file ending in {SINGLE_FILE_SUFFIX} was expected"
            )
        return _inspect(path)
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; give a run folder or a checkpoint")
    if step_of_name(path.name) is not None or (path / MANIFEST_NAME).exists():
        try:
            return _inspect(path)
        except UsageError as error:
            raise UsageError(f"{error}; {GIVE_ANOTHER}") from error
    if not any(survey(path)):
        raise UsageError(
            f"{path} holds no checkpoint: looked for folders streaming_checkpoint_step_N and files "
            f"streaming_checkpoint_step_N{SINGLE_FILE_SUFFIX}"
        )
    return None


def survey(directory: Path) -> tuple[list[CheckpointInfo], list[IncompleteCheckpoint]]:
    """`find_checkpoints`, and what is named like a checkpoint and is not a complete one, both newest first."""
    complete: list[tuple[int, bool, CheckpointInfo]] = []
    incomplete: list[IncompleteCheckpoint] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        step = step_of_name(path.name)
        # A file without .pth, or a folder with it, only looks like a checkpoint.
        if step is None or path.is_dir() == (path.suffix == SINGLE_FILE_SUFFIX):
            continue
        try:
            info = _inspect(path)
        except UsageError as error:
            incomplete.append(IncompleteCheckpoint(path, step, str(error)))
        else:
            # At the same step a folder comes first: it also holds the optimizer and the data position.
            complete.append((step, not info.is_single_file, info))
    complete.sort(key=lambda item: item[:2], reverse=True)
    incomplete.sort(key=lambda item: item.step, reverse=True)
    return [info for _, _, info in complete], incomplete


def _inspect(path: Path) -> CheckpointInfo:
    """The checkpoint at `path`, or a UsageError that says why it is not one."""
    named_step = step_of_name(path.name)
    if not path.is_dir():
        # torch.save writes a zip archive, whose directory stands at its end: a truncated file has none.
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is damaged, or was not written by torch.save: it is no zip archive")
        return CheckpointInfo(path, named_step, None)
    manifest = read_complete_manifest(path)
    if named_step is not None and manifest.step != named_step:
        raise UsageError(f"{path} is not what its name says: its manifest is of step {manifest.step}")
    return CheckpointInfo(path, manifest.step, manifest)
