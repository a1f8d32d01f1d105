"""Cutting a unit into windows: whole rows, about `WINDOW_BYTES` of text, boundaries that depend only on the file.

Columns arrive in small pieces, of whatever type the file stores, and windows are arrays of one type. A window's text is
in an anonymous mapping, whose memory returns to the system when the window is freed. A general allocator would keep a
different amount in every thread, so that the memory of a lane could not be bounded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from colonnade.data.corpus import WINDOW_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

# Added to the size of each row's text, so that rows without text also count towards a window's limit.
_ROW_BYTES = 8
# Rows taken from a stored array at a time.
PIECE_ROWS = 1024


def cut_windows(pieces: Iterable[pa.Array], limit: int = WINDOW_BYTES) -> Iterator[pa.Array]:
    """Windows (`large_string`, not checked for UTF-8) over the rows of `pieces`, of strings or bytes of any type.

    A window ends before the row that would make it exceed `limit` bytes, counting text plus 8 bytes per row; a larger
    row is a window of its own. No window is empty.
    """
    window = _Window(limit)
    for piece in pieces:
        for start in range(0, len(piece), PIECE_ROWS):
            offsets, data, valid = _raw(piece.slice(start, PIECE_ROWS))
            ends = np.cumsum(np.diff(offsets) + _ROW_BYTES)
            row = 0
            while row < len(ends):
                done = int(ends[row - 1]) if row else 0
                stop = int(np.searchsorted(ends, done + window.room, side="right"))
                if stop == row:
                    if window.rows:
                        yield window.finish()
                        window = _Window(limit)
                        continue
                    stop = row + 1
                    window = _Window(int(ends[row]) - done)
                window.add(offsets[row : stop + 1], data, valid[row:stop])
                row = stop
                if window.room == 0:
                    yield window.finish()
                    window = _Window(limit)
    if window.rows:
        yield window.finish()


class _Window:
    """Collects the text of rows in one anonymous mapping of `limit` bytes, whose untouched pages cost nothing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._map: mmap.mmap | None = None
        self._ends: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._valid: list[npt.NDArray[np.bool_]] = []
        self._filled = 0
        self.rows = 0

    @property
    def room(self) -> int:
        """Bytes that still fit, counting text plus `_ROW_BYTES` per row."""
        return self._limit - self._filled - _ROW_BYTES * self.rows

    def add(self, offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> None:
        """Append the rows of `data` delimited by `offsets`."""
        if self._map is None:
            self._map = mmap.mmap(-1, max(self._limit, 1))
        first, last = int(offsets[0]), int(offsets[-1])
        np.frombuffer(self._map, np.uint8)[self._filled : self._filled + last - first] = data[first:last]
        self._ends.append(offsets[1:] - first + self._filled)
        self._valid.append(valid.copy())
        self._filled += last - first
        self.rows += len(valid)

    def finish(self) -> pa.Array:
        import pyarrow as pa

        assert self._map is not None
        valid = np.concatenate(self._valid)
        bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
        text = pa.py_buffer(np.frombuffer(self._map, np.uint8)[: self._filled])
        buffers = [bits, pa.py_buffer(np.concatenate(self._ends)), text]
        return pa.Array.from_buffers(pa.large_string(), self.rows, buffers)


def _raw(piece: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """A piece of N rows as offsets [N + 1] into bytes, the bytes, and which rows are not null [N]."""
    import pyarrow as pa

    if pa.types.is_null(piece.type):
        return np.zeros(len(piece) + 1, np.int64), np.zeros(0, np.uint8), np.zeros(len(piece), np.bool_)
    wide = piece.cast(pa.large_binary())
    _, offset_buffer, data_buffer = wide.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[wide.offset : wide.offset + len(wide) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return offsets, data, wide.is_valid().to_numpy(zero_copy_only=False)
