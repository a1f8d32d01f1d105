"""Packing: how documents become blocks of `block_size + 1` tokens.

`concat` lays documents end to end and cuts with stride `block_size`, so that neighbours share one token: the last
target of a block is the first input of the next. No document is dropped for being short and no token is lost but the
tail of an epoch.

`best-fit` puts whole documents together that fill a block best (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv:2404.10830): only documents longer than a block are cut, and what is left of a block is padding.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from colonnade.data.best_fit import best_fit_bins
from colonnade.data.lane_reader import WindowEnded
from colonnade.data.order import keyed_permutation
from colonnade.data.position import LaneCursor
from colonnade.data.tokenization import EncodedRows

PACKINGS = ("concat", "best-fit")


class Block(NamedTuple):
    """`tokens` int32 [block_size + 1]; `starts` bool, where a document begins; `filled`: tokens before the padding;
    `fresh`: tokens no earlier block had; `cursor`: where the next block begins; `epoch`: of its tokens."""

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.bool_]
    filled: int
    fresh: int
    cursor: LaneCursor
    epoch: int


class Packer(Protocol):
    """What a lane asks of a packing."""

    @property
    def ready(self) -> bool:
        """Whether a block is there."""

    def add(self, encoded: EncodedRows, begin: int = 0) -> None:
        """Append documents; the first `begin` tokens are left out (only sensible where nothing is held)."""

    def end_window(self, event: WindowEnded) -> None:
        """All documents of a window have been added."""

    def cut(self) -> Block:
        """The next block. Only when `ready`."""

    def drop_tail(self) -> int:
        """Forget what is left and return how many tokens that was."""


def create_packer(packing: str, block_size: int, cursor: LaneCursor) -> Packer:
    """The packer of a lane that goes on from `cursor`."""
    return BestFitPacker(block_size, cursor) if packing == "best-fit" else ConcatPacker(block_size)


class ConcatPacker:
    """Cuts blocks from a queue of encoded documents and knows which document each block begins in."""

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

    def end_window(self, event: WindowEnded) -> None:
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
        # The last token is the first of the next block: it stays in the queue.
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
    """Set `starts` where a document begins, in a stretch that begins with token `begin` of the documents."""
    first, last = np.searchsorted(ends, (begin, begin + len(starts)), side="left")
    starts[ends[first:last] - begin] = True
    if begin == 0 and len(starts):
        starts[0] = True


class BestFitPacker:
    """Packs the documents of each window (`UnitReader.windows`) for itself, and shuffles the blocks by seed."""

    def __init__(self, block_size: int, cursor: LaneCursor) -> None:
        self._width = block_size + 1
        self._held: list[EncodedRows] = []
        self._blocks: deque[Block] = deque()
        self._resume = cursor if cursor.token else None

    @property
    def ready(self) -> bool:
        return bool(self._blocks)

    def add(self, encoded: EncodedRows, begin: int = 0) -> None:
        self._held.append(encoded)

    def end_window(self, event: WindowEnded) -> None:
        held, self._held = self._held, []
        if not held:
            return
        tokens = np.concatenate([encoded.tokens for encoded in held])
        lengths = np.concatenate([np.diff(encoded.ends, prepend=0) for encoded in held])
        starts = np.cumsum(lengths) - lengths
        bins = best_fit_bins(lengths, self._width)
        order = keyed_permutation(len(bins), "blocks", *event.key)
        delivered, self._resume = (self._resume.token if self._resume else 0), None
        for number in range(delivered, len(bins)):
            last = number + 1 == len(bins)
            cursor = (event.window + 1, 0) if last else (event.window, number + 1)
            document, begin, end = bins[order[number]].T
            stretches = np.stack([starts[document] + begin, starts[document] + end], axis=1)
            self._blocks.append(self._block(tokens, stretches, LaneCursor(event.epoch, event.unit, *cursor)))

    def _block(self, tokens: npt.NDArray[np.int32], stretches: npt.NDArray[np.int64], cursor: LaneCursor) -> Block:
        """One block from stretches [N, 2] of a window's tokens."""
        block, starts = np.zeros(self._width, np.int32), np.zeros(self._width, np.bool_)
        filled = 0
        for begin, end in stretches.tolist():
            starts[filled] = True
            block[filled : filled + end - begin] = tokens[begin:end]
            filled += end - begin
        return Block(block, starts, filled, filled, cursor, cursor.epoch)

    def cut(self) -> Block:
        return self._blocks.popleft()

    def drop_tail(self) -> int:
        return 0  # a window's blocks are complete when it ends
