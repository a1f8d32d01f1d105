"""Tensor exchange through memory shared by the ranks of one machine, instead of through sockets.

gloo sends every byte through the network stack, even between two processes on one machine: summing 2 to 4 MB on two
ranks takes 2.5 to 5 ms, of which copying and adding take 1 ms. Here each rank writes its tensor to memory that the
others can read, one number goes through gloo to signal that it is there, and each rank reads the tensors of all. That
number preserves what the process group guarantees: if a rank has died or hangs, the wait ends with an error, after the
group's own timeout.

Each exchange in flight has its own buffer. A buffer is reused once all ranks have read it, and each rank knows when
without a message: all ranks start and finish exchanges in the same order (including those in autograd), so once a later
exchange has completed, every rank had started it and had finished everything before it. The number that goes through
gloo identifies the exchange and its buffer: ranks that are out of step end with an error.
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
"""Size in bytes of a rank's tensor from which on sockets are slower; smaller tensors are not exchanged here."""
LIMIT = 1 << 28
"""Maximum size in bytes of all buffers of a rank together."""


@dataclass
class _Buffer:
    """One region of memory per rank; `views` are in rank order.

    Attributes:
        finished: the clock value when this rank last finished reading it; None while an exchange in it is in flight.
    """

    number: int
    views: list[Tensor]
    finished: int | None

    @property
    def size(self) -> int:
        return self.views[0].numel()


class SharedMemory:
    """Buffers shared by the ranks of a group, allocated on demand. All ranks make the same calls in the same order.

    Args:
        group: a gloo group. If its ranks are not on one machine, or there is no memory left, no buffer is created.
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
        """This rank's part of the buffers: memory that no torch allocator reports."""
        return [buffer.views[self._rank] for buffer in self._buffers]

    def start(self, tensor: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Pending[Tensor] | None:
        """Make `tensor` visible to all ranks; the value is `read` applied to all ranks' tensors, in rank order.

        Args:
            tensor: contiguous, on the CPU, of the same size on every rank. It has been copied when this returns.
            read: called when the value is waited for; must not keep the tensors it is given.

        Returns:
            None if the tensor is too small, or no buffer is available: the caller has to send it in another way.

        Raises:
            RuntimeError: from `wait`, if a rank is gone or takes part in a different exchange.
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
        # With MAX, the first is the highest of all ranks and the second the negated lowest.
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
        """`size` bytes per rank, mapped by all ranks; None, on all ranks, if one of them cannot map them."""
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
                os.close(own.handle)  # the mapping stays valid


@dataclass(frozen=True)
class _Place:
    """Where the other processes of a machine find a process's memory while that process holds it open.

    The memory has no name in a file system, so nothing is left behind however the run ends.

    Attributes:
        label: unique to this memory; `process` is not, since another machine may have a process with that number.
        network: the process's network namespace; processes in different ones are taken not to share memory.
    """

    label: str
    process: int
    handle: int
    network: int

    @classmethod
    def reserved(cls, size: int) -> _Place | None:
        """Memory that is really allocated: if it were only overcommitted, using it could kill the process."""
        label = f"colonnade-{uuid.uuid4().hex}"
        try:
            handle = os.memfd_create(label)
        except (AttributeError, OSError):  # not available on this system
            return None
        try:
            os.posix_fallocate(handle, 0, size)
            return cls(label, os.getpid(), handle, _network())
        except OSError:
            os.close(handle)
            return None

    def mapped(self, size: int) -> Tensor | None:
        """The memory as bytes; None if this process cannot map it."""
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
    """The network namespace of this process."""
    return os.stat("/proc/self/ns/net").st_ino
