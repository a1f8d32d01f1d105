"""Checkpoints as Weights & Biases artifacts: uploaded by a run, and downloaded for `--checkpoint-path wandb:...`."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.manifest import checkpoint_name, read_manifest
from colonnade.errors import UsageError
from colonnade.runtime.vote import on_first_rank, one_line, vote

if TYPE_CHECKING:
    import wandb

PREFIX = "wandb:"
ARTIFACT_TYPE = "model"
# The folder for downloads, in the run's folder or the working folder. The client uses this name by default.
FOLDER_NAME = "artifacts"
# Parts of a reference become folder names, so none may begin with a dot.
_PART = r"([\w-][\w.-]*)"
_REFERENCE = re.compile(f"wandb:{_PART}/{_PART}/{_PART}:{_PART}")


def upload_checkpoint(run: wandb.Run, path: Path) -> str:
    """Log the checkpoint at `path` as a version of the run's artifact; return its full name once it is confirmed.

    The artifact is `checkpoint-<id of the run>`. The version has the aliases `latest` and `step-<step>`, and the
    metadata step, folder name, loss, tokens and `began_at`. The files are read in place, so nothing may remove them
    meanwhile.

    Raises whatever the client raises.
    """
    import wandb

    manifest = read_manifest(path)
    metadata = {key: manifest.run.get(key) for key in ("loss", "tokens_seen", "began_at")}
    artifact = wandb.Artifact(
        f"checkpoint-{run.id}", ARTIFACT_TYPE, metadata={"step": manifest.step, "folder": path.name, **metadata}
    )
    artifact.add_dir(str(path), skip_cache=True, policy="immutable")
    logged = run.log_artifact(artifact, aliases=["latest", f"step-{manifest.step}"])
    logged.wait()
    return str(logged.qualified_name)


def is_artifact(path: str | Path) -> bool:
    """Whether `path` names an artifact instead of something on disk."""
    return str(path).startswith(PREFIX)


def require_artifact_name(reference: str) -> None:
    """Raises UsageError if `reference` (beginning with `wandb:`) is malformed, or the client is not installed."""
    if _REFERENCE.fullmatch(reference) is None:
        raise UsageError(
            f"--checkpoint-path {reference[:200]!r} names no artifact: wandb:ENTITY/PROJECT/NAME:VERSION, such as "
            "wandb:me/pretraining/checkpoint-1a2b3c4d:latest"
        )
    require_client("--checkpoint-path wandb:...")


def require_client(flag: str) -> None:
    """Raises UsageError if the client is not installed."""
    if find_spec("wandb") is None:
        raise UsageError(f"{flag} needs the package wandb, which is not installed: pip install 'colonnade[wandb]'")


def fetch_checkpoint(reference: str, folder: Path) -> Path:
    """The checkpoint folder of an artifact, downloaded into a subfolder of `folder` unless it is there. Collective.

    The first rank downloads it. On each other node, the first rank of that node does so too if it does not see the
    download. The content is not verified here: `colonnade.checkpoint.verify` does that, as for any checkpoint.

    Raises:
        UsageError: `reference` names no artifact, or the artifact cannot be fetched or holds no checkpoint.
    """
    fetched = on_first_rank(lambda: _fetch(reference, folder))
    with vote():
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        if is_first_of_node and not fetched.is_dir():
            _fetch(reference, folder)
    return fetched


def discard_download(path: Path) -> None:
    """Remove a downloaded checkpoint whose content is damaged, on each node that has it. Collective."""
    with vote():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            shutil.rmtree(path, ignore_errors=True)  # nodes that share the folder remove it together


def _fetch(reference: str, folder: Path) -> Path:
    require_artifact_name(reference)
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    import wandb

    try:
        artifact: Any = wandb.Api().artifact(reference.removeprefix(PREFIX))
        # The folder is named by the version, because an alias such as `latest` can move to another one.
        entity, project, name, _ = match.groups()
        place = folder / entity / project / name / artifact.version
        present = _checkpoint_in(place)
        if present is not None:
            return present
        place.mkdir(parents=True, exist_ok=True)
        aside = place / f".fetch-{secrets.token_hex(4)}"
        try:
            artifact.download(root=str(aside), skip_cache=True)
            return _put_in_place(aside, place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"--checkpoint-path {reference} cannot be fetched ({one_line(error)[:300]}); look at its name, at wandb "
            "login and at the network"
        ) from error


def _checkpoint_in(place: Path) -> Path | None:
    """The checkpoint that an earlier start downloaded, if its files have the right sizes; else None. Whoever reads it
    finds out whether the bytes are right."""
    return next((info.path for info in find_checkpoints(place)), None)


def _put_in_place(aside: Path, place: Path) -> Path:
    try:
        step = read_manifest(aside).step
    except UsageError as error:
        raise UsageError(f"the artifact holds no checkpoint that could be read: {error}") from error
    path = place / checkpoint_name(step)
    if path.exists():  # damaged since it was downloaded
        shutil.rmtree(path)
    aside.rename(path)
    return path
