"""Threads beside the training thread, for what that thread cannot notice while it is blocked in a collective.

- **Signals.** SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask a run to stop. Python runs signal handlers only on the main
  thread, and only after a collective has returned; the signal wakeup descriptor notifies the watchdog thread at once.
- **A failed peer.** A failing rank cannot vote: its peers are blocked in a collective that it will never reach, and its
  vote would be matched with that collective. So it sets a key in the rendezvous store.
- **A phase that does not end.** Each phase of the main thread has a time limit. Beyond it, all ranks write their
  threads' stacks, report how far they are, and exit; so does a rank that was asked to stop and whose peers never come.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from colonnade.screen import surviving

# SIGHUP comes when a terminal is closed; torchrun forwards it.
STOP_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 1.0
# A rank that was asked to stop has to finish its step, and torchrun kills it after 30 s by default.
STOP_GRACE_SECONDS = 20.0
# How long a hung rank waits for the reports of the others. Each checks the store once every POLL_SECONDS.
GATHER_SECONDS = 5.0
# NCCL's own watchdog writes its flight recorder when a collective exceeds the same limit; this is its time to do so.
NCCL_DUMP_SECONDS = 60.0

_FAILED, _HUNG, _PLACE = "colonnade/peer_failed", "colonnade/peer_hung", "colonnade/place"


# What NCCL's errors say when a peer is gone. Its other errors (of the system, the network, the device, the arguments)
# are of the same class.
_NCCL_LOST = ("remote process", "remote peer", "reset by peer", "was aborted")


def is_connection_lost(error: BaseException) -> bool:
    """Whether a collective's error means that a peer is gone, rather than that something is wrong on this rank."""
    text = str(error).lower()
    if isinstance(error, dist.DistBackendError):
        return any(words in text for words in _NCCL_LOST)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


@dataclass(frozen=True)
class Phase:
    """What the main thread is doing.

    Attributes:
        what: a description that can follow "rank 3 is in".
        order: number of phases before this one; all ranks enter the same phases in the same order.
        limit: seconds that it may take; 0 for no limit.
        is_step: whether it is part of an optimizer step, in which ranks wait for each other.
        is_first: whether that is the first step, which compiles: a stop may have to wait for it.
        began: start time on the monotonic clock.
    """

    what: str
    order: int
    limit: float
    is_step: bool
    is_first: bool
    began: float


