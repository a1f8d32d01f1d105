"""The reading side of a lane: reads units in each epoch's order and yields batches of documents, and events in between.

It runs ahead of delivery by a bounded number of batches. What it yields does not depend on how far ahead it runs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from colonnade.data.order import keyed_permutation, unit_order
from colonnade.data.position import LaneCursor, SkippedUnit
from colonnade.data.shards import DamagedUnit, UnitReader, Units
from colonnade.data.text_filter import KEPT, judge
from colonnade.data.tokenization import EncodedRows, RowBatch
from colonnade.errors import UsageError

if TYPE_CHECKING:
    from typing import TypeAlias

    import pyarrow as pa

    Window: TypeAlias = pa.Array | npt.NDArray[np.unsignedinteger]

# Best-fit packing packs this much text together. Its tokens take about as many bytes as the text.
PORTION_BYTES = 2 << 20
# Most text in one batch, whatever its number of rows, because an encoding in flight takes about 100 bytes per token.
_BATCH_BYTES = 1 << 20
# The filter judges the smallest multiple of the batch size that is at least this many rows at a time. That bounds its
# memory and amortises its fixed cost.
_FILTER_ROWS = 512


@dataclass(frozen=True, slots=True)
class RowsJudged:
    """N consecutive rows and the filter's verdict on each: uint8 [N]."""

    epoch: int
    unit: int
    portion: int
    first_row: int
    verdicts: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class UnitSkipped:
    unit: int  # index in the lane's order
    skip: SkippedUnit
    is_new: bool


@dataclass(frozen=True, slots=True)
class PortionEnded:
    """All documents of a portion (packed together) have been yielded; `key` seeds the order of their blocks."""

    epoch: int
    unit: int
    portion: int
    key: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class EpochEnded:
    epoch: int


Event = RowsJudged | UnitSkipped | PortionEnded | EpochEnded


