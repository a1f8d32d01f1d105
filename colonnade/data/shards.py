"""Shards: finding Parquet and Arrow files, checking them before a run, reading one row group of text at a time.

A *unit* is one row group (Parquet) or one record batch (Arrow IPC file or stream). It is what a damaged page costs, and
the most that a resume reads again.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from colonnade.errors import RunError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_GLOBS = ("data/*.parquet", "data/*.arrow", "../data/*.parquet")

Layout = Literal["parquet", "arrow-file", "arrow-stream"]
_MAGIC: tuple[tuple[bytes, Layout], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow-file"),
    (b"\xff\xff\xff\xff", "arrow-stream"),
)
_SUFFIXES: dict[str, Layout] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".feather": "arrow-file",
    ".arrow": "arrow-stream",
    ".arrows": "arrow-stream",
    ".ipc": "arrow-stream",
}
# Footers are small and read at latency, not at bandwidth: threads help even where cores are few.
_FOOTER_THREADS = 8


class DamagedUnit(Exception):
    """One unit cannot be decoded. `rows` is how many it was said to hold (0 where that cannot be told)."""

    def __init__(self, reason: str, rows: int = 0) -> None:
        super().__init__(reason)
        self.rows = rows


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, as its footer (or, for an Arrow stream, its message headers) describes it."""

    path: Path
    layout: Layout
    size: int  # bytes
    rows: int
    units: int  # row groups or record batches
    # Byte ranges of the messages of an Arrow stream, which has no footer to ask: the schema and its dictionaries, and
    # for each record batch its own range with the number of dictionaries that stand before it.
    prologue: tuple[tuple[int, int], ...] = ()
    batches: tuple[tuple[int, int, int], ...] = ()

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def unit_bytes(self) -> tuple[int, ...]:
        return (self.size // self.units,) * self.units


@dataclass(frozen=True, slots=True)
class Manifest:
    """What identifies a corpus: the ordered names, sizes, rows and row groups, but not the folder it lies in."""

    digest: str
    files: int
    rows: int
    shard_digests: tuple[str, ...]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Manifest:
        """Manifest of `shards` in their order."""
        described = [json.dumps([shard.path.name, shard.size, shard.rows, shard.units]) for shard in shards]
        digests = tuple(hashlib.blake2b(d.encode(), digest_size=4).hexdigest() for d in described)
        digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
        return cls(digest=digest, files=len(shards), rows=sum(shard.rows for shard in shards), shard_digests=digests)


class Units:
    """All units of a corpus in stream order, addressed by one ordinal."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._ends = list(accumulate(shard.units for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def unit_bytes(self) -> list[int]:
        return [size for shard in self.shards for size in shard.unit_bytes]

    def locate(self, ordinal: int) -> tuple[Shard, int]:
        """The shard that holds unit `ordinal`, and the unit's number inside it."""
        index = bisect_right(self._ends, ordinal)
        shard = self.shards[index]
        return shard, ordinal - (self._ends[index] - shard.units)

    def describe(self, ordinal: int) -> str:
        """`row group 3 of /data/shard_2.parquet`, for messages."""
        shard, number = self.locate(ordinal)
        noun = "row group" if shard.layout == "parquet" else "record batch"
        return f"{noun} {number} of {shard.path}"


# --- finding ---------------------------------------------------------------------------------------------------------


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Sort key under which `shard_2` comes before `shard_10`; equal numbers written differently keep a fixed order."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def discover_shards(pattern: str) -> list[Path]:
    """Files that `pattern` matches: globs (`**` allowed) separated by commas.

    Each glob's files come in natural order, globs in the order given, and a file matched twice comes once.

    Raises:
        UsageError: a glob matches no file.
    """
    found: dict[Path, None] = {}
    globs = [part.strip() for part in pattern.split(",") if part.strip()]
    if not globs:
        raise UsageError(f"data pattern {pattern!r} is empty; give a glob such as 'data/*.parquet'")
    for one in globs:
        matches = glob.glob(os.path.expanduser(one), recursive=True)
        files = [Path(match) for match in sorted(matches, key=natural_key) if os.path.isfile(match)]
        if not files:
            folder = next((match for match in matches if os.path.isdir(match)), None)
            remedy = (
                f"{folder!r} is a folder: write {os.path.join(folder, '*.parquet')!r}" if folder else "check the path"
            )
            raise UsageError(f"data pattern {one!r} matches no file; {remedy}")
        found.update(dict.fromkeys(files))
    return list(found)


def find_default_shards() -> list[Path]:
    """Shards in the usual places (`DEFAULT_GLOBS`): those of the first place that holds any, else an empty list."""
    for pattern in DEFAULT_GLOBS:
        if any(os.path.isfile(match) for match in glob.glob(pattern)):
            return discover_shards(pattern)
    return []


# --- checking before a run -------------------------------------------------------------------------------------------


def open_shards(paths: Sequence[str | Path], text_column: str) -> list[Shard]:
    """Read every shard's footer, in parallel, and check that it holds rows and a column of text.

    Raises:
        UsageError: naming the first file (in order) that is missing, damaged, foreign, empty or without `text_column`.
    """
    if not paths:
        raise UsageError("no data shards were given; give at least one Parquet or Arrow file")
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(paths)), thread_name_prefix="footer") as pool:
        return list(pool.map(lambda path: open_shard(Path(path), text_column), paths))


