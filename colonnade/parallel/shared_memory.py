"""Tensors exchanged through memory that the ranks of one machine share, instead of through sockets.

gloo sends every byte through the network stack, also between two processes of one machine: 2.5 to 5 ms for the sum of
2 to 4 MB on two ranks, of which copying and adding take 1. Here each rank writes its tensor where the others see it,
one number goes through gloo to tell that it is there, and each rank reads the tensors of all. That number keeps what
the process group promises: a rank that died or hangs ends the wait with an error, after the group's own time limit.

Each exchange in flight has a buffer of its own. A buffer is reused once all ranks have read it, and each rank knows
when without a message: all ranks start and finish exchanges in the same order (also that of autograd), so once a
later exchange has completed, every rank had started it, and had finished whatever came before. The number that goes
through gloo names the exchange and its buffer: ranks that have got out of step end with an error.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.parallel.pending import Pending

SMALLEST = 1 << 15
"""Bytes of a rank's tensor from which on sockets are slower; what is smaller is not exchanged here."""
LIMIT = 1 << 28
"""Bytes of all buffers of a rank."""


@dataclass
class _Buffer:
    """A stretch of memory of each rank, by rank.

    Attributes:
        finished: when this rank had last read it; None while an exchange is under way there.
    """

    number: int
    views: list[Tensor]
    finished: int | None

    @property
    def size(self) -> int:
        return self.views[0].numel()


class SharedMemory:
    """Buffers shared by the ranks of a group, allocated on demand. All ranks call the same methods alike.

    Args:
        group: of gloo. Where its ranks are not on one machine, or there is no more memory, no buffer is made.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._buffers: list[_Buffer] = []
        self._clock = 0  # counts starts and ends of exchanges
        self._passed = 0  # the latest start that all ranks are known to have passed
        self._may_grow = True

    @property
    def own_buffers(self) -> list[Tensor]:
        """This rank's part of the buffers: bytes that no allocator of torch tells of."""
        return [buffer.views[self._rank] for buffer in self._buffers]

    def start(self, tensor: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Pending[Tensor] | None:
        """Show `tensor` to all ranks; the value is `read` of every rank's tensor, in the order of ranks.

        Args:
            tensor: contiguous, on the CPU, of the same size on every rank. It has been copied when this returns.
            read: called when the value is waited for; must not keep what it is given.

        Returns:
            None where the tensor is too small, or has no buffer: the caller sends it in another way.

        Raises:
            RuntimeError: when it is waited for: a rank is gone, or has come with another exchange.
        """
        buffer = self._free_buffer(tensor.nbytes)
        if buffer is None:
            return None
        views = [view[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for view in buffer.views]
        buffer.finished = None
        self._clock += 1
        started = self._clock
        views[self._rank].copy_(tensor)
        place = started * len(self._buffers) + buffer.number
        # The highest and, as its opposite, the lowest of all ranks.
        told = torch.tensor([place, -place])
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            if told.tolist() != [place, -place]:
                raise RuntimeError("ranks have come to an exchange in different orders")
            self._passed = max(self._passed, started)
            try:
                return read(views)
            finally:
                self._clock += 1
                buffer.finished = self._clock

        return Pending(finish=finish)

    def _free_buffer(self, size: int) -> _Buffer | None:
        if size < SMALLEST:
            return None
        for buffer in self._buffers:
            if buffer.size >= size and buffer.finished is not None and buffer.finished < self._passed:
                return buffer
        size = 1 << (size - 1).bit_length()
        if not self._may_grow or sum(buffer.size for buffer in self._buffers) + size > LIMIT:
            return None
        views = self._mapped(size)
        if views is None:
            self._may_grow = False
            return None
        self._buffers.append(_Buffer(len(self._buffers), views, None))
        return self._buffers[-1]

    def _mapped(self, size: int) -> list[Tensor] | None:
        """So many bytes of each rank, seen by all; None, on all ranks, where one of them does not see them."""
        own = _Place.reserved(size)
        try:
            places: list[_Place | None] = [None] * self._size
            dist.all_gather_object(places, own, group=self._group)
            views = [None if place is None else place.mapped(size) for place in places]
            seen = [view for view in views if view is not None]
            told = torch.tensor(len(seen))
            dist.all_reduce(told, op=dist.ReduceOp.MIN, group=self._group)
            return seen if int(told) == self._size else None
        finally:
            if own is not None:
                os.close(own.handle)  # what is mapped stays


@dataclass(frozen=True)
class _Place:
    """Where the processes of a machine find the memory of one of them while it holds it open.

    The memory has no name in a file system: nothing is left behind, whatever ends the run.

    Attributes:
        label: of this memory alone. On another machine there may be a process of the same number.
        network: processes that do not share a network do not share memory either.
    """

    label: str
    process: int
    handle: int
    network: int

    @classmethod
    def reserved(cls, size: int) -> _Place | None:
        """Memory that is really there: one that is only promised would end the process when it is used."""
        label = f"colonnade-{uuid.uuid4().hex}"
        try:
            handle = os.memfd_create(label)
        except (AttributeError, OSError):  # not on this system
            return None
        try:
            os.posix_fallocate(handle, 0, size)
            return cls(label, os.getpid(), handle, _network())
        except OSError:
            os.close(handle)
            return None

    def mapped(self, size: int) -> Tensor | None:
        """The memory as bytes; None where this process does not see it."""
        path = f"/proc/{self.process}/fd/{self.handle}"
        try:
            if self.network != _network() or self.label not in os.readlink(path):
                return None
            handle = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            return torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)
        except OSError:
            return None
        finally:
            os.close(handle)


def _network() -> int:
    """The network that this process lives in."""
    return os.stat("/proc/self/ns/net").st_ino
