"""One lane: turns documents into blocks, each with the state that resumes after it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from colonnade.data.lane_reader import Event, LaneReader, PortionEnded, RowsJudged, UnitSkipped
from colonnade.data.packing import Block, create_packer
from colonnade.data.position import LaneCounts, LaneCursor, LaneState, SkippedUnit
from colonnade.data.text_filter import REASONS
from colonnade.data.tokenization import EncodedRows, EncoderPool, RowBatch
from colonnade.errors import ColonnadeError, RunError, UsageError

logger = logging.getLogger(__name__)


class Lane:
    """The blocks of one lane.

    Args:
        reader: reads the lane's units.
        pool: encodes the text; shared by all lanes of a process.
        state: state to resume from.
        skipped: damaged units of its corpus that are already known.
        title: how error messages name the lane's text.
        ahead: read-ahead: most batches being encoded while another is consumed.
        epochs: passes over the data; None means endless.
        strict: treat a damaged unit as an error.

    Attributes:
        state: state after the last block.
    """

    def __init__(
        self,
        reader: LaneReader,
        pool: EncoderPool,
        state: LaneState,
        skipped: Sequence[SkippedUnit],
        *,
        title: str,
        block_size: int,
        packing: str,
        ahead: int,
        epochs: int | None,
        strict: bool,
    ) -> None:
        self.state = state
        self._skips = len(skipped)
        self._found: list[SkippedUnit] = []
        self._title = title
        self._reader = reader
        self._block_size = block_size
        self._strict = strict
        self._is_endless = epochs is None
        self._ahead = ahead
        self._pool = pool
        self._packer = create_packer(packing, block_size)
        self._by_portion = reader.by_portion
        self._counts = state.counts
        self._judged: deque[RowsJudged] = deque()
        cursor = state.cursor
        # What a lane that resumes inside a document (best-fit: a portion) has to find again. None once it is found, or
        # if its unit is skipped: the token (best-fit: block) that it names is one of this document alone.
        self._wanted: LaneCursor | None = cursor if cursor.token else None
        self._epoch_is_whole = cursor[1:] == (0, 0, 0)
        self._epoch_blocks = self._epoch_tokens = 0
        self._source = reader.read(cursor, epochs, {skip.unit: skip for skip in skipped})
        self._pending: deque[Future[EncodedRows] | EncodedRows | Event | Exception] = deque()

    def fill(self) -> None:
        """Read ahead, so that the threads have work before the first block is requested. An error of the reader waits
        for its turn, so that the blocks before it do not depend on how far ahead the lane reads."""
        while len(self._pending) <= self._ahead:
            try:
                item = next(self._source, None)
            except (ColonnadeError, OSError) as error:
                self._pending.append(error)
                return
            if item is None:
                return
            self._pending.append(self._pool.submit(item) if isinstance(item, RowBatch) else item)

    def has_block(self) -> bool:
        """Whether another block comes, which is then ready to be cut; False after the last epoch.

        Raises:
            UsageError: the data does not fill one block, or differs from what the position was made with.
            RunError: a shard cannot be reached; or, with `strict`, a unit is damaged.
        """
        while not self._packer.ready:
            self.fill()
            if not self._pending:
                return False
            item = self._pending.popleft()
            if isinstance(item, Exception):
                raise item
            self._take_in(item.result() if isinstance(item, Future) else item)
        return True

    def next_block(self) -> Block | None:
        """The next block; None after the last epoch. Raises what `has_block` raises."""
        if not self.has_block():
            return None
        block = self._packer.cut()
        self._epoch_blocks += 1
        self._commit_rows(block.cursor)
        self._counts = self._counts.plus(
            LaneCounts(
                tokens_delivered=block.fresh,
                tokens_repeated=block.fresh if block.epoch else 0,
                padding=len(block.tokens) - block.filled,
            )
        )
        self.state = LaneState(block.cursor, self._counts)
        return block

    def take_skipped(self) -> list[SkippedUnit]:
        """The damaged units found since the last call."""
        found, self._found = self._found, []
        return found

    def stop(self) -> None:
        """Make a `next_block` that is in progress on another thread end soon, with RunError."""
        self._reader.stop()

    def close(self) -> None:
        """Close the files. Not while another thread is inside `next_block`."""
        self._source.close()
        self._reader.close()

    def _take_in(self, event: EncodedRows | Event) -> None:
        """Process one event. Events come in stream order, so the result does not depend on the threads' timing."""
        if isinstance(event, EncodedRows):
            self._epoch_tokens += len(event.tokens)
            self._packer.add(event, self._tokens_before_cursor(event))
        elif isinstance(event, RowsJudged):
            # Best-fit counts a portion's rows with its first block, so those of a portion that was begun are counted.
            if not self._by_portion or self._wanted is None:
                self._judged.append(event)
        elif isinstance(event, PortionEnded):
            if self._by_portion:
                self._end_portion(event)
        elif isinstance(event, UnitSkipped):
            self._skip(event)
        else:
            self._end_epoch()

    def _commit_rows(self, cursor: LaneCursor) -> None:
        """Count only the rows before `cursor`: a resumed lane reads the later ones again."""
        while self._judged:
            first = self._judged[0]
            before = len(first.verdicts)
            if not self._by_portion and (first.epoch, first.unit) >= cursor[:2]:
                in_unit = (first.epoch, first.unit) == cursor[:2]
                before = min(before, max(0, cursor.row - first.first_row)) if in_unit else 0
            self._count(first.verdicts[:before])
            if before < len(first.verdicts):
                rest = replace(first, first_row=first.first_row + before, verdicts=first.verdicts[before:])
                self._judged[0] = rest
                return
            self._judged.popleft()

    def _count(self, verdicts: npt.NDArray[np.uint8]) -> None:
        numbers = np.bincount(verdicts, minlength=len(REASONS) + 1)
        self._counts = self._counts.plus(LaneCounts(int(numbers.sum()), *(int(numbers[reason]) for reason in REASONS)))

    def _tokens_before_cursor(self, encoded: EncodedRows) -> int:
        """Tokens of the first batch after a resume that were already delivered; 0 for all later batches."""
        if self._by_portion or self._wanted is None:
            return 0
        wanted, self._wanted = self._wanted, None
        found = encoded.epoch, encoded.unit, int(encoded.rows[0])
        if found != wanted[:3] or wanted.token >= encoded.ends[0]:
            raise self._changed_data(wanted)
        return wanted.token

    def _end_portion(self, event: PortionEnded) -> None:
        """Pack a portion; of the first one after a resume, without the blocks that were already delivered."""
        wanted, self._wanted = self._wanted, None
        self._packer.end_portion(event, 0 if wanted is None else wanted.token)
        if wanted is not None and not (self._packer.ready and wanted[:3] == (event.epoch, event.unit, event.portion)):
            raise self._changed_data(wanted)

    def _changed_data(self, wanted: LaneCursor) -> UsageError:
        where = self._reader.describe(wanted.epoch, wanted.unit)
        token, row = ("block", "portion") if self._by_portion else ("token", "row")
        return UsageError(
            f"the data changed since the position was saved: {where} has no {token} {wanted.token} in {row} "
            f"{wanted.row}; restore the file or start a new run"
        )

    def _skip(self, event: UnitSkipped) -> None:
        if self._wanted is not None and self._wanted.unit == event.unit:
            self._wanted = None
        if not event.is_new:
            return
        where = self._reader.units.describe(event.skip.unit)
        if self._strict:
            raise RunError(f"{where} is damaged ({event.skip.reason}); repair it, or run without --strict-data")
        then = after_skip(endless=self._is_endless)
        logger.warning("skipping %s, which is damaged (%s); %s", where, event.skip.reason, then)
        self._skips += 1
        self._found.append(event.skip)

    def _end_epoch(self) -> None:
        if self._wanted is not None:
            raise self._changed_data(self._wanted)
        self._counts = self._counts.plus(LaneCounts(tokens_dropped=self._packer.drop_tail()))
        if self._epoch_is_whole and self._epoch_blocks == 0:
            raise self._without_block()
        self._epoch_is_whole = True
        self._epoch_blocks = self._epoch_tokens = 0

    def _without_block(self) -> UsageError | RunError:
        """The error for an epoch that yields no block: without it, an endless stream would loop forever."""
        for judged in self._judged:
            self._count(judged.verdicts)
        reasons = ", ".join(f"{count} {name}" for name, count in filtered_rows(self._counts).items())
        reasons = f" (dropped: {reasons})" if reasons else ""
        rows, kept = self._counts.rows, self._counts.rows - sum(filtered_rows(self._counts).values())
        message = (
            f"{self._title} holds {self._epoch_tokens} tokens, one block needs {self._block_size + 1} "
            f"(block size {self._block_size}): {rows} rows read, {kept} kept{reasons}, "
            f"{self._skips} damaged units skipped; give more data or a smaller block size"
            f"{', or fewer --data-lanes' if self._title.startswith('lane ') else ''}"
        )
        return UsageError(message) if self.state.counts.tokens_delivered == 0 else RunError(message)


def after_skip(*, endless: bool) -> str:
    """What a warning says becomes of text that is skipped. Only the position of an endless stream is ever saved: one
    with an end is read for its text, such as held-out text, whose scores then lack what was skipped."""
    return "recorded in the data position" if endless else "the text that is scored lacks it"


def filtered_rows(counts: LaneCounts) -> dict[str, int]:
    """Rows dropped by the text filter, by reason; reasons without rows are left out."""
    numbers = zip(REASONS.values(), counts[1 : 1 + len(REASONS)], strict=True)
    return {name: count for name, count in numbers if count}
