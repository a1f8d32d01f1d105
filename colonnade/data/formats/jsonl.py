"""JSON lines: one object per line, with the text under the key named by the text column.

A unit of an uncompressed file is a range of 8 MiB and consists of the lines that begin in that range, so the file need
not be scanned when it is opened. A compressed file is one unit, read from its beginning.

Lines are parsed one by one with Python's parser, because pyarrow 26's JSON reader crashes the process (segmentation
fault) on the line `null`. A line that is not a JSON object, whose text is not a string, or that is longer than 256 MiB
is a missing row; the text filter counts it. Blank lines are not rows.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from colonnade.data.corpus import DamagedUnit, Layout, Shard
from colonnade.data.filesystems import PositionedFile, Source, fingerprint
from colonnade.data.formats.base import ShardFile
from colonnade.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

UNIT_BYTES = 8 << 20
# Bytes read at a time, those of a .gz file, and rows yielded at a time.
_CHUNK_BYTES = 1 << 20
_COMPRESSED_BYTES = 64 << 10
_PIECE_ROWS = 1024
# A longer line is not parsed, so that a file without line ends is not held in memory.
MAX_LINE_BYTES = 256 << 20
# How much of a file is checked before the run: bytes, and lines.
_FIRST_LINES_BYTES = 1 << 20
_FIRST_LINES = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def describe(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """Cut the file into ranges. Raises UsageError unless one of its first lines is an object with the text column."""
    digest = fingerprint(source)
    start = source.read_at(0, _FIRST_LINES_BYTES)
    _check_first_lines(path, start, text_column)
    edges = range(0, source.size, UNIT_BYTES)
    sizes = tuple(min(UNIT_BYTES, source.size - edge) for edge in edges)
    return Shard(path, layout, source.size, 0, sizes, digest)


def describe_compressed(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """A shard of one unit. Raises OSError, and UsageError unless one of its first lines is an object with the text
    column."""
    digest = fingerprint(source)
    with _decompressed(source, layout) as stream:
        _check_first_lines(path, stream.read(_FIRST_LINES_BYTES), text_column)
    return Shard(path, layout, source.size, 0, (source.size,), digest)


class _GzipFile(gzip.GzipFile):
    """Python's reader, because pyarrow's refuses a file that is padded with zeros, as tapes and other devices with
    blocks of a fixed size leave them; gzip(1) ignores them too."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except zlib.error as error:
            raise EOFError(str(error)) from error


def _decompressed(source: Source, layout: Layout) -> Any:
    import pyarrow as pa

    if layout == "jsonl-gz":
        return _GzipFile(fileobj=io.BufferedReader(PositionedFile(source), _COMPRESSED_BYTES))
    # Closing the stream also closes the underlying file.
    return pa.CompressedInputStream(source.arrow(), "zstd")


def _check_first_lines(path: str, start: bytes, text_column: str) -> None:
    """Refuse a file that is not JSON lines, or whose objects have other keys. Later lines are checked when read."""
    lines = [line for line in start.split(b"\n") if line.strip()]
    if not lines:
        raise UsageError(f"data shard {path} has 0 rows; remove it from the data pattern")
    if len(start) >= _FIRST_LINES_BYTES:
        lines = lines[:-1]  # the last line is truncated
    if not lines:
        return  # a single line longer than what was read
    values = [value for line in lines[:_FIRST_LINES] if (value := _parse(line)) is not None]
    objects = [value for value in values if isinstance(value, dict)]
    if not objects:
        found = "a JSON array" if values and isinstance(values[0], list) else "not JSON lines"
        raise UsageError(f"data shard {path} is {found}; write one JSON object a line, or remove it")
    if not any(text_column in value for value in objects):
        raise UsageError(
            f"data shard {path} has no key {text_column!r} (its first line has "
            f"{', '.join(map(str, objects[0])) or 'none'}); name the key of the text with --text-column"
        )


# Integers are not used. As int, one of more than 4300 digits would be an error (and slow).
_DECODER = json.JSONDecoder(parse_int=float)


