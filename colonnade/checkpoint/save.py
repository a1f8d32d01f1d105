"""Writing a checkpoint: into a temporary folder, made durable, then committed by one rename.

1. All ranks write their shards into `.tmp-streaming_checkpoint_step_N-<token>/` and fsync them
   (`torch.distributed.checkpoint`, DCP for short).
2. When all have succeeded, the first rank writes DCP's `.metadata`, then MANIFEST.json, and makes both durable.
3. It renames the folder to `streaming_checkpoint_step_N/`: from here on the checkpoint exists.

Steps 2 and 3 are the last phase of DCP's own protocol (`CommittingWriter.finish`). So a failure anywhere reaches every
rank through DCP's collectives, and synchronous and asynchronous saves share this single commit point.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from colonnade.checkpoint.hashing import HashingFileSystem, crc32_left_out
from colonnade.checkpoint.manifest import (
    JSON,
    TEMPORARY_PREFIX,
    Manifest,
    checkpoint_name,
    file_sha256,
    fsync_directory,
    library_versions,
    write_manifest,
)
from colonnade.checkpoint.prune import move_aside
from colonnade.checkpoint.state import model_tensors, optimizer_tensors
from colonnade.errors import RunError
from colonnade.runtime.vote import on_first_rank, one_line, vote

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What a checkpoint will hold.

    Attributes:
        tensors: tensors by their names in the checkpoint; `DTensor`s, or plain tensors that are equal on all ranks.
        draft: the manifest without its files.
    """

    tensors: Mapping[str, Tensor]
    draft: Manifest


def checkpoint_content(
    step: int, model: nn.Module, optimizer: Optimizer | None, manifest: Mapping[str, JSON]
) -> Content:
    """The tensors of a model and its optimizer, sharing memory with them, and a copy of the manifest. No collective.

    Raises:
        RunError: some state would be lost in a checkpoint, or the manifest is not strict JSON.
    """
    tensors = model_tensors(model)
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
    try:
        # A snapshot: the caller may change the mapping while the checkpoint is being written.
        run = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RunError(f"the manifest is not JSON: {one_line(error)}") from error
    name = None if optimizer is None else type(optimizer).__name__
    return Content(tensors, Manifest(step, files={}, optimizer=name, libraries=library_versions(), run=run))


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    manifest: Mapping[str, JSON],
    group: dist.ProcessGroup | None = None,
    hashes: bool = True,
) -> Path:
    """Write the checkpoint of `step` into the run folder `directory`. Collective; returns when it is durable.

    A complete checkpoint of the same step is replaced: a step that is saved again has been trained again, and the later
    training is the one to keep.

    Args:
        directory: on a file system that all ranks share; created if missing.
        step: optimizer steps taken.
        model: its parameters are `DTensor`s.
        optimizer: None to save the model alone.
        manifest: everything that is not a tensor, as strict JSON; that of the first rank is written.
        group: the ranks that save together; None for all.
        hashes: False leaves the SHA-256 of each file out of the manifest.

    Returns:
        The checkpoint's folder, `directory / "streaming_checkpoint_step_N"`.

    Raises:
        RunError: on all ranks, if the save failed on any. The unfinished folder is removed; older checkpoints are
            intact.
    """
    return write_checkpoint(
        directory, step, lambda: checkpoint_content(step, model, optimizer, manifest), group=group, hashes=hashes
    )


def write_checkpoint(
    directory: Path, step: int, content: Callable[[], Content], *, group: dist.ProcessGroup | None, hashes: bool
) -> Path:
    """As `save_checkpoint`, but saves what `content` returns. A RunError it raises on one rank is raised on all."""
    temporary = on_first_rank(lambda: _create_temporary(directory, step), group)
    try:
        with vote(group):
            found = content()
        writer = CommittingWriter(temporary, directory / checkpoint_name(step), found.draft, hashes=hashes)
        dcp.save(dict(found.tensors), storage_writer=writer, process_group=group)
    except (RunError, CheckpointException, OSError, RuntimeError) as error:
        _remove_unfinished(temporary)
        raise RunError(f"checkpoint of step {step} was not saved in {directory}: {failure_line(error)}") from error
    return directory / checkpoint_name(step)


def _create_temporary(directory: Path, step: int) -> Path:
    is_new = not directory.is_dir()
    directory.mkdir(parents=True, exist_ok=True)
    if is_new:
        fsync_directory(directory.parent)
    temporary = directory / f"{TEMPORARY_PREFIX}{checkpoint_name(step)}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def _remove_unfinished(temporary: Path) -> None:
    """Remove the temporary folder. Every rank calls this: on a shared file system they race for the same files, and on
    local disks each rank clears its own."""
    shutil.rmtree(temporary, ignore_errors=True)
    if temporary.exists():
        logger.warning("unfinished checkpoint %s was not removed; it can be deleted", temporary)


