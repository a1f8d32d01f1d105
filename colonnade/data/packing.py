"""Packing: documents laid end to end and cut into blocks.

Blocks hold `block_size + 1` tokens and are cut with stride `block_size`, so that neighbours share one token: the last
target of a block is the first input of the next. No document is dropped for being short and no token is lost but the
tail of an epoch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colonnade.data.position import DataPosition, LaneCursor
from colonnade.data.tokenization import EncodedRows


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One block and the state of the stream after it.

    Attributes:
        tokens: int32 [block_size + 1]; inputs are `tokens[:-1]`, targets `tokens[1:]`.
        position: resumes with the next chunk.
        epoch: the epoch its tokens come from, from 0.
    """

    tokens: npt.NDArray[np.int32]
    position: DataPosition
    epoch: int


class BlockPacker:
    """Cuts blocks from a queue of encoded documents and knows which document each block begins in."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._queue: deque[EncodedRows] = deque()
        self._begin = 0  # first unread token of the queue's first entry
        self._available = 0

    @property
    def ready(self) -> bool:
        """Whether a whole block is there."""
        return self._available > self._block_size

    def add(self, encoded: EncodedRows, begin: int = 0) -> None:
        """Append documents; the first `begin` tokens are left out (only sensible for an empty queue)."""
        if len(encoded.tokens) > begin:
            self._queue.append(encoded)
            self._begin = begin if len(self._queue) == 1 else self._begin
            self._available += len(encoded.tokens) - begin

    def cut(self) -> tuple[npt.NDArray[np.int32], LaneCursor]:
        """The next block (int32 [block_size + 1]) and where the one after it begins. Only when `ready`."""
        block = np.empty(self._block_size + 1, np.int32)
        filled = 0
        while True:
            tokens = self._queue[0].tokens
            taken = min(len(tokens) - self._begin, self._block_size - filled)
            block[filled : filled + taken] = tokens[self._begin : self._begin + taken]
            filled += taken
            self._begin += taken
            if self._begin < len(tokens):
                break
            self._queue.popleft()
            self._begin = 0
        self._available -= self._block_size
        # The shared token is copied and stays in the queue.
        front = self._queue[0]
        block[-1] = front.tokens[self._begin]
        return block, self._cursor(front)

    def drop_tail(self) -> int:
        """Forget what is left and return how many tokens that was."""
        dropped = self._available
        self._queue.clear()
        self._begin = self._available = 0
        return dropped

    def _cursor(self, front: EncodedRows) -> LaneCursor:
        document = int(np.searchsorted(front.ends, self._begin, side="right"))
        start = int(front.ends[document - 1]) if document else 0
        return LaneCursor(front.epoch, front.unit, int(front.rows[document]), self._begin - start)
