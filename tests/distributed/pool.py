"""Gloo ranks on the CPU, started once and used by many tests.

A test passes a module-level function to `RankPool.run`, which calls it on each of the first `world_size` ranks inside a
fresh process group and returns the results as a list in rank order. Ranks are forked from a process that has imported
torch, and stay alive, so that running a task costs milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from forked_commands import CONTEXT


def _serve(rank: int, connection: Connection) -> None:
    """A rank's loop: receive (function, world size, rendezvous file, arguments), send (ok, result or traceback)."""
    import torch
    import torch.distributed as dist

    gc.freeze()  # a garbage collection would touch, and thereby copy, every page shared with the parent process
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        function, world_size, rendezvous, args, kwargs = task
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
            answer = (True, function(*args, **kwargs))
            dist.barrier()
        except BaseException:  # noqa: BLE001 - any error belongs to the test, not to this process
            answer = (False, traceback.format_exc())
        finally:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        connection.send(answer)


class RankPool:
    """Ranks that wait for tasks. If a rank does not answer for `timeout` seconds, the whole pool is killed."""

    def __init__(self, timeout: float = 180.0) -> None:
        self.timeout = timeout
        self._ranks: list[tuple[Any, Connection]] = []

    def _grow(self, world_size: int) -> None:
        while len(self._ranks) < world_size:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(len(self._ranks), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Results of `function(*args, **kwargs)` on ranks 0 .. world_size - 1.

        Raises:
            AssertionError: a rank raised (its traceback is the message) or did not answer in time.
        """
        self._grow(world_size)
        with tempfile.TemporaryDirectory() as folder:
            for _, connection in self._ranks[:world_size]:
                connection.send((function, world_size, os.path.join(folder, "rendezvous"), args, kwargs))
            answers = []
            for rank, (_, connection) in enumerate(self._ranks[:world_size]):
                if not connection.poll(self.timeout):
                    self.close()
                    raise AssertionError(f"rank {rank} of {world_size} gave no answer within {self.timeout} s")
                answers.append(connection.recv())
        failures = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()
