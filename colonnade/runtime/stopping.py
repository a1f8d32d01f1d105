"""Stopping early, on a signal, when time is up or after a failed save. All ranks stop after the same step."""

from __future__ import annotations

import os
import socket
import time

import psutil
import torch.distributed as dist

from colonnade.runtime.vote import highest
from colonnade.runtime.watchdog import STOP_SIGNALS, Watchdog

# If ranks have different reasons, the last of these is reported. Index 0 means none.
WALL_TIME, SAVE_FAILED = "wall time", "a save failed"
REASONS = ("", WALL_TIME, *(number.name for number in STOP_SIGNALS), SAVE_FAILED)


def _launcher() -> psutil.Process:
    """torchrun's process on this machine; this process without torchrun."""
    process = psutil.Process()
    return (process.parent() or process) if "TORCHELASTIC_RUN_ID" in os.environ else process


def launched_at() -> float:
    """When torchrun, or this process without torchrun, was started; seconds since 1970."""
    return _launcher().create_time()


def launchers() -> list[str]:
    """Identifiers of the processes that started the ranks, one per node. They outlive their ranks across
    `--max-restarts`, so two starts that share one belong to the same launch. Collective."""
    process = _launcher()
    named: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(named, f"{socket.gethostname()} {process.pid} {process.create_time()}")
    return sorted(set(named))


class StopVote:
    """Decides after every step whether all ranks stop.

    Args:
        watch: the watchdog that receives this rank's signals.
        wall_time: seconds after the launch by which the run has to have stopped; None for no limit.
    """

    def __init__(self, watch: Watchdog, wall_time: float | None) -> None:
        self._watch = watch
        self._deadline = None if wall_time is None else launched_at() + wall_time

    def reason(self, reserve: float, *, save_failed: bool = False) -> str | None:
        """Why all ranks stop now; None to continue. Collective.

        Args:
            reserve: seconds that another step and the last save will take: time is up that long before the limit.
            save_failed: whether this rank knows of a failed background save.
        """
        own = SAVE_FAILED if save_failed else self._watch.stop_signal or ""
        if not own and self._deadline is not None and time.time() + reserve >= self._deadline:
            own = WALL_TIME
        return REASONS[highest(REASONS.index(own))] or None