def open_shard(path: Path, text_column: str) -> Shard:
    """Describe one shard from its footer. Raises UsageError as `open_shards` does."""
    import pyarrow as pa

    try:
        layout = detect_layout(path)
        size = path.stat().st_size
        if layout == "parquet":
            schema, rows, units = _inspect_parquet(path)
            shard = Shard(path, layout, size, rows, units)
        elif layout == "arrow-file":
            schema, rows, units = _inspect_arrow_file(path)
            shard = Shard(path, layout, size, rows, units)
        else:
            schema, shard = _inspect_arrow_stream(path, size)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UsageError(f"data shard {path} cannot be read ({_one_line(error)}); replace or remove it") from error
    _check_text_column(path, schema, text_column)
    if shard.rows == 0:
        raise UsageError(f"data shard {path} has 0 rows; remove it from the data pattern")
    return shard


def detect_layout(path: Path) -> Layout:
    """Layout by content, or by suffix where the first bytes say nothing. Raises UsageError for a foreign file."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, layout in _MAGIC:
        if start.startswith(magic):
            return layout
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    raise UsageError(f"data shard {path} is neither Parquet nor Arrow IPC; convert it or narrow the data pattern")


def _inspect_parquet(path: Path) -> tuple[pa.Schema, int, int]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.schema_arrow, file.metadata.num_rows, file.metadata.num_row_groups


def _inspect_arrow_file(path: Path) -> tuple[pa.Schema, int, int]:
    import pyarrow as pa
    import pyarrow.dataset

    with pa.OSFile(str(path)) as source:
        reader = pa.ipc.open_file(source)
        schema, units = reader.schema, reader.num_record_batches
    # The footer lists the batches but not their rows; the dataset API reads those from the batch headers alone.
    return schema, pyarrow.dataset.dataset(str(path), format="ipc").count_rows(), units


def _inspect_arrow_stream(path: Path, size: int) -> tuple[pa.Schema, Shard]:
    """Walk a stream's message headers. Memory-mapped, so that bodies are not read where they are not compressed."""
    import pyarrow as pa

    prologue: list[tuple[int, int]] = []
    batches: list[tuple[int, int, int]] = []
    with pa.memory_map(str(path)) as source:
        while True:
            start = source.tell()
            try:
                message = pa.ipc.read_message(source)
            except EOFError:
                break
            if message.type == "record batch":
                batches.append((start, source.tell(), len(prologue)))
            else:
                prologue.append((start, source.tell()))
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        schema = reader.schema
        rows = sum(batch.num_rows for batch in reader)
    return schema, Shard(path, "arrow-stream", size, rows, len(batches), tuple(prologue), tuple(batches))


def _check_text_column(path: Path, schema: pa.Schema, text_column: str) -> None:
    if schema.get_field_index(text_column) < 0:
        raise UsageError(
            f"data shard {path} has no column {text_column!r} (it has {', '.join(schema.names) or 'none'}); "
            "every shard needs a column of text"
        )
    kind = schema.field(text_column).type
    if not _holds_text(kind):
        raise UsageError(
            f"column {text_column!r} of data shard {path} is of type {kind}, not text; convert it to string"
        )


