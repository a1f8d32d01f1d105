"""When a run stops before its last step: by a signal, or because its time is up. All ranks stop after the same step."""

from __future__ import annotations

import os
import socket
import time

import psutil
import torch.distributed as dist

from colonnade.parallel.vote import highest
from colonnade.parallel.watchdog import STOP_SIGNALS, Watchdog

# Where ranks have several reasons, the last of these is told. 0 is none.
WALL_TIME, SAVE_FAILED = "wall time", "a save failed"
REASONS = ("", WALL_TIME, *(number.name for number in STOP_SIGNALS), SAVE_FAILED)


def _launcher() -> psutil.Process:
    """torchrun's process on this machine; without torchrun this one."""
    process = psutil.Process()
    return (process.parent() or process) if "TORCHELASTIC_RUN_ID" in os.environ else process


def launched_at() -> float:
    """When torchrun, or without it this process, was started; seconds since 1970."""
    return _launcher().create_time()


def launchers() -> list[str]:
    """Names of the processes that started the ranks, one a node. They outlive their ranks over `--max-restarts`, so
    that two starts which share one belong to one launch. Collective."""
    process = _launcher()
    named: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(named, f"{socket.gethostname()} {process.pid} {process.create_time()}")
    return sorted(set(named))


class StopVote:
    """Asked after every step, on every rank, whether to stop.

    Args:
        watch: has noticed the signals of this rank.
        wall_time: seconds from the launch in which the run is to have stopped; None for no limit.
    """

    def __init__(self, watch: Watchdog, wall_time: float | None) -> None:
        self._watch = watch
        self._deadline = None if wall_time is None else launched_at() + wall_time

    def reason(self, reserve: float, *, save_failed: bool = False) -> str | None:
        """Why all ranks stop now; None where they go on. Collective.

        Args:
            reserve: seconds that another step and the last save will take: the time is up that long before the limit.
            save_failed: a save in the background has failed, as far as this rank knows.
        """
        own = SAVE_FAILED if save_failed else self._watch.stop_signal or ""
        if not own and self._deadline is not None and time.time() + reserve >= self._deadline:
            own = WALL_TIME
        return REASONS[highest(REASONS.index(own))] or None
