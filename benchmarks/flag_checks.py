"""Checks of flags that the benchmarks make before they measure anything."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from colonnade.errors import UsageError


def require_at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{flag} is {value}; it must be at least 1")


def names(flag: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a comma-separated list, in the order of `known`. Raises UsageError for an unknown name."""
    found = text.split(",")
    unknown = [name for name in found if name not in known]
    if unknown:
        raise UsageError(f"{flag} names {unknown[0]!r}; it takes {','.join(known)}")
    return [name for name in known if name in found]


def counts(flag: str, text: str) -> list[int]:
    """The numbers in a comma-separated list. Raises UsageError unless each is a whole number above 0."""
    found = text.split(",")
    if not all(count.isdecimal() and int(count) for count in found):
        raise UsageError(f"{flag} is {text!r}; it takes numbers above 0, as in 1,2,4")
    return [int(count) for count in found]


def make_folder(flag: str, path: str | Path | None) -> None:
    """Create the folder for measurements if it is missing; None means no folder. Raises UsageError."""
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be made: {error.strerror or error}; name another folder") from error
