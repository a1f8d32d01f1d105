"""From files to blocks of token ids: the way of a token until it leaves the reader.

1. Shards are found (`discover_shards`) and their footers read and checked (`colonnade/data/shards.py`).
2. The tokenizer is loaded (`load_tokenizer`), its boundary tokens chosen (`boundary_tokens`).
3. Row groups are read one after the other, the text column only; a damaged one is skipped whole and recorded.
4. Rows that are not documents are dropped (`colonnade/data/text_filter.py`).
5. Batches of rows are encoded on threads, in order (`colonnade/data/tokenization.py`).
6. Documents are laid end to end and cut into blocks of `block_size + 1` (`colonnade/data/packing.py`).
7. Each block leaves together with the position that resumes after it (`colonnade/data/position.py`).

The stream is a pure function of (files, tokenizer, boundary tokens, block size, filter version): batch rows, worker
threads, and the number of ranks do not change it, nor does stopping and going on. The reader knows nothing of ranks:
one process of a tensor-parallel group reads, and hands the ids to the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from colonnade.data.packing import BlockPacker, TokenChunk
from colonnade.data.position import DataPosition, LaneCursor, SkippedUnit, StreamHead
from colonnade.data.prefetch import Prefetcher
from colonnade.data.shards import (
    DEFAULT_GLOBS,
    DamagedUnit,
    Manifest,
    UnitReader,
    Units,
    discover_shards,
    find_default_shards,
    open_shards,
)
from colonnade.data.text_filter import FILTER_VERSION, KEPT, count_reasons, judge
from colonnade.data.tokenization import (
    BoundaryTokens,
    EncodedRows,
    Encoder,
    EncoderPool,
    RowBatch,
    batch_rows_setting,
    boundary_tokens,
    load_tokenizer,
    workers_setting,
)
from colonnade.errors import RunError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_GLOBS",
    "BoundaryTokens",
    "DataPosition",
    "Prefetcher",
    "StreamStatistics",
    "TokenChunk",
    "TokenStream",
    "boundary_tokens",
    "discover_shards",
    "find_default_shards",
    "load_tokenizer",
    "streaming_token_generator",
]

logger = logging.getLogger(__name__)

# One batch is at most this much text, whatever its rows: an encoding in flight takes about 100 bytes a token.
_BATCH_BYTES = 1 << 20
# Rows judged by the filter at a time, at least: bounds its memory, and spreads its fixed cost.
_FILTER_ROWS = 512


@dataclass
class StreamStatistics:
    """What one `TokenStream` has read and delivered since it was opened (not since the run began).

    Rows and tokens count as read when the packer takes them in, so the figures do not depend on how far ahead the
    threads are.
    """

    rows_read: int = 0
    rows_kept: int = 0
    rows_filtered: dict[str, int] = field(default_factory=dict)  # by reason
    tokens_read: int = 0  # boundary tokens included
    tokens_dropped: int = 0  # tails of epochs
    chunks: int = 0
    epochs_finished: int = 0
    skipped_units: int = 0
    skipped_rows: int = 0  # where the footer could still tell

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _RowsJudged:
    rows: int
    filtered: dict[str, int]


@dataclass(frozen=True, slots=True)
class _UnitSkipped:
    skip: SkippedUnit
    rows: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class _EpochEnded:
    epoch: int


_Event = _RowsJudged | _UnitSkipped | _EpochEnded


def streaming_token_generator(
    shards: Sequence[str | Path] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    add_document_boundary_tokens: bool = False,
    text_column: str = "text",
    position: DataPosition | None = None,
    strict: bool = False,
    epochs: int | None = None,
    seed: int = 0,
    batch_rows: int | None = None,
    workers: int | None = None,
) -> TokenStream:
    """Stream a corpus as packed blocks of token ids.

    Args:
        shards: Parquet or Arrow files in stream order, or a pattern for `discover_shards`.
        tokenizer: as `load_tokenizer` returns it. Text is encoded without special tokens.
        block_size: tokens a model sees at once; blocks hold one more.
        add_document_boundary_tokens: put `boundary_tokens(tokenizer)` around each document.
        text_column: name of the column of text.
        position: go on from here instead of from the first row.
        strict: a damaged row group ends the run (RunError) instead of being skipped and recorded.
        epochs: passes over the data, counted from the beginning of the run; None is endless. At the end of each the
            tail, less than a block, is dropped.
        seed: recorded in the position, so that a run cannot go on with another one.
        batch_rows: rows encoded in one call; default RESUME_TOKENIZER_BATCH_ROWS, else 64.
        workers: encoding threads; default RESUME_TOKENIZER_WORKERS, else this rank's share of the cores.

    Raises:
        UsageError: for settings out of range, for shards that cannot be used, for a position made with other data or
            settings; and from the first `next`, where the data does not fill one block.
    """
    for name, value in (("block_size", block_size), ("epochs", 1 if epochs is None else epochs)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    settings = batch_rows_setting(batch_rows), workers_setting(workers)
    paths = discover_shards(shards) if isinstance(shards, str) else [str(shard) for shard in shards]
    units = Units(open_shards(paths, text_column))
    for shard in units.shards:
        if shard.layout == "tokens":
            raise UsageError(f"data shard {shard.path} holds token ids, and this stream encodes text; give text")
    boundaries = boundary_tokens(tokenizer) if add_document_boundary_tokens else None
    encoder = Encoder(tokenizer)
    head = StreamHead.create(
        Manifest.of(units.shards),
        tokenizer=encoder.digest,
        bos=boundaries.bos if boundaries else None,
        eos=boundaries.eos if boundaries else None,
        block_size=block_size,
        lanes=1,
        seed=seed,
        filter_version=FILTER_VERSION,
        text_column=text_column,
    )
    if position is None:
        position = DataPosition.start(head)
    else:
        position.require(head, len(units))
    pool = EncoderPool(encoder, boundaries, workers=settings[1])
    return TokenStream(units, pool, position, batch_rows=settings[0], epochs=epochs, strict=strict)


class TokenStream:
    """Iterator of `TokenChunk`s; made by `streaming_token_generator`. Close it, or use it in a `with` statement.

    Attributes:
        position: state after the last chunk delivered.
        statistics: see `StreamStatistics`.
    """

    def __init__(
        self,
        units: Units,
        pool: EncoderPool,
        position: DataPosition,
        *,
        batch_rows: int,
        epochs: int | None,
        strict: bool,
    ) -> None:
        self.position = position
        self.statistics = StreamStatistics()
        self._units = units
        self._pool = pool
        self._batch_rows = batch_rows
        self._strict = strict
        self._reader = UnitReader(position.head.text_column)
        self._packer = BlockPacker(position.head.block_size)
        self._skipped = position.skipped
        self._failure: Exception | None = None
        cursor = position.cursors[0]
        # The token a resumed stream has to find again, until it has.
        self._wanted: LaneCursor | None = cursor if cursor.row or cursor.token else None
        self._epoch_is_whole = cursor[1:] == (0, 0, 0)
        self._epoch_chunks = 0
        self._epoch_tokens = 0
        self._events: Iterator[EncodedRows | _Event] = pool.run(self._read(cursor, epochs))

    # --- the consumer's side -----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TokenChunk]:
        return self

    def __next__(self) -> TokenChunk:
        """The next chunk.

        Raises:
            StopIteration: after the last epoch.
            UsageError: the data does not fill one block, or is not what the position was made with.
            RunError: a shard cannot be reached; with `strict`, a row group is damaged.
        """
        if self._failure is not None:
            raise self._failure
        try:
            while not self._packer.ready:
                self._take_in(next(self._events))
        except (UsageError, RunError) as error:
            self._failure = error  # a stream that failed must not look like one that ended
            raise
        tokens, cursor = self._packer.cut()
        self._epoch_chunks += 1
        self.statistics.chunks += 1
        self.position = self.position.advanced(cursor, self._skipped)
        return TokenChunk(tokens, self.position, cursor.epoch)

    def close(self) -> None:
        """Stop the threads and close the file. The position stays readable."""
        if self._failure is None:
            self._failure = RunError("the token stream is closed")
        self._pool.close()
        self._reader.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_in(self, event: EncodedRows | _Event) -> None:
        """Account for one event, in stream order: what happens here does not depend on the threads' progress."""
        if isinstance(event, EncodedRows):
            self.statistics.tokens_read += len(event.tokens)
            self._epoch_tokens += len(event.tokens)
            self._packer.add(event, self._tokens_before_cursor(event))
        elif isinstance(event, _RowsJudged):
            self._count_rows(event)
        elif isinstance(event, _UnitSkipped):
            self._skip(event)
        else:
            self._end_epoch()

    def _tokens_before_cursor(self, encoded: EncodedRows) -> int:
        """How much of the first documents after a resume has been delivered already; 0 for all later ones."""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return 0
        found = encoded.epoch, encoded.unit, int(encoded.rows[0])
        if found != wanted[:3] or wanted.token >= encoded.ends[0]:
            raise self._changed_data(wanted)
        return wanted.token

    def _changed_data(self, wanted: LaneCursor) -> UsageError:
        return UsageError(
            f"the data changed since the position was saved: {self._units.describe(wanted.unit)} has no token "
            f"{wanted.token} in row {wanted.row}; restore the file or start a new run"
        )

    def _count_rows(self, judged: _RowsJudged) -> None:
        self.statistics.rows_read += judged.rows
        self.statistics.rows_kept += judged.rows - sum(judged.filtered.values())
        for reason, count in judged.filtered.items():
            self.statistics.rows_filtered[reason] = self.statistics.rows_filtered.get(reason, 0) + count

    def _skip(self, event: _UnitSkipped) -> None:
        if self._wanted is not None and self._wanted.unit == event.skip.unit:
            self._wanted = None
        self.statistics.skipped_units += 1
        self.statistics.skipped_rows += event.rows
        if not event.is_new:
            return
        where = self._units.describe(event.skip.unit)
        if self._strict:
            raise RunError(f"{where} is damaged ({event.skip.reason}); repair it, or run without --strict-data")
        logger.warning("skipping %s, which is damaged (%s); recorded in the data position", where, event.skip.reason)
        self._skipped = (*self._skipped, event.skip)

    def _end_epoch(self) -> None:
        if self._wanted is not None:
            raise self._changed_data(self._wanted)
        self.statistics.tokens_dropped += self._packer.drop_tail()
        self.statistics.epochs_finished += 1
        if self._epoch_is_whole and self._epoch_chunks == 0:
            self._fail_without_chunk()
        self._epoch_is_whole = True
        self._epoch_chunks = self._epoch_tokens = 0

    def _fail_without_chunk(self) -> None:
        """An epoch without one block would be followed by the same, for ever."""
        read = self.statistics
        filtered = ", ".join(f"{count} {reason}" for reason, count in read.rows_filtered.items())
        block_size = self.position.head.block_size
        message = (
            f"the data holds {self._epoch_tokens} tokens, one block needs {block_size + 1} (block size {block_size}): "
            f"{read.rows_read} rows read, {read.rows_kept} kept{f' (dropped: {filtered})' if filtered else ''}, "
            f"{len(self._skipped)} damaged row groups skipped; give more data or a smaller block size"
        )
        raise UsageError(message) if self.position.chunk == 0 else RunError(message)

    # --- the reader's side: runs ahead by a bounded number of batches -------------------------------------------------

    def _read(self, cursor: LaneCursor, epochs: int | None) -> Iterator[RowBatch | _Event]:
        known = {skip.unit: skip for skip in self._skipped}
        epoch, first_unit, first_row = cursor.epoch, cursor.unit, cursor.row
        while epochs is None or epoch < epochs:
            for unit in range(first_unit, len(self._units)):
                yield from self._read_unit(epoch, unit, first_row, known)
                first_row = 0
            yield _EpochEnded(epoch)
            epoch, first_unit = epoch + 1, 0

    def _read_unit(
        self, epoch: int, unit: int, first_row: int, known: dict[int, SkippedUnit]
    ) -> Iterator[RowBatch | _Event]:
        if unit in known:
            yield _UnitSkipped(known[unit], 0, is_new=False)
            return
        shard, number = self._units.locate(unit)
        if unit + 1 < len(self._units):
            self._reader.expect(*self._units.locate(unit + 1))
        stretch = self._batch_rows * -(-_FILTER_ROWS // self._batch_rows)
        row = 0
        windows = self._reader.windows(shard, number)
        while True:
            try:
                # Damage shows before the first window: a unit that is bad near its end is not half delivered.
                column = next(windows, None)
            except DamagedUnit as damage:
                known[unit] = SkippedUnit(unit, str(damage))
                yield _UnitSkipped(known[unit], damage.rows, is_new=True)
                return
            if column is None:
                return
            assert not isinstance(column, np.ndarray)  # token shards were refused
            for start in range(max(0, first_row - row), len(column), stretch):
                yield from self._batches(epoch, unit, row + start, column.slice(start, stretch))
            row += len(column)

    def _batches(self, epoch: int, unit: int, first_row: int, column: pa.Array) -> Iterator[RowBatch | _Event]:
        texts, verdicts = judge(column)
        yield _RowsJudged(len(verdicts), count_reasons(verdicts))
        kept = verdicts == KEPT
        rows = first_row + np.flatnonzero(kept)
        texts = texts.filter(kept)
        start = 0
        for stop in _batch_ends(texts, self._batch_rows):
            yield RowBatch(epoch, unit, rows[start:stop], texts.slice(start, stop - start))
            start = stop


def _batch_ends(texts: pa.LargeStringArray, batch_rows: int) -> Iterator[int]:
    """Where to cut `texts`: at most `batch_rows` rows and `_BATCH_BYTES` a batch, but at least one row."""
    import pyarrow.compute as pc

    byte_ends = np.cumsum(pc.binary_length(texts).to_numpy())
    start, done = 0, 0
    while start < len(texts):
        fitting = int(np.searchsorted(byte_ends, done + _BATCH_BYTES, side="right"))
        start = max(start + 1, min(start + batch_rows, fitting))
        done = int(byte_ends[start - 1])
        yield start
