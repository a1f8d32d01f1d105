"""Plain text: one long text, cut into rows of at most 64 KiB whose concatenation is the file, every byte kept.

A row ends after the last blank line in its 64 KiB; if there is none, after the last line end; else between two
characters. A unit is about 8 MiB. It begins at the first such place after a multiple of 8 MiB, so any unit can be cut
without reading the text before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from colonnade.data.corpus import DamagedUnit, Layout, Shard
from colonnade.data.filesystems import Source, fingerprint
from colonnade.data.formats.base import ShardFile
from colonnade.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

UNIT_BYTES = 8 << 20
ROW_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_BLANK_LINES = (b"\n\n", b"\n\r\n")


def describe(source: Source, path: str, layout: Layout, text_column: str) -> Shard:
    """Cut the file into ranges. Raises UsageError for a file that is empty, begins with a UTF-16 byte order mark or has
    a NUL in its first 4 KiB."""
    start = source.read_at(0, 4096)
    if not start:
        raise UsageError(f"data shard {path} has 0 rows; remove it from the data pattern")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise UsageError(f"data shard {path} is not UTF-8 text; convert it, or remove it from the data pattern")
    edges = range(0, source.size, UNIT_BYTES)
    sizes = tuple(min(UNIT_BYTES, source.size - edge) for edge in edges)
    return Shard(path, layout, source.size, 0, sizes, fingerprint(source))


def row_end(data: bytes) -> int:
    """Where the first row of `data` ends: `data` is 64 KiB, or less at the end of a unit."""
    if len(data) < ROW_BYTES:
        return len(data)
    blank = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _BLANK_LINES)
    return blank or data.rfind(b"\n") + 1 or character_start(data, len(data))


def character_start(data: bytes, at: int) -> int:
    """The last offset up to `at` that is not inside a UTF-8 character; `at` itself if the bytes are not UTF-8."""
    window = data[max(0, at - 4) : at]
    for back in range(1, len(window) + 1):
        byte = window[-back]
        if byte & 0xC0 != 0x80:
            length = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return at - back if length > back else at
    return at


def unit_begin(data: bytes) -> int:
    """Where a unit begins in `data`, the 64 KiB from a multiple of 8 MiB on: after the first blank line, else after the
    first line end, else before the first whole character."""
    found = [data.find(mark) + len(mark) for mark in _BLANK_LINES if mark in data]
    if found:
        return min(found)
    if b"\n" in data:
        return data.find(b"\n") + 1
    return next((index for index in range(min(4, len(data))) if data[index] & 0xC0 != 0x80), 0)


class TextFile(ShardFile):
    """An open text file."""

    def byte_range(self, number: int) -> tuple[int, int]:
        return number * UNIT_BYTES, min(self.shard.size, (number + 1) * UNIT_BYTES + ROW_BYTES)

    def pieces(self, number: int) -> Iterator[pa.Array]:
        import pyarrow as pa

        start, stop = self._edge(number), self._edge(number + 1)
        rows: list[bytes] = []
        carried = b""
        at = start
        while at < stop or carried:
            data = carried + self._read(at, min(_PIECE_BYTES, stop - at))
            at = min(stop, at + _PIECE_BYTES)
            begin = 0
            # Cut a row only when all of its 64 KiB are available, or when nothing follows.
            while begin < len(data) and (len(data) - begin >= ROW_BYTES or at == stop):
                end = begin + row_end(data[begin : begin + ROW_BYTES])
                rows.append(data[begin:end])
                begin = end
            carried = data[begin:]
            yield pa.array(rows, pa.large_binary())
            rows = []

    def _edge(self, number: int) -> int:
        """Where unit `number` begins."""
        at = number * UNIT_BYTES
        if number == 0 or at >= self.shard.size:
            return min(at, self.shard.size)
        return at + unit_begin(self._read(at, min(ROW_BYTES, self.shard.size - at)))

    def _read(self, start: int, size: int) -> bytes:
        data = self.source.read_at(start, size)
        if len(data) < size:
            raise DamagedUnit(f"the file ends at byte {start + len(data)} and had {self.shard.size}")
        return data