def _parse(line: bytes) -> Any:
    """The value of a line; None if it is not JSON. Bytes that are not UTF-8 become lone surrogates."""
    try:
        return _DECODER.decode(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None


def parse_line(line: bytes, text_column: str) -> tuple[bool, bytes | None]:
    """Whether a line is a JSON object, and its text as UTF-8 (None if it is missing or not a string).

    Lone surrogates, escaped or in place of bytes that are not UTF-8, are encoded as if they were characters. That is
    not UTF-8, so the text filter drops and counts the row.
    """
    value = _parse(line)
    if not isinstance(value, dict):
        return False, None
    text = value.get(text_column)
    if not isinstance(text, str):
        return True, None
    return True, text.encode("utf-8", "surrogatepass")


def _rows(lines: Iterator[bytes | None], text_column: str) -> Iterator[pa.Array]:
    """Lines as binary arrays; None is a line that is too long. Raises DamagedUnit if there are other lines and none of
    them is a JSON object."""
    import pyarrow as pa

    texts: list[bytes | None] = []
    count, size, valid = 0, 0, False
    for line in lines:
        text = None
        if line is not None:
            if not line.strip():
                continue
            is_object, text = parse_line(line, text_column)
            valid = valid or is_object
            count += 1
        texts.append(text)
        size += len(text or b"")
        if len(texts) == _PIECE_ROWS or size >= _CHUNK_BYTES:
            yield pa.array(texts, pa.large_binary())
            texts, size = [], 0
    if count and not valid:
        raise DamagedUnit(f"none of its {count} lines is a JSON object")
    if texts:
        yield pa.array(texts, pa.large_binary())


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their line ends; None for a line longer than `MAX_LINE_BYTES`, which is not kept."""
    open_parts: list[bytes] = []
    open_bytes = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        open_bytes += len(first)
        if open_bytes > MAX_LINE_BYTES:
            open_parts = []
        else:
            open_parts.append(first)
        if rest:
            yield b"".join(open_parts) if open_bytes <= MAX_LINE_BYTES else None
            yield from rest[:-1]
            open_parts, open_bytes = [rest[-1]], len(rest[-1])
    if open_bytes:
        yield b"".join(open_parts) if open_bytes <= MAX_LINE_BYTES else None


class JsonLinesFile(ShardFile):
    """An open file of JSON lines."""

    def byte_range(self, number: int) -> tuple[int, int]:
        # Begins one byte early, to see whether a line begins exactly here, and extends 64 KiB past the end, which
        # usually covers the rest of the last line.
        return max(0, number * UNIT_BYTES - 1), min(self.shard.size, (number + 1) * UNIT_BYTES + (64 << 10))

    def pieces(self, number: int) -> Iterator[pa.Array]:
        return _rows(_lines(self._chunks(number)), self._text_column)

    def _chunks(self, number: int) -> Iterator[bytes]:
        """The bytes of the lines that begin in the unit."""
        start, stop = number * UNIT_BYTES, min(self.shard.size, (number + 1) * UNIT_BYTES)
        at = self._line_begin(start, stop)
        while at is not None and at < stop:
            chunk = self._read(at, min(_CHUNK_BYTES, stop - at))
            at += len(chunk)
            if at < stop:
                yield chunk
                continue
            # The last line extends to where the next unit's first line begins.
            yield chunk
            if not chunk.endswith(b"\n"):
                yield from self._rest_of_line(at)

    def _line_begin(self, start: int, stop: int) -> int | None:
        """Offset of the first line that begins in `[start, stop)`; None (or `stop`) if no line begins there."""
        if start == 0:
            return 0
        at = start - 1
        while at < stop:
            chunk = self._read(at, min(_CHUNK_BYTES, stop - at))
            found = chunk.find(b"\n")
            if found >= 0:
                return at + found + 1
            at += len(chunk)
        return None

    def _rest_of_line(self, at: int) -> Iterator[bytes]:
        size = 64 << 10
        while at < self.shard.size:
            chunk = self._read(at, min(size, self.shard.size - at))
            found = chunk.find(b"\n")
            if found >= 0:
                yield chunk[:found]
                return
            yield chunk
            at += len(chunk)
            size = _CHUNK_BYTES

    def _read(self, start: int, size: int) -> bytes:
        data = self.source.read_at(start, size)
        if len(data) < size:
            raise DamagedUnit(f"the file ends at byte {start + len(data)} and had {self.shard.size}")
        return data


class CompressedJsonLinesFile(ShardFile):
    """An open file of compressed JSON lines."""

    def byte_range(self, number: int) -> tuple[int, int]:
        return 0, self.shard.size

    def pieces(self, number: int) -> Iterator[pa.Array]:
        return _rows(_lines(self._chunks()), self._text_column)

    def _chunks(self) -> Iterator[bytes]:
        with _decompressed(self.source, self.shard.layout) as stream:
            size = 0
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                yield chunk
            if size == 0:
                raise DamagedUnit("the file is empty")
