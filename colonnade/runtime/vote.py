"""Collective decisions: an error on one rank becomes an error on all, so that no rank waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from colonnade.errors import ColonnadeError, RunError, UsageError, message_line

T = TypeVar("T")
_Failure = tuple[bool, str]


def one_line(error: BaseException) -> str:
    """`error` on one line, prefixed with its type unless it is a `ColonnadeError`, whose text is enough."""
    text = message_line(error)
    return text if isinstance(error, ColonnadeError) else f"{type(error).__name__}: {text}"


@contextmanager
def vote(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on every rank of `group`; an error on one is raised on all. Collective: one all-gather of outcomes.

    Raises:
        UsageError: the block raised one on some rank; raised on all.
        RunError: the block raised one, or an OSError, on some rank; raised on all, naming the rank.
    """
    failure: _Failure | None = None
    cause: BaseException | None = None
    try:
        yield
    except (ColonnadeError, OSError) as error:
        failure, cause = (isinstance(error, UsageError), one_line(error)), error
    votes: list[_Failure | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(votes, failure, group=group)
    for rank, ballot in enumerate(votes):
        if ballot is not None:
            is_usage, text = ballot
            if is_usage:
                raise UsageError(text) from cause
            raise RunError(f"rank {rank}: {text}") from cause


def on_first_rank(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `function` on the first rank of `group`; return its result, which must be picklable, on all. Collective.

    Raises:
        UsageError, RunError: as in `vote`.
    """
    box: list[T | None] = [None]
    with vote(group):
        if dist.get_rank(group) == 0:
            box[0] = function()
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]  # type: ignore[return-value]  # T may itself allow None


def highest(value: int) -> int:
    """The highest of the ranks' values. Collective: one all-reduce on the CPU, without waiting for the device."""
    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)
