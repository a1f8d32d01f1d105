"""What every benchmark asks of its flags before it measures anything."""

from __future__ import annotations

from pathlib import Path

from colonnade.errors import UsageError


def require_at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{flag} is {value}; it must be at least 1")


def require_writable(flag: str, path: str | Path | None) -> None:
    """Refuse a file that could not be written when all is measured; None is no file."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file")
    if not Path(path).parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {Path(path).parent}; make it first")


def make_folder(flag: str, path: str | Path | None) -> None:
    """Make a folder for what is measured, where it is not there; None is no folder."""
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be made: {error.strerror or error}; name another folder") from error
