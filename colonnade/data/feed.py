"""Global batches for every rank: one reader per tensor-parallel group, one broadcast per optimizer step.

1. The first rank of each tensor-parallel group reads the chunk stream and keeps its data-parallel share: of the chunks
   of a step, numbered i from 0, those with i mod dp == dp_rank.
2. A thread prefetches the shares of the next steps (`Prefetcher`).
3. One int32 broadcast sends the share and a status to the group. It uses the CPU backend, so no rank needs a host sync
   with its device to learn that the data ended or that the reader failed.
4. The share is copied to the device ahead of its step, on a side stream on CUDA.

A batch carries the position that resumes after it. Labels are its tokens shifted by one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.data.position import DataPosition
from colonnade.data.prefetch import Prefetcher
from colonnade.data.stream import TokenChunk
from colonnade.errors import ColonnadeError, LocalRunError, PeerError, UsageError
from colonnade.parallel.mesh import ParallelLayout

READY, FAILED = 0, 1
_HEADER = 2  # status, epoch
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepShare:
    """What one data-parallel rank trains on in one optimizer step, as read."""

    tokens: npt.NDArray[np.int32]  # [chunks, block_size + 1]
    position: DataPosition
    epoch: int


@dataclass(frozen=True)
class StepBatch:
    """A rank's share of a step, on its device.

    Attributes:
        tokens: [chunks, block_size + 1] int32, in the format of `colonnade/data/blocks.py`.
        host_tokens: the same on the CPU.
        epoch: epoch of the last chunk this rank read for the step, from 0.
        position: position of the stream after this step; None on ranks that do not read.
        wait_seconds: time this rank spent waiting for the batch.
    """

    tokens: Tensor
    host_tokens: Tensor
    epoch: int
    position: DataPosition | None
    wait_seconds: float


def step_shares(
    chunks: Iterator[TokenChunk], first: int, chunks_per_step: int, dp: int, dp_rank: int, apart: int = 1
) -> Iterator[StepShare]:
    """Cut the chunk stream into steps and keep one rank's share of each: chunk i of a step goes to rank i mod dp.

    Args:
        chunks: in order, the chunks whose numbers g satisfy (g - first) mod `apart` == dp_rank mod `apart`.
        first: number of the first chunk of the first step.
        apart: a divisor of dp (`TokenStream.apart`).
    """
    end = first
    while True:
        end += chunks_per_step
        step = list(islice(chunks, chunks_per_step // apart))
        if len(step) < chunks_per_step // apart:
            return
        tokens = np.stack([chunk.tokens for chunk in step[dp_rank // apart :: dp // apart]])
        yield StepShare(tokens, replace(step[-1].position, chunk=end), step[-1].epoch)


class BatchFeed:
    """Delivers each step's batch to this rank. All ranks of a tensor-parallel group must call it at the same steps.

    Args:
        chunks: the chunk stream on the reading rank of a group; None on the other ranks.
        chunks_per_step: chunks of an optimizer step over all data-parallel ranks; a multiple of dp.
        block_size: tokens per sequence.
        first: number of the first chunk of the first step.
        apart: `TokenStream.apart`.
    """

    def __init__(
        self,
        chunks: Iterator[TokenChunk] | None,
        layout: ParallelLayout,
        chunks_per_step: int,
        block_size: int,
        *,
        first: int = 0,
        apart: int = 1,
    ) -> None:
        self._layout = layout
        self._share_shape = (chunks_per_step // layout.dp, block_size + 1)
        self._reader: Prefetcher[StepShare] | None = None
        if chunks is not None:
            shares = step_shares(chunks, first, chunks_per_step, layout.dp, layout.dp_rank, apart)
            self._reader = Prefetcher(shares, _STEPS_AHEAD)
        on_cuda = layout.device.type == "cuda"
        self._stream = torch.cuda.Stream(layout.device) if on_cuda else None
        self._staged: StepBatch | None = None

    def take(self) -> StepBatch:
        """The next step's batch, without waiting if it has been staged."""
        batch, self._staged = self._staged or self._fetch(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._layout.device)
            current.wait_stream(self._stream)
            batch.tokens.record_stream(current)
        return batch

    def stage(self) -> None:
        """Fetch the next batch while the device computes. Every rank of the group must call it."""
        if self._staged is None:
            self._staged = self._fetch()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _fetch(self) -> StepBatch:
        """Read on the reading rank, broadcast to the group, copy to the device.

        Raises:
            UsageError, RunError: on the reading rank, whatever the stream raised (`_fail`).
            PeerError: on the other ranks of the group, if the reading rank failed.
        """
        begin = time.perf_counter()
        share, failure = None, None
        rows, width = self._share_shape
        packet = torch.empty(_HEADER + rows * width, dtype=torch.int32)
        if self._reader is not None:
            try:
                share = self._reader.get()
            except (ColonnadeError, OSError, StopIteration) as error:
                failure = error
            packet[0] = READY if failure is None else FAILED
            if share is not None:
                packet[1] = share.epoch
                packet[_HEADER:] = torch.from_numpy(share.tokens).view(-1)
        if self._layout.tp > 1:
            dist.broadcast(packet, group=self._layout.tp_group, group_src=0)
        if failure is not None:
            self._fail(failure)
        if int(packet[0]) == FAILED:
            raise PeerError("the reading rank of this tensor-parallel group failed")
        tokens = packet[_HEADER:].view(rows, width)
        return StepBatch(
            tokens=self._to_device(tokens),
            host_tokens=tokens,
            epoch=int(packet[1]),
            position=None if share is None else share.position,
            wait_seconds=time.perf_counter() - begin,
        )

    def _fail(self, failure: Any) -> None:
        if isinstance(failure, OSError):
            raise LocalRunError(f"reading the training data failed: {failure}") from failure
        if isinstance(failure, StopIteration):
            raise LocalRunError("the training data ended, which an endless stream does not") from failure
        if self._layout.is_main or isinstance(failure, UsageError):
            raise failure
        raise LocalRunError(str(failure)) from failure

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self._stream is None:
            return tokens
        with torch.cuda.stream(self._stream):
            return tokens.pin_memory().to(self._layout.device, non_blocking=True)
