"""Commands in processes of their own, forked from one that has imported everything: a start takes a tenth of a second.

What comes back is what a shell would see: exit code, output and errors.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ("training", "resume_pretrain_tensor", "run_setup", "torch._dynamo", "pyarrow.parquet")
_LATE_IMPORTS = (
    "transformers.tokenization_utils_tokenizers",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "mpl_toolkits.mplot3d",
)
_CONTEXT.set_forkserver_preload([*_PRELOAD, *_LATE_IMPORTS])
ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """How a command ended."""

    code: int | None  # None where it had to be killed
    output: str
    errors: str


def _enter(script: str, flags: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    """The life of a command. Never returns: `launch` leaves the process."""
    for name, descriptor in (("output", 1), ("errors", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    sys.argv = [f"{script}.py", *flags]
    # A collection would touch, and so copy, every page shared with the process this one was forked from.
    gc.freeze()
    launch = importlib.import_module("colonnade.parallel.launch")
    setattr(launch, "_SILENT_SECONDS", 0.0)  # noqa: B010 - no torchrun here that would end the other ranks
    launch.launch(importlib.import_module(script).main)


def start(
    script: str,
    flags: Sequence[str],
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    seconds: float = 60,
) -> list[Outcome]:
    """Run a command on `ranks` processes, as torchrun would, and wait for all of them; the outcome of each."""
    common = dict(environment or {})
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            own = Path(folder, str(rank))
            own.mkdir()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = _CONTEXT.Process(target=_enter, args=(script, list(flags), str(own), {**common, **place}))
            process.start()
            processes.append(process)
        outcomes = []
        for rank, process in enumerate(processes):
            process.join(seconds)
            killed = process.is_alive()
            if killed:
                process.kill()
                process.join()
            texts = [Path(folder, str(rank), name) for name in ("output", "errors")]
            output, errors = (text.read_text(errors="replace") if text.exists() else "" for text in texts)
            outcomes.append(Outcome(None if killed else process.exitcode, output, errors))
    return outcomes
