"""Finding shards, in natural order: globs over local paths and over remote file systems that can list files."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from pathlib import Path

from colonnade.data.filesystems import expand_url, is_remote, local_path
from colonnade.errors import UsageError

_DATA_SUFFIX = re.compile(
    r"\.(parquet|pq|feather|arrows?|ipc|txt|npy|bin|(jsonl|ndjson|json)(\.gz|\.zst|\.zstd)?)$"
)  # as in `formats`, which opens files and so needs libraries
DEFAULT_GLOBS = ("data/*.parquet", "data/*.arrow", "../data/*.parquet")


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Sort key that puts `shard_2` before `shard_10`; numbers that are equal but written differently (1, 01) also have
    a fixed order."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def discover_shards(pattern: str) -> list[str]:
    """Files that `pattern` matches: globs (`**` allowed) of local paths or URLs, separated by commas.

    Globs keep the order given, and the files of each glob are in natural order. A file matched twice is listed once,
    under its first spelling; local files are the same if their real paths are. A URL without a wildcard is taken as it
    is; whether it exists shows when it is opened.

    Raises:
        UsageError: a glob matches no file or a dangling symbolic link, or a file system cannot be listed.
    """
    found: dict[str, str] = {}
    globs = [part.strip() for part in pattern.split(",") if part.strip()]
    if not globs:
        raise UsageError(f"data pattern {pattern!r} is empty; give a glob such as 'data/*.parquet'")
    for one in globs:
        files = expand_url(one) if is_remote(one) else _local_files(local_path(one))
        if not files:
            raise UsageError(f"data pattern {one!r} matches no file; {_remedy(one, several=len(globs) > 1)}")
        for file in sorted(files, key=natural_key):
            found.setdefault(file if is_remote(file) else os.path.realpath(file), file)
    return list(found.values())


def _remedy(pattern: str, *, several: bool) -> str:
    """What the user can do about a pattern that matches nothing; `several` if others were given with it."""
    path = os.path.expanduser(local_path(pattern))
    if not is_remote(pattern) and os.path.exists(path):
        return f"* ? and [ are wildcards; for this path itself write {glob.escape(path)!r}"
    if re.match(r"[A-Za-z0-9_.-]+=", pattern):
        return "check the path; to give a corpus a name, write name=glob:weight"
    return "check the path" + (" (commas separate patterns; for a comma in a path write ?)" if several else "")


def _local_files(pattern: str) -> list[str]:
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    for match in matches:
        # A link to a disk that is not mounted must not silently shrink the corpus.
        if os.path.islink(match) and not os.path.exists(match):
            raise UsageError(
                f"data pattern {pattern!r} matches {match!r}, a symbolic link to {os.readlink(match)!r}, which is not "
                "there; mount or restore that, or remove the link"
            )
    files = [match for match in matches if os.path.isfile(match)]
    folder = next((match for match in matches if os.path.isdir(match)), None)
    if folder and not files:
        raise UsageError(
            f"data pattern {pattern!r} matches no file; {folder!r} is a folder: "
            f"write {os.path.join(folder, '*' + _suffix_in(folder))!r}"
        )
    return files


def _suffix_in(folder: str) -> str:
    """The suffix that most of a folder's data files have; `.parquet` if there are none."""
    names = [name.lower() for name in os.listdir(folder) if not name.startswith(".")]
    counts = Counter(found[0] for name in names if (found := _DATA_SUFFIX.search(name)))
    return counts.most_common(1)[0][0] if counts else ".parquet"


def default_data_glob() -> str | None:
    """The first of `DEFAULT_GLOBS` that matches a file, or a link whose file is missing; None if none does."""
    found = (pattern for pattern in DEFAULT_GLOBS if any(not os.path.isdir(match) for match in glob.glob(pattern)))
    return next(found, None)