class LaneReader:
    """Reads one lane of one corpus.

    Args:
        corpus: index of the corpus in the stream.
        name: name of the corpus; its orders depend on it.
        units: all units of the corpus.
        members: ordinals of the lane's units, ascending.
        batch_rows: rows encoded in one call.
        vocabulary_size: ids of token shards must be below it.
        by_portion: cursors count portions of a unit that are packed together (best-fit), instead of rows.
        drop_symbols: whether the filter drops rows of mostly digits and symbols.
    """

    def __init__(
        self,
        corpus: int,
        name: str,
        units: Units,
        members: npt.NDArray[np.int64],
        *,
        text_column: str,
        seed: int,
        shuffle: bool,
        batch_rows: int,
        vocabulary_size: int,
        by_portion: bool,
        drop_symbols: bool,
    ) -> None:
        self.corpus = corpus
        self.name = name
        self.units = units
        self._members = members
        self._seed = seed
        self._shuffle = shuffle
        self._batch_rows = batch_rows
        self._vocabulary_size = vocabulary_size
        self.by_portion = by_portion
        self._drop_symbols = drop_symbols
        self._reader = UnitReader(text_column)

    def __len__(self) -> int:
        return len(self._members)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Ordinals of the lane's units, in the order of `epoch`."""
        return unit_order(self._members, self._seed, self.name, epoch, shuffled=self._shuffle)

    def describe(self, epoch: int, unit: int) -> str:
        """The `unit`-th unit of an epoch, for messages."""
        return self.units.describe(int(self.order(epoch)[unit]))

    def stop(self) -> None:
        """Make a read that is in progress on another thread end soon (`UnitReader.stop`)."""
        self._reader.stop()

    def close(self) -> None:
        self._reader.close()

    def read(
        self, cursor: LaneCursor, epochs: int | None, known: Mapping[int, SkippedUnit]
    ) -> Generator[RowBatch | EncodedRows | Event]:
        """Yield everything from `cursor` on; units in `known` (keyed by ordinal) stay skipped.

        Raises:
            RunError: a shard cannot be reached.
            UsageError: a token shard was made with another tokenizer.
        """
        skipped = dict(known)
        epoch, first_unit, first_row = cursor.epoch, cursor.unit, cursor.row
        while epochs is None or epoch < epochs:
            order = self.order(epoch)
            for unit in range(first_unit, len(order)):
                following = int(order[unit + 1]) if unit + 1 < len(order) else None
                yield from self._read_unit(epoch, unit, int(order[unit]), first_row, following, skipped)
                first_row = 0
            yield EpochEnded(epoch)
            epoch, first_unit = epoch + 1, 0

    def _read_unit(
        self,
        epoch: int,
        unit: int,
        ordinal: int,
        first_row: int,
        following: int | None,
        skipped: dict[int, SkippedUnit],
    ) -> Iterator[RowBatch | EncodedRows | Event]:
        if ordinal in skipped:
            yield UnitSkipped(unit, skipped[ordinal], is_new=False)
            return
        windows = self._reader.windows(*self.units.locate(ordinal))
        try:
            # The first window is returned only after the whole unit was checked, so no unit is delivered in part.
            window = next(windows, None)
        except DamagedUnit as damage:
            skipped[ordinal] = SkippedUnit(self.corpus, ordinal, str(damage))
            yield UnitSkipped(unit, skipped[ordinal], is_new=True)
            return
        if following is not None and following not in skipped:
            self._reader.expect(*self.units.locate(following))
        row = number = portion = 0
        while window is not None:
            key = (self._seed, self.name, epoch, ordinal, number)
            order = keyed_permutation(len(window), "rows", *key) if self._shuffle else None
            for begin, end in self._portions(window, order):
                first = begin if self.by_portion else max(begin, first_row - row)
                if portion >= first_row if self.by_portion else first < end:
                    place = (epoch, unit, portion)
                    yield from self._read_rows(place, window, order, range(first, end), row)
                    yield PortionEnded(*place, key=(self._seed, self.name, epoch, ordinal, portion))
                portion += 1
            row, number = row + _rows_in(window), number + 1
            window = None  # free it before the next one is read
            window = next(windows, None)

    def _portions(self, window: Window, order: npt.NDArray[np.int64] | None) -> list[tuple[int, int]]:
        """Ranges of a window's rows, in reading order, that are packed separately. Only best-fit packing, which has to
        hold their tokens, needs several; otherwise all rows are one range."""
        rows = _rows_in(window)
        if not self.by_portion or isinstance(window, np.ndarray):
            return [(0, rows)]
        import pyarrow.compute as pc

        sizes = pc.fill_null(pc.binary_length(window), 0).to_numpy()
        ends = np.cumsum(sizes if order is None else sizes[order])
        # A row belongs to the portion that contains its first byte.
        numbers = (ends - (sizes if order is None else sizes[order])) // PORTION_BYTES
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), rows]
        return [*pairwise(cuts)]

    def _read_rows(
        self,
        place: tuple[int, int, int],
        window: Window,
        order: npt.NDArray[np.int64] | None,
        rows: range,
        first_row: int,
    ) -> Iterator[RowBatch | EncodedRows | Event]:
        """Documents of a window's `rows`, in `order`; `first_row` is the number of the window's first row."""
        epoch, unit, portion = place
        if isinstance(window, np.ndarray):
            yield RowsJudged(epoch, unit, portion, first_row, np.full(1, KEPT, np.uint8))
            yield self._token_row(epoch, unit, first_row, window)
            return
        stretch = self._batch_rows * -(-_FILTER_ROWS // self._batch_rows)
        for start in range(rows.start, rows.stop, stretch):
            stop = min(start + stretch, rows.stop)
            taken = window.slice(start, stop - start) if order is None else window.take(order[start:stop])
            texts, verdicts = judge(taken, drop_symbols=self._drop_symbols)
            yield RowsJudged(epoch, unit, portion, first_row + start, verdicts)
            kept = verdicts == KEPT
            numbers = first_row + start + np.flatnonzero(kept)
            texts = texts.filter(kept)
            done = 0
            for end in batch_ends(texts, self._batch_rows):
                yield RowBatch(epoch, unit, numbers[done:end], texts.slice(done, end - done))
                done = end

    def _token_row(self, epoch: int, unit: int, row: int, window: npt.NDArray[np.unsignedinteger]) -> EncodedRows:
        highest = int(window.max(initial=0))
        if highest >= self._vocabulary_size:
            raise UsageError(
                f"{self.describe(epoch, unit)} holds token id {highest}, the tokenizer has ids up to "
                f"{self._vocabulary_size - 1}; give the tokenizer it was made with"
            )
        ends = np.array([len(window)], np.int64)
        return EncodedRows(epoch, unit, np.array([row], np.int64), window.astype(np.int32), ends)


def _rows_in(window: Window) -> int:
    return 1 if isinstance(window, np.ndarray) else len(window)


def batch_ends(texts: pa.LargeStringArray, batch_rows: int) -> Iterator[int]:
    """Where to cut `texts`: a batch has at most `batch_rows` rows and 1 MiB, but at least one row."""
    import pyarrow.compute as pc

    byte_ends = np.cumsum(pc.binary_length(texts).to_numpy())
    start, done = 0, 0
    while start < len(texts):
        fitting = int(np.searchsorted(byte_ends, done + _BATCH_BYTES, side="right"))
        start = max(start + 1, min(start + batch_rows, fitting))
        done = int(byte_ends[start - 1])
        yield start