def _holds_text(kind: pa.DataType) -> bool:
    """Strings, and bytes too (writers that leave out the string annotation are common); `null` is all rows missing."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*checks, types.is_binary_view, types.is_null))


# --- reading ---------------------------------------------------------------------------------------------------------


class UnitReader:
    """Reads the text column of one unit at a time and keeps the file of the last one open.

    Files are read, never memory-mapped: a file cut short under a running job must be an error, not a bus error.
    """

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column
        self._path: Path | None = None
        self._file: Any = None

    def read(self, shard: Shard, number: int) -> list[pa.Array]:
        """The whole text column of unit `number` of `shard`, decoded and checked.

        Raises:
            DamagedUnit: the bytes are there and wrong (checksum, encoding, truncation).
            RunError: the file cannot be reached (missing, no permission, I/O error). Never a skip: a lost mount would
                silently skip the rest of the corpus.
        """
        import pyarrow as pa

        try:
            if shard.layout == "parquet":
                return self._read_parquet(shard, number)
            return self._read_arrow(shard, number)
        except OSError as error:
            # pyarrow raises OSError for bad data as well; only what the system reports carries an errno.
            if error.errno is not None:
                raise RunError(f"data shard {shard.path} cannot be reached: {_one_line(error)}") from error
            raise DamagedUnit(_one_line(error)) from error
        except (pa.ArrowException, EOFError) as error:
            raise DamagedUnit(_one_line(error)) from error

    def windows(self, shard, number):
        for column in self.read(shard, number):
            yield column

    def expect(self, shard, number):
        pass

    def close(self) -> None:
        """Close the file that is still open."""
        if self._file is not None:
            self._file.close()
        self._path = self._file = None

    def _read_parquet(self, shard: Shard, number: int) -> list[pa.Array]:
        import pyarrow.parquet as pq

        if self._path != shard.path:
            self.close()
            self._file = pq.ParquetFile(shard.path, page_checksum_verification=True)
            self._path = shard.path
        expected = self._file.metadata.row_group(number).num_rows if number < self._file.num_row_groups else 0
        try:
            # The columns of one row group are one column chunk here: pyarrow's threads would have nothing to share.
            table = self._file.read_row_group(number, columns=[self._text_column], use_threads=False)
        except OSError as error:
            if error.errno is not None:
                raise
            raise DamagedUnit(_one_line(error), expected) from error
        if table.num_rows != expected:
            raise DamagedUnit(f"{table.num_rows} rows where the footer promises {expected}", expected)
        return _checked(table.column(self._text_column).chunks)

    def _read_arrow(self, shard: Shard, number: int) -> list[pa.Array]:
        import pyarrow as pa

        if self._path != shard.path:
            self.close()
            self._file = pa.OSFile(str(shard.path))
            self._path = shard.path
        if shard.layout == "arrow-file":
            reader = pa.ipc.open_file(self._file)
            only_text = pa.ipc.IpcReadOptions(included_fields=[reader.schema.get_field_index(self._text_column)])
            batch = pa.ipc.open_file(self._file, options=only_text).get_batch(number)
        else:
            begin, end, dictionaries = shard.batches[number]
            ranges = (*shard.prologue[:dictionaries], (begin, end))
            data = b"".join(self._file.read_at(stop - start, start) for start, stop in ranges)
            reader = pa.ipc.open_stream(data)
            only_text = pa.ipc.IpcReadOptions(included_fields=[reader.schema.get_field_index(self._text_column)])
            batch = pa.ipc.open_stream(data, options=only_text).read_next_batch()
        return _checked([batch.column(self._text_column)])


def _checked(columns: list[pa.Array]) -> list[pa.Array]:
    """The arrays, after a check that their offsets stay inside their data. Arrow IPC carries no checksums, and a wrong
    offset would be read as an address. UTF-8 is not judged here: one bad row is the filter's business."""
    import pyarrow as pa
    import pyarrow.types as types

    for column in columns:
        kind = column.type
        if types.is_string(kind):
            column.view(pa.binary()).validate(full=True)
        elif types.is_large_string(kind):
            column.view(pa.large_binary()).validate(full=True)
        elif types.is_string_view(kind):
            column.view(pa.binary_view()).validate(full=True)
        else:
            column.validate(full=True)
    return columns


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
