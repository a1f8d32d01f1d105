"""The names of checkpoint folders, the contents of MANIFEST.json, and whether all files of a checkpoint are present.

This module does not import torch, so that commands that only look at checkpoints start quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from colonnade.errors import UsageError
from colonnade.setting_values import brief

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FORMAT = "colonnade-checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
OWN_HASH = "sha256"
_KEYS = {"format", "format_version", "step", "optimizer", "libraries", "files", "run", OWN_HASH}
TEMPORARY_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
SINGLE_FILE_SUFFIX = ".pth"

_NAME = re.compile(r"streaming_checkpoint_step_(0|[1-9][0-9]*)(?:\.pth)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORDED_LIBRARIES = ("torch", "numpy", "pyarrow", "tokenizers", "transformers")


@dataclass(frozen=True)
class Manifest:
    """The contents of MANIFEST.json.

    Attributes:
        step: optimizer steps taken.
        files: name and size in bytes of every other file of the folder.
        optimizer: class name of the optimizer whose state the folder holds; None for a model alone.
        libraries: versions of the libraries at the save.
        run: the mapping given to `save_checkpoint`, after a round trip through JSON.
        sha256: SHA-256 of each of `files`, in hexadecimal; empty if the checkpoint was saved without hashes.
    """

    step: int
    files: dict[str, int]
    optimizer: str | None
    libraries: dict[str, str]
    run: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of MANIFEST.json.

        Raises:
            ValueError, TypeError: `run` holds what JSON cannot express (NaN, infinity, objects).
        """
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "optimizer": self.optimizer,
            "libraries": self.libraries,
            "files": {
                name: {"bytes": size, "sha256": self.sha256[name]} if self.sha256 else {"bytes": size}
                for name, size in sorted(self.files.items())
            },
            "run": self.run,
        }
        return json.dumps({**content, OWN_HASH: content_hash(content)}, indent=2, allow_nan=False) + "\n"


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own hash, independent of the file's formatting and key order.

    Raises:
        ValueError, TypeError: as `Manifest.to_json`.
    """
    plain = {key: value for key, value in content.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint taken after `step` optimizer steps."""
    return f"streaming_checkpoint_step_{step}"


def step_of_name(name: str) -> int | None:
    """The step in the name of a checkpoint folder or single file; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


@cache
def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that affect a checkpoint's content."""
    found = {}
    for name in _RECORDED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json into `folder` and return once its bytes are durable."""
    with (folder / MANIFEST_NAME).open("x", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint folder `path`, without looking at the files it lists.

    Raises:
        UsageError: it is missing, damaged, of another format version, or lists a path outside the folder.
    """
    file = path / MANIFEST_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not a complete checkpoint: it has no {MANIFEST_NAME}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{file} is not a checkpoint manifest: its format is not {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{file} has format version {content.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    manifest = _parse(file, content)
    if unknown := sorted(content.keys() - _KEYS):
        raise UsageError(f"{file} is damaged: it has an entry {unknown[0][:40]!r} that no manifest has")
    # A manifest without its own hash is accepted: removing it is how a manifest is edited by hand.
    if OWN_HASH in content and content[OWN_HASH] != content_hash(content):
        raise UsageError(f"{file} is damaged: its content does not have the SHA-256 that it records of itself")
    return manifest


def _parse(file: Path, content: dict[str, Any]) -> Manifest:
    step, optimizer = content.get("step"), content.get("optimizer")
    libraries, files, run = content.get("libraries"), content.get("files"), content.get("run")
    if type(step) is not int or step < 0:
        raise UsageError(f"{file} is damaged: step is {step!r}, not a number of steps")
    if not (optimizer is None or isinstance(optimizer, str)):
        raise UsageError(f"{file} is damaged: optimizer is {optimizer!r}, not a name")
    if not isinstance(run, dict) or not isinstance(libraries, dict):
        raise UsageError(f"{file} is damaged: run or libraries is missing")
    if not isinstance(files, dict) or not files:
        raise UsageError(f"{file} is damaged: it lists no files")
    sizes, hashes = {}, {}
    for name, facts in files.items():
        size = facts.get("bytes") if isinstance(facts, dict) else None
        if type(size) is not int or size < 0:
            raise UsageError(f"{file} is damaged: the size of {name!r} is {size!r}")
        if not is_plain_file_name(name):
            raise UsageError(f"{file} lists {name!r}, which is not the name of a file inside the checkpoint")
        sizes[name] = size
        if "sha256" in facts:
            hashes[name] = facts["sha256"]
            if not (isinstance(hashes[name], str) and _SHA256.fullmatch(hashes[name])):
                raise UsageError(f"{file} is damaged: the SHA-256 of {name!r} is {brief.repr(hashes[name])}")
    if hashes and len(hashes) < len(sizes):
        lacking = next(name for name in sizes if name not in hashes)
        raise UsageError(f"{file} is damaged: the SHA-256 of {lacking!r} is missing")
    return Manifest(step, sizes, optimizer, libraries, run, hashes)


def is_plain_file_name(name: str) -> bool:
    """Whether `name` can only refer to a file directly inside the folder it is looked up in."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


def read_complete_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint folder `path` and check that each file it lists exists with its size.

    Raises:
        UsageError: as for `read_manifest`, or a file is missing, is not a regular file or has another size; names the
            file, and both sizes if they differ.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        try:
            # lstat: a link would let a checkpoint point at files outside its folder.
            status = (path / name).lstat()
        except OSError as error:
            raise UsageError(f"{path} is damaged: {name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is damaged: {name} is not a regular file")
        if status.st_size != expected:
            raise UsageError(f"{path} is damaged: {name} has {status.st_size} bytes, its manifest says {expected}")
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read once through a small buffer. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(1 << 20))
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def require_recorded_hash(path: Path, manifest: Manifest, name: str) -> None:
    """Check that the file `name` of the checkpoint folder `path` has the recorded SHA-256. Reads the whole file.

    Raises:
        UsageError: the hash differs, or the file cannot be read.
    """
    try:
        found = file_sha256(path / name)
    except OSError as error:
        raise UsageError(f"{path} is damaged: {name} cannot be read: {error.strerror}") from None
    if found != manifest.sha256[name]:
        raise UsageError(
            f"{path} is damaged: {name} has SHA-256 {found[:16]}..., its manifest says {manifest.sha256[name][:16]}..."
        )


def fsync_directory(path: Path) -> None:
    """Make the directory entries of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