class Watchdog:
    """Monitors a training loop; a context manager, entered on the main thread.

    Args:
        folder: where a hung rank writes its stacks, as `rank_N.txt`; created when needed.
        on_cuda: give NCCL time to write its flight recorder.

    Attributes:
        stop_signal: the name of the signal that asked for a stop; None if there was none.
    """

    def __init__(self, folder: Path, *, on_cuda: bool = False) -> None:
        self.folder = folder
        self.stop_signal: str | None = None
        self._longest_step = 0.0
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store() if self._world > 1 else None
        self._on_cuda = on_cuda
        self._phase = Phase("starting", 0, 0.0, False, False, time.monotonic())
        self._stop_asked_at = 0.0
        self._handlers: dict[signal.Signals, object] = {}
        self._wakeup, self._signalled = socket.socketpair()
        self._wakeup.setblocking(False)
        self._done = threading.Event()
        self._peer_hangs = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        # Only the main thread may set handlers; a run inside another program keeps that program's.
        if threading.current_thread() is threading.main_thread():
            # One that is ignored stays so: `nohup` asks for that.
            heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, _noted) for number in heeded}
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        if self._on_cuda:  # NCCL writes there too, and creates no folder
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        if self._store is not None:
            threading.Thread(target=self._listen, name="peer-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if self._handlers:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        with contextlib.suppress(OSError):
            self._wakeup.send(b"\0")
        self._thread.join()
        self._wakeup.close()
        self._signalled.close()
        with contextlib.suppress(OSError):  # does not exist, or is not empty
            self.folder.rmdir()

    def enter(self, what: str, limit: float, *, is_step: bool = False, is_first: bool = False) -> None:
        """Note that the main thread enters a new phase, which may take `limit` seconds (0: no limit)."""
        now, last = time.monotonic(), self._phase
        if last.is_step and not last.is_first:
            self._longest_step = max(self._longest_step, now - last.began)
        self._phase = Phase(what, last.order + 1, limit, is_step, is_first, now)

    @property
    def phase(self) -> Phase:
        """What the main thread is doing."""
        return self._phase

    def announce_failure(self) -> None:
        """Tell all ranks that this one is exiting; call it before raising the exception that ends it."""
        self._done.set()
        if self._store is not None:
            with contextlib.suppress(dist.DistError):  # the rank that holds the store is gone itself
                self._store.set(_FAILED, str(self._rank))

    # ----------------------------------------------------------------------------------------- on the threads

    def _watch(self) -> None:
        """Handle signals and limits. Never uses the store, which may not answer if the network is down."""
        signals = select.poll()  # `select.select` refuses descriptors above 1023, which a run of many shards may reach
        signals.register(self._signalled, select.POLLIN)
        while not self._done.is_set():
            if signals.poll(POLL_SECONDS * 1000):
                self._take_signals(self._signalled.recv(64))
            if self._done.is_set():
                return
            late = self._too_late()
            if late is not None or self._peer_hangs:
                self._leave_hung(late)

    def _listen(self) -> None:
        """Poll the store for what other ranks have reported."""
        assert self._store is not None
        try:
            while not self._done.wait(POLL_SECONDS):
                if self._store.check([_FAILED]) and not self._done.is_set():
                    # The main thread may be blocked in a collective for good, so no orderly exit is possible.
                    _leave(1)
                self._peer_hangs = self._store.check([_HUNG])
        except dist.DistError:  # the store is gone: the launcher is taking the run down
            return

    def _take_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number not in STOP_SIGNALS:
                continue
            if number == signal.SIGINT and self.stop_signal == "SIGINT":
                with surviving(sys.stderr):
                    print("interrupted a second time: left without a save", file=sys.stderr)
                _leave(130)
            if self.stop_signal is None:
                self._stop_asked_at = time.monotonic()
            self.stop_signal = signal.Signals(number).name

    def _too_late(self) -> str | None:
        """A description of what took too long; None if nothing did."""
        phase, now = self._phase, time.monotonic()
        if phase.limit and now - phase.began > phase.limit:
            return f"{phase.what} took longer than {phase.limit:g} s"
        # A single rank has no peer that may never come: a stop waits for the step, however long it takes.
        if self.stop_signal is not None and phase.is_step and not phase.is_first and self._world > 1:
            grace = STOP_GRACE_SECONDS + 3 * self._longest_step
            if now - max(phase.began, self._stop_asked_at) > grace:
                return f"{self.stop_signal} asked for a stop, and {phase.what} did not end within {grace:.0f} s"
        return None

    def _leave_hung(self, late: str | None) -> None:
        try:
            self._say_where(late)
        finally:
            _leave(1)

    def _say_where(self, late: str | None) -> None:
        self._dump_stacks()
        phase = self._phase
        here = {"what": phase.what, "order": phase.order, "seconds": time.monotonic() - phase.began}
        places: dict[int, dict[str, Any]] = {self._rank: here}
        told = [late or "another rank hangs"]
        if self._store is not None:
            exchange = threading.Thread(target=self._exchange, args=(late, places, told), daemon=True)
            exchange.start()
            exchange.join(GATHER_SECONDS + POLL_SECONDS)
            places = dict(places)  # a copy, since a slow store may still answer
        if self._rank == min(places):
            where = f"{self.folder}/rank_*.txt"
            print(f"error: {told[-1]}: {describe_places(places, self._world)}; stacks: {where}", file=sys.stderr)
        sys.stderr.flush()
        if self._on_cuda:
            time.sleep(NCCL_DUMP_SECONDS)

    def _exchange(self, late: str | None, places: dict[int, dict[str, Any]], told: list[str]) -> None:
        """Report this rank's phase; gather the phases that others report in time, and the first reported cause."""
        assert self._store is not None
        with contextlib.suppress(dist.DistError):
            self._store.set(f"{_PLACE}/{self._rank}", json.dumps(places[self._rank]))
            if late is not None and not self._store.check([_HUNG]):
                self._store.set(_HUNG, late)
            told.append(self._store.get(_HUNG).decode())
            deadline = time.monotonic() + GATHER_SECONDS
            while len(places) < self._world and time.monotonic() < deadline:
                for rank in range(self._world):
                    if rank not in places and self._store.check([f"{_PLACE}/{rank}"]):
                        places[rank] = json.loads(self._store.get(f"{_PLACE}/{rank}"))
                time.sleep(0.1)

    def _dump_stacks(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{self._rank}.txt").open("a", encoding="utf-8") as file:
                moment = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{moment} {socket.gethostname()} process {os.getpid()}: {self._phase.what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"the stacks of rank {self._rank} could not be written: {error}", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)


def describe_places(places: Mapping[int, Mapping[str, Any]], world: int) -> str:
    """How far each of `world` ranks is, on one line, starting with those that the others are waiting for."""
    silent = [rank for rank in range(world) if rank not in places]
    parts = [f"rank {rank} gives no sign" for rank in silent]
    last = max(place["order"] for place in places.values())
    for rank in sorted(places, key=lambda rank: (places[rank]["order"], rank)):
        place = places[rank]
        behind = "behind, " if place["order"] < last else ""
        parts.append(f"rank {rank} is {behind}in {place['what']} since {place['seconds']:.0f} s")
    return "; ".join(parts)


def _noted(number: int, frame: object) -> None:
    """A no-op handler: if one is installed, Python writes to the wakeup descriptor and the signal does not kill."""


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # no screen keeps a rank from leaving
            stream.flush()
    os._exit(code)
