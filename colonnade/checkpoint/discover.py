"""Finding checkpoints: which ones look complete, by names and sizes, and why the others are not usable.

Everything here looks at the local file system and involves no other rank. `verify` compares a checkpoint's content with
what was written and makes all ranks use the same checkpoint.
"""

from __future__ import annotations

import logging
import os
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

CONFIG_NAME = "config.json"
GIVE_ANOTHER = "give another checkpoint, or the run's folder for its newest that is usable"
"""The advice to the user if a checkpoint requested by name is not usable."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that looks complete: its content may still differ from what was written.

    Attributes:
        path: the folder, or the single file.
        step: optimizer steps taken; None for a single file whose name does not give it.
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
    """Something named like a checkpoint that cannot be used; `reason` is one line that names the path."""

    path: Path
    step: int
    reason: str


def find_checkpoints(directory: Path) -> list[CheckpointInfo]:
    """Checkpoints directly inside `directory` that look complete, newest (highest step) first; a folder before a file.

    They need not be usable, because only names and sizes are looked at: `verify.newest_verified` finds the newest one
    that is, and `Retention.intact` leaves out those that the start of a run found damaged.

    Only exact names count: a folder `streaming_checkpoint_step_N` whose manifest can be read and whose listed files
    exist with their sizes, or a file `streaming_checkpoint_step_N.pth`. A directory that does not exist has none.
    """
    return survey(directory)[0]


def is_checkpoint(path: Path) -> bool:
    """Whether a path given by the user means a checkpoint itself, damaged or not, instead of a run's folder."""
    named = _named(path)
    return os.path.isfile(path) or step_of_name(named.name) is not None or os.path.exists(named / MANIFEST_NAME)


def run_folder_of(path: Path) -> Path:
    """The run's folder that a path given by the user belongs to: the folder a checkpoint lies in, else the path."""
    return _named(path).parent if is_checkpoint(path) else path


def _named(path: Path) -> Path:
    """`path`, resolved if it ends in `.` or `..`: such a path has neither its folder's name nor its parent in it."""
    return path.resolve() if path.name in ("", "..") else path


def none_usable(directory: Path, damaged: list[IncompleteCheckpoint]) -> str | None:
    """The error message for a folder in which every checkpoint is damaged; None if it has no damaged ones."""
    if not damaged:
        return None
    newest = max(damaged, key=lambda item: item.step)
    return (
        f"{directory} holds {len(damaged)} checkpoint(s) and none is usable; the newest: {newest.reason}; restore one, "
        "or move them away"
    )


def warn_of_damaged(chosen: CheckpointInfo, damaged: list[IncompleteCheckpoint]) -> list[IncompleteCheckpoint]:
    """Log for each damaged checkpoint newer than the chosen one why it is skipped and how many steps are lost.

    Returns:
        These newer damaged checkpoints, newest first.
    """
    step = chosen.step or 0
    newer = sorted((item for item in damaged if item.step > step), key=lambda item: item.step, reverse=True)
    for item in newer:
        lost = item.step - step
        logger.warning("%s; going back to step %d, %d step%s lost", item.reason, step, lost, "s" if lost > 1 else "")
    return newer


def the_one_meant(path: Path) -> CheckpointInfo | None:
    """The checkpoint at `path` itself; None for a run folder that has at least something named like a checkpoint.

    Raises:
        UsageError: `path` does not exist, a run folder holds no checkpoint, or the one requested by name is damaged.
    """
    if path.is_file():
        if path.suffix != SINGLE_FILE_SUFFIX:
            raise UsageError(
                f"{path} is not a checkpoint: a folder or a file ending in {SINGLE_FILE_SUFFIX} was expected"
            )
        return _inspect(path)
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; give a run folder or a checkpoint")
    if is_checkpoint(path):
        try:
            return _inspect(_named(path))
        except UsageError as error:
            raise UsageError(f"{error}; {GIVE_ANOTHER}") from error
    if not any(survey(path)):
        raise UsageError(
            f"{path} holds no checkpoint: looked for folders streaming_checkpoint_step_N and files "
            f"streaming_checkpoint_step_N{SINGLE_FILE_SUFFIX}{_if_hugging_face(path)}"
        )
    return None


def is_hugging_face_folder(path: Path) -> bool:
    """Whether `path` is a folder with a model's `config.json`, and neither a checkpoint nor a folder with some."""
    return (path / CONFIG_NAME).is_file() and not is_checkpoint(path) and not any(survey(path))


def _if_hugging_face(path: Path) -> str:
    if not (path / CONFIG_NAME).is_file():
        return ""
    return f"; it is a Hugging Face folder, whose weights training.py --init-from {path} begins a run with"


def survey(directory: Path) -> tuple[list[CheckpointInfo], list[IncompleteCheckpoint]]:
    """What looks complete, as in `find_checkpoints`, and what is named like one but incomplete, both newest first."""
    complete: list[tuple[int, bool, CheckpointInfo]] = []
    incomplete: list[IncompleteCheckpoint] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        step = step_of_name(path.name)
        # A file without the suffix .pth, or a folder with it, is not a checkpoint.
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
    """The checkpoint at `path`. Raises UsageError that says why it is not one."""
    named_step = step_of_name(path.name)
    if not path.is_dir():
        # torch.save writes a zip archive, whose directory is at its end: a truncated file has none.
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is damaged, or was not written by torch.save: it is no zip archive")
        return CheckpointInfo(path, named_step, None)
    manifest = read_complete_manifest(path)
    if named_step is not None and manifest.step != named_step:
        raise UsageError(f"{path} is not what its name says: its manifest is of step {manifest.step}")
    return CheckpointInfo(path, manifest.step, manifest)
