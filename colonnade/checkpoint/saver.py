"""Saving while training goes on: a copy of the tensors, and a thread that writes it.

The copy is all that a step waits for. The thread runs the very save of `save.py`, with the same single commit, over a
process group of its own: its collectives must not meet those of the steps that go on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from colonnade.checkpoint.manifest import JSON
from colonnade.checkpoint.save import Content, checkpoint_content, write_checkpoint
from colonnade.checkpoint.state import model_tensors, optimizer_tensors
from colonnade.errors import RunError
from colonnade.parallel.mesh import STARTUP_SECONDS, time_limit
from colonnade.parallel.vote import one_line, vote

# Locked pages are worth their cost for what takes time to copy; a step count does not.
_PINNED_BYTES = 1 << 16


class CheckpointSaver:
    """Writes the checkpoints of one run, one at a time. Every rank makes one at the same place: a collective.

    Args:
        directory: the run folder.
        asynchronous: False makes `save` return when the checkpoint is durable.
        hashes: as for `save_checkpoint`.
        timeout: seconds that a rank waits for the others in a save; 0 for ever.

    Attributes:
        longest_save: seconds of the longest save so far, from its beginning until it was durable and pruned.
    """

    def __init__(self, directory: Path, *, asynchronous: bool, hashes: bool, timeout: float = STARTUP_SECONDS) -> None:
        self._directory, self._asynchronous, self._hashes = directory, asynchronous, hashes
        self._group = dist.new_group(backend="gloo", timeout=time_limit(timeout))
        self.longest_save = 0.0
        # A thread begins on the first GPU, whatever its process uses: it would take memory there, and DCP would wait
        # for copies on that one.
        on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else ()
        self._thread = ThreadPoolExecutor(1, "checkpoint-save", *on_device)
        self._started: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take the host memory for the copies now, rather than in the first save. No collective.

        Raises:
            RunError: there is not enough of it.
        """
        if not self._asynchronous:
            return
        try:
            self._staged({**model_tensors(model), **optimizer_tensors(model, optimizer)})
        except (RuntimeError, MemoryError) as error:
            raise RunError(
                f"no host memory for the copy that --checkpoint-mode async writes ({one_line(error)}); sync needs none"
            ) from error

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows of a save that failed since the last `wait`. Waits for nothing."""
        started = self._started
        return started is not None and started.done() and started.exception() is not None

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        manifest: Mapping[str, JSON],
        after_commit: Callable[[Path], None] | None = None,
    ) -> None:
        """Save the tensors as they are now; returns when they may change. Collective.

        A save that is still under way is waited for first.

        Args:
            after_commit: called on the first rank with the checkpoint's folder once that exists, in the saving thread.

        Raises:
            RunError: on all ranks, when the save before failed on any, or this one where saves are synchronous.
        """
        self.wait()
        content: Content | RunError
        ready: torch.cuda.Event | None = None
        try:
            content = checkpoint_content(step, model, optimizer, manifest)
            if self._asynchronous:
                staged, ready = self._staged(content.tensors)
                content = replace(content, tensors=staged)
        except RunError as error:  # the other ranks are on their way into this save: it is told there
            content = error
        except (RuntimeError, MemoryError) as error:  # of the device
            content = RunError(one_line(error))

        def given() -> Content:
            if isinstance(content, RunError):
                raise content
            if ready is not None:
                try:
                    ready.synchronize()
                except RuntimeError as error:
                    raise RunError(one_line(error)) from error
            return content

        self._started = self._thread.submit(self._write, step, given, after_commit)
        if not self._asynchronous:
            self.wait()

    def _write(self, step: int, content: Callable[[], Content], after_commit: Callable[[Path], None] | None) -> None:
        began = time.monotonic()
        path = write_checkpoint(self._directory, step, content, group=self._group, hashes=self._hashes)
        if after_commit is not None and dist.get_rank(self._group) == 0:
            after_commit(path)
        self.longest_save = max(self.longest_save, time.monotonic() - began)

    @torch.no_grad()
    def _staged(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copies in host memory that is used again from save to save, and what to wait for before reading them.

        On CUDA the copies are only queued: whatever the stream computes later finds the originals read.
        """
        staged: dict[str, Tensor] = {}
        on_device = False
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                is_pinned = local.is_cuda and local.nbytes >= _PINNED_BYTES
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=is_pinned)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            on_device |= local.is_cuda
            # Not from_local, which would move the copy to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        ready = None
        if on_device:
            ready = torch.cuda.Event()
            ready.record()
        return staged, ready

    def wait(self) -> None:
        """Wait until no save is under way. Collective, where there was one since the last call.

        Raises:
            RunError: on all ranks, when it failed on any.
        """
        started, self._started = self._started, None
        if started is None:
            return
        error = started.exception()
        if error is not None and not isinstance(error, RunError):
            failed = RunError(f"what follows a save failed: {one_line(error)}")
            failed.__cause__ = error
            error = failed
        try:
            with vote(self._group):
                if error is not None:
                    raise error
        except RunError as told:
            # A save that failed is known to all ranks in the same words; these name the rank already.
            raise (error or told) from told

    def settle(self, seconds: float) -> None:
        """Let a save under way come to its end, however it ends, for so long at most. No collective.

        For a rank that is about to leave with an error: its peers' threads may still finish the save with it.
        """
        if self._started is not None:
            wait_for([self._started], seconds)

    def close(self) -> None:
        """End the thread, after `wait`."""
        self._thread.shutdown()
