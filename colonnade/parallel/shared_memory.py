"""Tensors exchanged through memory that the ranks of one machine share, instead of through sockets.

gloo sends every byte through the network stack, also between two processes of one machine: 2.5 to 5 ms for the sum of
2 to 4 MB on two ranks, of which copying and adding take 1. Here each rank writes its tensor where the others see it,
one number goes through gloo to tell that it is there, and each rank reads the tensors of all. That number keeps what
the process group promises: a rank that died or hangs ends the wait with an error, after the group's own time limit.

Memory is cut into rooms, one for an exchange under way. A room is used again when all ranks have read it, which each of
them knows without being told: all ranks start and finish exchanges in the same order, as they do with any collective.
So when an exchange has been waited for, every rank had started it, and had finished whatever came before its start.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.parallel.pending import Pending

FOLDER = Path("/dev/shm")
SMALLEST = 1 << 15
"""Bytes of a rank's tensor from which on sockets are slower; what is smaller is not exchanged here."""
LIMIT = 1 << 28
"""Bytes of all rooms of a rank."""


@dataclass
class _Room:
    """A stretch of memory of each rank, by rank.

    Attributes:
        finished: when this rank had last read it; None while an exchange is under way there.
    """

    views: list[Tensor]
    finished: int | None

    @property
    def size(self) -> int:
        return self.views[0].numel()


class SharedMemory:
    """Rooms that the ranks of a group share, made where they are needed. All ranks call the same methods alike.

    Args:
        group: of gloo. Where its ranks are not on one machine, or there is no more memory, no room is made.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._rooms: list[_Room] = []
        self._clock = 0  # counts starts and ends of exchanges
        self._passed = 0  # the latest start that all ranks are known to have passed
        self._name: str | None = None
        self._may_grow = True

    def start(self, tensor: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Pending[Tensor] | None:
        """Show `tensor` to all ranks; the value is `read` of every rank's tensor, in the order of ranks.

        Args:
            tensor: contiguous, on the CPU, of the same size on every rank. It has been copied when this returns.
            read: called when the value is waited for; must not keep what it is given.

        Returns:
            None where the tensor is too small, or has no room: the caller sends it in another way.
        """
        room = self._free_room(tensor.nbytes)
        if room is None:
            return None
        views = [view[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for view in room.views]
        room.finished = None
        self._clock += 1
        started = self._clock
        views[self._rank].copy_(tensor)
        work = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            self._passed = max(self._passed, started)
            value = read(views)
            self._clock += 1
            room.finished = self._clock
            return value

        return Pending(finish=finish)

    def _free_room(self, size: int) -> _Room | None:
        if size < SMALLEST:
            return None
        for room in self._rooms:
            if room.size >= size and room.finished is not None and room.finished < self._passed:
                return room
        size = 1 << (size - 1).bit_length()
        if not self._may_grow or sum(room.size for room in self._rooms) + size > LIMIT:
            return None
        views = self._mapped(size)
        if views is None:
            self._may_grow = False
            return None
        self._rooms.append(_Room(views, None))
        return self._rooms[-1]

    def _mapped(self, size: int) -> list[Tensor] | None:
        """So many bytes of each rank, seen by all; None, on all ranks, where one of them does not see them."""
        if self._name is None:
            names = [f"colonnade-{uuid.uuid4().hex}"]
            dist.broadcast_object_list(names, group=self._group, group_src=0)
            self._name = names[0]
        paths = [FOLDER / f"{self._name}-{len(self._rooms)}-{rank}" for rank in range(self._size)]
        own = paths[self._rank]
        try:
            is_there = _reserve(own, size)
            if not self._all(is_there):
                return None
            views = [_map(path, size) for path in paths]
            # Nobody needs a name any more once all have opened it: nothing is left behind, whatever ends the run.
            return [view for view in views if view is not None] if self._all(None not in views) else None
        finally:
            own.unlink(missing_ok=True)

    def _all(self, holds: bool) -> bool:
        told = torch.tensor(int(holds))
        dist.all_reduce(told, op=dist.ReduceOp.MIN, group=self._group)
        return bool(told)


def _reserve(path: Path, size: int) -> bool:
    """Make a file with so much memory behind it. Memory that is only promised would end the process when it is used."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:  # no such folder on this system, or no right to write there
        return False
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _map(path: Path, size: int) -> Tensor | None:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:  # it is on another machine
        return None
    try:
        return torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)
    except OSError:
        return None
    finally:
        os.close(handle)
