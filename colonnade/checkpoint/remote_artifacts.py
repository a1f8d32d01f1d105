"""Checkpoints as Weights & Biases artifacts: put there by a run, and fetched for `--checkpoint-path wandb:...`."""

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
from colonnade.parallel.vote import on_first_rank, one_line, vote

if TYPE_CHECKING:
    import wandb

PREFIX = "wandb:"
ARTIFACT_TYPE = "model"
# Beside the run, or in the working folder: where the client itself puts what it downloads.
FOLDER_NAME = "artifacts"
# They become names of folders: none begins with a dot.
_PART = r"([\w-][\w.-]*)"
_REFERENCE = re.compile(f"wandb:{_PART}/{_PART}/{_PART}:{_PART}")


def upload_checkpoint(run: wandb.Run, path: Path) -> str:
    """Log the checkpoint at `path` as a version of the run's artifact; returns its full name once it is confirmed.

    The artifact is `checkpoint-<id of the run>`, the version has the alias `step-<step>` and step, loss and tokens as
    metadata. The files are read where they are: nothing may remove them meanwhile.

    Raises whatever the client does.
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
    """Raises UsageError where `reference`, which begins with `wandb:`, names no artifact, or there is no client."""
    if _REFERENCE.fullmatch(reference) is None:
        raise UsageError(
            f"--checkpoint-path {reference[:200]!r} names no artifact: wandb:ENTITY/PROJECT/NAME:VERSION, such as "
            "wandb:me/pretraining/checkpoint-1a2b3c4d:latest"
        )
    require_client("--checkpoint-path wandb:...")


def require_client(flag: str) -> None:
    """Raises UsageError where the client is not installed."""
    if find_spec("wandb") is None:
        raise UsageError(f"{flag} needs the package wandb, which is not installed: pip install 'colonnade[wandb]'")


def fetch_checkpoint(reference: str, folder: Path) -> Path:
    """The checkpoint folder of an artifact, downloaded below `folder` where it is not there yet. Collective.

    The first rank downloads, and on each other node, where it does not see what that has fetched, its first one. What
    is there is not compared with anything yet: `colonnade.checkpoint.verify` does that, as for any checkpoint.

    Raises:
        UsageError: `reference` names no artifact, it cannot be fetched, or it holds no checkpoint.
    """
    fetched = on_first_rank(lambda: _fetch(reference, folder))
    with vote():
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        if is_first_of_node and not fetched.is_dir():
            _fetch(reference, folder)
    return fetched


def _fetch(reference: str, folder: Path) -> Path:
    require_artifact_name(reference)
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    import wandb

    try:
        artifact: Any = wandb.Api().artifact(reference.removeprefix(PREFIX))
        # An alias such as `latest` may mean another version tomorrow.
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
    """The checkpoint that an earlier start has fetched, where its files have their sizes."""
    return next((info.path for info in find_checkpoints(place)), None)


def _put_in_place(aside: Path, place: Path) -> Path:
    try:
        step = read_manifest(aside).step
    except UsageError as error:
        raise UsageError(f"the artifact holds no checkpoint that could be read: {error}") from error
    path = place / checkpoint_name(step)
    if path.exists():  # damaged since it was fetched
        shutil.rmtree(path)
    aside.rename(path)
    return path
