"""Writing small files: in one rename, so that a reader or a crash never meets half of one, or plainly."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from colonnade.errors import RunError, UsageError


def replace_file(path: Path, content: str | bytes) -> None:
    """Put `content` in place of the file at `path` in one rename, after it is on disk.

    A file that is replaced keeps its permissions, a new one gets the usual ones. Raises OSError; `path` is then as
    before.
    """
    # A name of its own for every writer: ranks on several nodes may share both the folder and a process id.
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
    """Refuse a file that could not be written when all is done; None is no file. Raises UsageError."""
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
    """Refuse an output that is there already, or has no place. Raises UsageError."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{flag} {path} exists; move it away, or give another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.absolute().parent}")


def write_text(file: str | Path, text: str, shown: str | None = None) -> None:
    """Write a text file. Raises RunError, which calls it `shown`, or by its path."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{shown or file} cannot be written: {error.strerror or error}") from error
