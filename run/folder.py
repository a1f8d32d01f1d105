"""The folder of a run before it starts: what it contains, and whether the run may use it.

All functions here return what they found, or raise a `UsageError` that names the folder and says what to do.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints, none_usable, run_folder_of, survey
from colonnade.checkpoint.manifest import MANIFEST_NAME, step_of_name
from colonnade.checkpoint.prune import collect_leftovers
from colonnade.checkpoint.run_lock import RunLock
from colonnade.checkpoint.run_record import run_record
from colonnade.checkpoint.verify import newest_verified
from colonnade.command_settings import ResumeSettings
from colonnade.errors import UsageError
from colonnade.run_settings import RunSettings
from run.end import step_of_launch

SETTINGS_NAME = "run.yaml"


def with_own_settings(given: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """The settings given; where they name a run's folder and nothing else, those of its newest checkpoint.

    Not those of run.yaml: a resume with changed settings that saved nothing has left its own there. Read on every rank,
    as a --config file is: they are needed before the ranks have joined. Raises UsageError.
    """
    directory = Path(given.get("checkpoint_dir", RunSettings().checkpoint_dir))
    if not given.keys() <= {"checkpoint_dir"}:
        return given
    try:
        newest = next((info for info in find_checkpoints(directory) if info.manifest is not None), None)
    except OSError:  # the search for the newest checkpoint will say what is wrong with the folder
        newest = None
    if newest is None:
        return given
    notes.append(f"nothing else given: the settings of {newest.path}")
    return {**run_record(newest)["settings"], "checkpoint_dir": str(directory)}


def newest_checkpoint(directory: Path, settings: RunSettings) -> tuple[CheckpointInfo | None, tuple[Path, ...]]:
    """The checkpoint to resume exactly (None for a fresh run), and the damaged ones that were skipped. Collective."""
    found, damaged = newest_verified(directory, compare_hashes=settings.checkpoint_hash)
    if found is not None and found.manifest is None:
        raise UsageError(
            f"{directory} holds the single file {found.path.name}, which has no run to go on with exactly; "
            f"use resume_pretrain_tensor.py --checkpoint-path {found.path}, or another --checkpoint-dir"
        )
    return found, tuple(item.path for item in damaged)


def clear_leftovers(lock: RunLock) -> bool:
    """Clean up what dead runs left in the lock's folder; return whether that changed the list of checkpoints.

    If the lock is not held, a leftover may be a save in progress, so nothing is touched.
    """
    if not lock.is_held:
        return False
    before = [info.path for info in find_checkpoints(lock.directory)]
    collect_leftovers(lock.directory)
    return [info.path for info in find_checkpoints(lock.directory)] != before


def folder_of_resumed(resume: ResumeSettings, checkpoint_dir: str | None) -> Path:
    """The folder of a resumed run: --checkpoint-dir if given, otherwise the folder that contains the checkpoint."""
    return Path(checkpoint_dir or run_folder_of(Path(resume.checkpoint_path)))


def saved_since_launch(directory: Path, launched_by: list[str]) -> int | None:
    """The step at which an earlier attempt of this launch began, if it has saved a later one; else None.

    torchrun's `--max-restarts` repeats the whole command, and with it the optimizer reset and the warm-up. A restarted
    attempt must instead resume exactly from what the first one saved. Whether those files are intact is not checked.
    """
    try:
        began = step_of_launch(directory, launched_by)
        saved = [] if began is None else [info.step for info in find_checkpoints(directory) if not info.is_single_file]
    except OSError:  # the search for the checkpoint will say what is wrong with the path
        return None
    return began if saved and (saved[0] or 0) > (began or 0) else None


def require_outside_checkpoints(directory: Path) -> None:
    """Refuse a run's folder inside a checkpoint: whoever prunes or replaces that one would delete the run with it."""
    own = Path(os.path.realpath(directory))
    for place in (own, *own.parents):
        if step_of_name(place.name) is not None or (place == own and os.path.exists(place / MANIFEST_NAME)):
            raise UsageError(
                f"--checkpoint-dir {directory} {'is' if place == own else 'is inside'} a checkpoint of another run, "
                f"{place}, which may be pruned with all that is in it; give a run's folder, such as {place.parent}"
            )


def require_writable(directory: Path) -> None:
    """Raise UsageError now if the folder is not writable, rather than fail at the first save. Creates nothing."""
    existing = directory.absolute()
    try:
        while not _is_there(existing):
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"--checkpoint-dir {directory} cannot be written ({error.strerror}); give a folder that can"
        ) from error


def _is_there(path: Path) -> bool:
    """Whether `path` exists, even as a dangling link. Raises OSError if it is not a valid or reachable path."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def require_own_model(path: Path, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise UsageError if a model or seed other than the checkpoint's is given, which would otherwise be ignored."""
    for name in ("preset", "model_config", "init_from", "seed"):
        value = given.get(name)
        if value is not None and value != own.get(name):
            what = "weights" if name == "seed" else "an architecture"
            raise UsageError(f"{name} {value}: {path} has {what} of its own ({name} {own.get(name)}); leave it out")


def require_no_other_run(found: CheckpointInfo, directory: Path, damaged: Collection[Path]) -> None:
    """Raise UsageError if the folder's newest checkpoint is another run's, which the next start would resume."""
    complete, incomplete = survey(directory)
    passed_over = {path.resolve() for path in damaged}
    there = next((info for info in complete if info.path.resolve() not in passed_over), None)
    if there is None:
        refusal = none_usable(directory, incomplete)
        if refusal is not None:
            raise UsageError(refusal)
        return
    if there.path.resolve() == found.path.resolve():
        return
    if directory.resolve() != found.path.parent.resolve() or (there.step or 0) > (found.step or 0):
        raise UsageError(
            f"--checkpoint-dir {directory} holds {there.path.name}, which does not come from {found.path}; "
            "go on from that one, move it away, or give another --checkpoint-dir"
        )


def require_steps_left(path: Path, step: int, settings: RunSettings) -> None:
    if step >= settings.total_steps:
        raise UsageError(
            f"--total-steps {settings.total_steps} leaves nothing to do: {path} is at step {step}; give more than that"
        )
