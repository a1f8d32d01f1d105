"""Runs commands in processes forked from one that has imported everything, so that a start takes a tenth of a second.

Returns what a shell would see: exit code, output and errors.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ("training", "training_utils", "resume_pretrain_tensor", "run.start", "torch._dynamo", "pyarrow.parquet")
_LATE_IMPORTS = (
    "transformers.tokenization_utils_tokenizers",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "mpl_toolkits.mplot3d",
    "pyarrow.compute",
    "pyarrow.pandas_compat",
    "pandas",  # pyarrow imports it where it is installed
    "fastokens",
)
CONTEXT.set_forkserver_preload([*_PRELOAD, *_LATE_IMPORTS])
PATIENCE = 300.0
"""Seconds after which a process counts as hung; long enough for a busy machine."""
ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """How a command ended."""

    code: int | None  # None if it had to be killed
    output: str
    errors: str


def _enter(
    script: str,
    flags: Sequence[str],
    folder: str,
    environment: Mapping[str, str],
    prepare: Callable[[], None] | None,
    draws: bool,
) -> None:
    """Run a command in a forked process. Never returns, because `launch` exits the process."""
    for name, descriptor in (("output", 1), ("errors", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    sys.argv = [f"{script}.py", *flags]
    # As in a terminal: tests that were started by `nohup`, or in the background of a script, ignore these.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A garbage collection would touch, and thereby copy, every page shared with the parent process.
    gc.freeze()
    launch = importlib.import_module("colonnade.runtime.launch")
    setattr(launch, "_SILENT_SECONDS", 0.0)  # noqa: B010 - there is no torchrun to end the other ranks
    if not draws:
        pictures = importlib.import_module("colonnade.telemetry.pictures")
        pictures.Pictures.close = lambda self, failed: None
    if prepare is not None:
        prepare()
    launch.launch(importlib.import_module(script).main)


class Running:
    """A running command: its processes, and what each has printed so far, by rank."""

    def __init__(self, processes: dict[int, BaseProcess], folder: tempfile.TemporaryDirectory[str]) -> None:
        self.processes = processes
        self._folder = folder

    def text(self, rank: int, name: str = "output") -> str:
        path = Path(self._folder.name, str(rank), name)
        return path.read_text(errors="replace") if path.exists() else ""

    def is_alive(self) -> bool:
        """Whether any rank is still running."""
        return any(process.is_alive() for process in self.processes.values())

    def until(self, pattern: str, rank: int = 0, seconds: float = PATIENCE) -> None:
        """Wait until a rank has printed something that matches `pattern`."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text(rank)):
            said = f"no {pattern!r} in ...{self.text(rank)[-500:]} {self.text(rank, 'errors')[-500:]}"
            assert time.monotonic() < deadline, said
            assert self.is_alive(), said
            time.sleep(0.02)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to the given ranks, or to all."""
        for rank in ranks or self.processes:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def finish(self, seconds: float = PATIENCE) -> list[Outcome]:
        """Wait for all ranks, and kill those that have not exited in time."""
        deadline = time.monotonic() + seconds
        outcomes = []
        for rank, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            killed = process.is_alive()
            if killed:
                process.kill()
                process.join()
            code = None if killed else process.exitcode
            outcomes.append(Outcome(code, self.text(rank), self.text(rank, "errors")))
        self._folder.cleanup()
        return outcomes


def _free_port() -> int:
    """A port that nobody listens on, below the range of ephemeral ports.

    The system could assign an ephemeral port to a connection of another test before a rank listens on it.
    """
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def begin(
    script: str,
    flags: Sequence[str],
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    present: Sequence[int] | None = None,
    draws: bool = False,
) -> Running:
    """Start a command on `ranks` processes, as torchrun would.

    Args:
        prepare: a module-level function called in each process before the command, for example to inject a fault.
        draws: draw the run's pictures at its end, which takes as long as some of these runs.
        present: the ranks that are actually started; None for all.
    """
    common = dict(environment or {})
    if ranks > 1:
        common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    folder = tempfile.TemporaryDirectory()
    processes: dict[int, BaseProcess] = {}
    for rank in range(ranks) if present is None else present:
        own = Path(folder.name, str(rank))
        own.mkdir()
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        arguments = (script, list(flags), str(own), {**common, **place}, prepare, draws)
        process = CONTEXT.Process(target=_enter, args=arguments)
        process.start()
        processes[rank] = process
    return Running(processes, folder)


def start(
    script: str,
    flags: Sequence[str],
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    seconds: float = PATIENCE,
    prepare: Callable[[], None] | None = None,
    draws: bool = False,
) -> list[Outcome]:
    """Run a command as `begin` does, wait for all of its ranks, and return the outcome of each."""
    running = begin(script, flags, ranks=ranks, environment=environment, prepare=prepare, draws=draws)
    return running.finish(seconds)