def failure_line(error: BaseException) -> str:
    """What went wrong and on which rank, on one line, without the tracebacks of a CheckpointException."""
    if not isinstance(error, CheckpointException):
        return one_line(error)
    causes = {rank: one_line(cause) for rank, (cause, _) in sorted(error.failures.items())}
    return "; ".join(
        f"rank {rank}: {text}" + (" (is the disk full?)" if "inline_container" in text else "")
        for rank, text in causes.items()
    )


@dataclass(frozen=True)
class HashedWrite(WriteResult):
    """A rank's report to DCP for one item it wrote, with the SHA-256 of the whole file that contains the item."""

    sha256: str


class CommittingWriter(dcp.FileSystemWriter):
    """DCP's file writer, whose `finish` also writes the manifest and commits the folder by renaming it.

    Each rank hashes its files while they are being fsynced. The first rank receives the hashes together with DCP's
    record of what was written where, and writes them into the manifest.

    Args:
        temporary: the folder the ranks write into, next to `target`.
        target: the checkpoint's folder once it is committed.
        draft: the manifest without its files.
        hashes: whether the manifest will hold a hash of each file.
    """

    def __init__(self, temporary: Path, target: Path, draft: Manifest, *, hashes: bool = True) -> None:
        super().__init__(temporary, sync_files=True, overwrite=False)
        self.temporary, self.target, self.draft = temporary, target, draft
        self.hashes = HashingFileSystem() if hashes else None
        if self.hashes is not None:
            self.fs = self.hashes

    def storage_meta(self) -> StorageMeta:
        # DCP would record the path of the temporary folder, which soon no longer exists and means nothing elsewhere.
        return StorageMeta(checkpoint_id=self.target.name, save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if self.hashes is None:
            return super().write_data(plan, planner)
        with crc32_left_out():
            written = super().write_data(plan, planner)
        known = self.hashes.sha256
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result(
            [
                HashedWrite(item.index, item.size_in_bytes, item.storage_data, known[item.storage_data.relative_path])
                for item in written.wait()
            ]
        )
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and commit. DCP calls it on the coordinator only, after all ranks' shards are durable."""
        super().finish(metadata, results)
        sizes = {path.name: path.stat().st_size for path in sorted(self.temporary.iterdir())}
        self._check_visible(results, sizes)
        # DCP fsyncs .metadata before flushing its stream: up to the last 8 KiB are not on disk yet (torch 2.13).
        _fsync_file(self.temporary / ".metadata")
        sha256 = {} if self.hashes is None else self._merged_hashes(results, sizes)
        write_manifest(self.temporary, replace(self.draft, files=sizes, sha256=sha256))
        fsync_directory(self.temporary)
        commit(self.temporary, self.target)

    def _merged_hashes(self, results: list[list[WriteResult]], sizes: Mapping[str, int]) -> dict[str, str]:
        """The hash of every file: as reported by the rank that wrote it, or computed here for `.metadata`."""
        told = {
            item.storage_data.relative_path: item.sha256
            for written in results
            for item in written
            if isinstance(item, HashedWrite)
        }
        # A rank that had nothing to write leaves an empty file and reports nothing.
        empty = hashlib.sha256().hexdigest()
        own = file_sha256(self.temporary / ".metadata")
        return {name: own if name == ".metadata" else told[name] if size else empty for name, size in sizes.items()}

    def _check_visible(self, results: list[list[WriteResult]], sizes: Mapping[str, int]) -> None:
        """Check that every byte reported as written is in a file this rank sees. With node-local disks instead of a
        shared file system, the shards of other nodes would be missing."""
        for rank, written in enumerate(results):
            for result in written:
                name = result.storage_data.relative_path
                if sizes.get(name, -1) < result.storage_data.offset + result.storage_data.length:
                    raise RunError(
                        f"{name}, written by rank {rank}, is not whole where the first rank looks for it; "
                        "the checkpoint directory must be on a file system all ranks share"
                    )


def _fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def commit(temporary: Path, target: Path) -> None:
    """Rename a durable folder to its checkpoint name, replacing what has that name, and make the names durable.

    A folder cannot be renamed over another one, so an old one is first moved aside. If the process is killed between
    the two renames, both folders are left complete under names that no search finds; `prune.collect_leftovers` then
    restores the new one.
    """
    aside = move_aside(target) if target.exists() else None
    try:
        os.rename(temporary, target)
    except OSError:
        if aside is not None:
            os.rename(aside, target)
        raise
    fsync_directory(target.parent)
    if aside is not None:
        try:
            shutil.rmtree(aside)
        except OSError as error:
            logger.warning("replaced checkpoint %s was not removed: %s", aside, error)
