"""Writing small files: atomically by rename, so that neither a reader nor a crash leaves a partial file, or plainly."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from colonnade.errors import RunError, UsageError


def replace_file(path: Path, content: str | bytes) -> None:
    """Atomically replace the file at `path` with `content`: write it aside, fsync, then rename.

    A file that is replaced keeps its permissions; a new one gets the default ones. Raises OSError and then leaves
    `path` unchanged.
    """
    # The name is unique per writer: ranks on several nodes may share both the folder and a process id.
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            aside.chmod(path.stat().st_mode & 0o777)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def require_place(flag: str, path: str | Path | None) -> None:
    """Refuse an output path, before the work starts, that could not be written at its end; None means no file.

    Raises UsageError.
    """
    if path is None:
        return
    place = Path(path).absolute()
    if place.is_dir():
        why = "this is a folder"
    elif not place.parent.is_dir():
        why = f"there is no folder {place.parent}"
    else:
        return
    raise UsageError(f"{flag} {path} cannot be a file: give one in a folder that exists ({why})")


def require_free(flag: str, path: Path) -> None:
    """Refuse an output path that already exists or whose parent folder does not. Raises UsageError."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{flag} {path} exists; move it away, or give another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.absolute().parent}")


def write_text(file: str | Path, text: str, shown: str | None = None) -> None:
    """Write a text file. Raises RunError, whose message names the file as `shown`, or by its path."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{shown or file} cannot be written: {error.strerror or error}") from error
