"""Packing: how documents become blocks of `block_size + 1` tokens.

`concat` concatenates documents and cuts them with stride `block_size`, so that neighbouring blocks share one token: the
last target of a block is the first input of the next. No document is dropped for being short, and the only tokens lost
are the tail of an epoch.

`best-fit` combines whole documents so that they fill a block as well as possible (Ding et al., "Fewer Truncations
Improve Language Modeling", arXiv:2404.10830): only documents longer than a block are cut, and the rest of a block is
padding.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from colonnade.data.best_fit import best_fit_bins
from colonnade.data.lane_reader import PortionEnded
from colonnade.data.order import keyed_permutation
from colonnade.data.position import LaneCursor
from colonnade.data.tokenization import EncodedRows

PACKINGS = ("concat", "best-fit")


class Block(NamedTuple):
    """`tokens` int32 [block_size + 1]; `starts` bool, True where a document begins; `filled`: tokens before the
    padding; `fresh`: tokens that were in no earlier block; `cursor`: where the next block begins; `epoch`: of its
    tokens."""

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.bool_]
    filled: int
    fresh: int
    cursor: LaneCursor
    epoch: int


class Packer(Protocol):
    """The interface between a lane and a packing."""

    @property
    def ready(self) -> bool:
        """Whether a block can be cut."""

    def add(self, encoded: EncodedRows, begin: int = 0) -> None:
        """Append documents without their first `begin` tokens (which makes sense only if nothing is held yet)."""

    def end_portion(self, event: PortionEnded, begin: int = 0) -> None:
        """Signal that all documents of a portion, which are packed together, have been added. Its first `begin` blocks
        are left out; if it has no more than that, the packer is not `ready` afterwards."""

    def cut(self) -> Block:
        """The next block. Call it only when `ready`."""

    def drop_tail(self) -> int:
        """Discard what is left and return how many tokens that was."""


def create_packer(packing: str, block_size: int) -> Packer:
    """The packer of a lane; `packing` is one of `PACKINGS`."""
    return BestFitPacker(block_size) if packing == "best-fit" else ConcatPacker(block_size)


class ConcatPacker:
    """Cuts blocks from a queue of encoded documents and tracks in which document the next block begins."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._queue: deque[EncodedRows] = deque()
        self._begin = 0  # first unread token of the queue's first entry
        self._available = 0

    @property
    def ready(self) -> bool:
        return self._available > self._block_size

    def add(self, encoded: EncodedRows, begin: int = 0) -> None:
        if len(encoded.tokens) > begin:
            self._queue.append(encoded)
            self._begin = begin if len(self._queue) == 1 else self._begin
            self._available += len(encoded.tokens) - begin

    def end_portion(self, event: PortionEnded, begin: int = 0) -> None:
        pass

    def cut(self) -> Block:
        width = self._block_size + 1
        tokens, starts = np.empty(width, np.int32), np.zeros(width, np.bool_)
        filled = 0
        while True:
            front = self._queue[0]
            taken = min(len(front.tokens) - self._begin, width - filled)
            tokens[filled : filled + taken] = front.tokens[self._begin : self._begin + taken]
            _mark_starts(starts[filled : filled + taken], front.ends, self._begin)
            filled += taken
            if filled == width:
                break
            self._queue.popleft()
            self._begin = 0
        # The last token is also the first token of the next block, so it stays in the queue.
        self._begin += taken - 1
        self._available -= self._block_size
        return Block(tokens, starts, width, self._block_size, self._cursor(front), front.epoch)

    def drop_tail(self) -> int:
        dropped = self._available
        self._queue.clear()
        self._begin = self._available = 0
        return dropped

    def _cursor(self, front: EncodedRows) -> LaneCursor:
        document = int(np.searchsorted(front.ends, self._begin, side="right"))
        start = int(front.ends[document - 1]) if document else 0
        return LaneCursor(front.epoch, front.unit, int(front.rows[document]), self._begin - start)


def _mark_starts(starts: npt.NDArray[np.bool_], ends: npt.NDArray[np.int64], begin: int) -> None:
    """Set `starts` where a document begins, in the range of tokens that begins with token `begin` of the documents."""
    first, last = np.searchsorted(ends, (begin, begin + len(starts)), side="left")
    starts[ends[first:last] - begin] = True
    if begin == 0 and len(starts):
        starts[0] = True


class BestFitPacker:
    """Packs each portion of about 2 MiB of text separately, and puts its blocks in a seeded random order.

    It holds a portion's tokens only once; a block is assembled when it is cut.
    """

    def __init__(self, block_size: int) -> None:
        self._width = block_size + 1
        self._held: list[EncodedRows] = []
        # Of the portion being delivered:
        self._batch_of = self._start_of = np.zeros(0, np.int64)  # each document's batch, and its first token in it
        self._bins: list[npt.NDArray[np.int64]] = []
        self._order = np.zeros(0, np.int64)
        self._next = 0
        self._place = LaneCursor(0, 0, 0, 0)

    @property
    def ready(self) -> bool:
        return self._next < len(self._order)

    def add(self, encoded: EncodedRows, begin: int = 0) -> None:
        self._held.append(encoded)

    def end_portion(self, event: PortionEnded, begin: int = 0) -> None:
        lengths = [np.diff(encoded.ends, prepend=0) for encoded in self._held]
        if not lengths:
            return
        self._batch_of = np.repeat(np.arange(len(lengths)), [len(batch) for batch in lengths])
        self._start_of = np.concatenate(
            [encoded.ends - batch for encoded, batch in zip(self._held, lengths, strict=True)]
        )
        self._bins = best_fit_bins(np.concatenate(lengths), self._width)
        self._order = keyed_permutation(len(self._bins), "blocks", *event.key)
        self._next = begin
        self._place = LaneCursor(event.epoch, event.unit, event.portion, 0)
        self._drop_delivered()

    def cut(self) -> Block:
        tokens, starts = np.zeros(self._width, np.int32), np.zeros(self._width, np.bool_)
        filled = 0
        for document, begin, end in self._bins[self._order[self._next]].tolist():
            first = int(self._start_of[document])
            starts[filled] = True
            stretch = self._held[self._batch_of[document]].tokens[first + begin : first + end]
            tokens[filled : filled + end - begin] = stretch
            filled += end - begin
        self._next += 1
        self._drop_delivered()
        epoch, unit, portion, _ = self._place
        cursor = LaneCursor(epoch, unit, portion, self._next) if self.ready else LaneCursor(epoch, unit, portion + 1, 0)
        return Block(tokens, starts, filled, filled, cursor, epoch)

    def _drop_delivered(self) -> None:
        """Free a portion once its last block is cut, so that what is added afterwards belongs to the next portion."""
        if not self.ready:
            self._held = []

    def drop_tail(self) -> int:
        return 0  # a portion's blocks are complete when it ends
