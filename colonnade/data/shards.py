"""Shards, from a pattern to text: the entry point to the modules that find, check and read them.

1. `discover_shards` finds files (`colonnade/data/discovery.py`), local or remote (`colonnade/data/filesystems.py`).
2. `open_shards` reads their footers and checks them before a run (here and in `colonnade/data/formats/`).
3. `Units` addresses their units; `Manifest` identifies the set of shards (`colonnade/data/corpus.py`).
4. `UnitReader` reads one unit at a time (`colonnade/data/unit_reader.py`), in windows (`colonnade/data/windows.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from colonnade.data.corpus import WINDOW_BYTES, DamagedUnit, Layout, Manifest, Shard, Units
from colonnade.data.discovery import DEFAULT_GLOBS, default_data_glob, discover_shards, natural_key
from colonnade.data.filesystems import local_path, open_source
from colonnade.data.formats import DESCRIBE, detect_layout
from colonnade.data.retries import UnreachableError
from colonnade.data.unit_reader import UnitReader
from colonnade.errors import UsageError, message_line

__all__ = [
    "DEFAULT_GLOBS",
    "WINDOW_BYTES",
    "BadShardError",
    "DamagedUnit",
    "Layout",
    "Manifest",
    "Shard",
    "UnitReader",
    "Units",
    "default_data_glob",
    "discover_shards",
    "natural_key",
    "open_shard",
    "open_shards",
    "open_usable_shards",
]

# Footers are small, so reading them is bound by latency, not bandwidth: threads help even with few cores.
_FOOTER_THREADS = 8


class BadShardError(UsageError):
    """A file can be read but not used: it is damaged, in an unknown format, empty, or has no text column."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


def open_shards(paths: Sequence[str | Path], text_column: str) -> list[Shard]:
    """Describe every shard, in parallel, and check that each has rows and a text column.

    Raises:
        UsageError: a file is missing or cannot be reached; names the first one in order.
        BadShardError: a file cannot be used; names the first one in order.
    """
    return open_usable_shards(paths, text_column, strict=True)[0]


def open_usable_shards(
    paths: Sequence[str | Path], text_column: str, *, strict: bool = False
) -> tuple[list[Shard], list[BadShardError]]:
    """Describe the shards that can be used, and say why the others cannot; both lists are in order.

    Raises:
        UsageError: a file is missing or cannot be reached, so nothing is known about its content.
        BadShardError: none can be used or, with `strict`, not all of them; it is the error of the first bad one.
    """
    if not paths:
        raise UsageError("no data shards were given; give at least one file")

    def describe(path: str | Path) -> Shard | BadShardError:
        try:
            return open_shard(str(path), text_column)
        except BadShardError as error:
            return error

    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(paths)), thread_name_prefix="footer") as pool:
        found = list(pool.map(describe, paths))
    bad = [each for each in found if isinstance(each, BadShardError)]
    if len(bad) == len(found) or (strict and bad):
        raise bad[0]
    return [each for each in found if isinstance(each, Shard)], bad


def open_shard(path: str, text_column: str) -> Shard:
    """Describe one shard. Raises UsageError and BadShardError as `open_shards` does."""
    import pyarrow as pa

    path = local_path(path)
    try:
        source = open_source(path)
    except OSError as error:
        raise UsageError(_unreadable(path, error)) from error
    except UnreachableError as error:
        raise UsageError(str(error)) from error
    try:
        layout = detect_layout(path, source.read_at(0, 8))
        shard = DESCRIBE[layout](source, path, layout, text_column)
    except (pa.ArrowException, OSError, EOFError, UnreachableError, UsageError) as error:
        if source.failure is not None:
            raise UsageError(str(source.failure)) from error
        if isinstance(error, OSError) and error.errno is not None:  # a system error: pyarrow's own have no errno
            raise UsageError(_unreadable(path, error)) from error
        reason = str(error) if isinstance(error, UsageError) else _unreadable(path, error)
        raise BadShardError(path, reason) from error
    finally:
        source.close()
    if layout in ("parquet", "arrow-file", "arrow-stream") and shard.rows == 0:
        raise BadShardError(path, f"data shard {path} has 0 rows; remove it from the data pattern")
    return shard


def _unreadable(path: str, error: Exception) -> str:
    reason = message_line(error)
    return f"data shard {path} cannot be read ({reason}); replace or remove it"
