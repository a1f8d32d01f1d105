"""Saving while training continues: a copy of the tensors, and a thread that writes it.

A step waits only for the copy. The thread runs the same save as `save.py`, with the same single commit. It has its own
process group, because its collectives must not mix with those of the training steps that run at the same time.
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
from colonnade.runtime.vote import one_line, vote

# Tensors of at least this size are copied into pinned memory. For smaller ones, such as step counts, pinning costs more
# than it saves.
_PINNED_BYTES = 1 << 16


class CheckpointSaver:
    """Writes the checkpoints of one run, one at a time. Construction is collective (it creates a process group).

    Args:
        directory: the run folder.
        asynchronous: if False, `save` returns only when the checkpoint is durable.
        hashes: as for `save_checkpoint`.
        timeout: seconds that a rank waits for the others in a save; 0 means forever.

    Attributes:
        longest_save: seconds that the longest save so far took in its thread, including `after_commit`.
    """

    def __init__(self, directory: Path, *, asynchronous: bool, hashes: bool, timeout: float = STARTUP_SECONDS) -> None:
        self._directory, self._asynchronous, self._hashes = directory, asynchronous, hashes
        self._group = dist.new_group(backend="gloo", timeout=time_limit(timeout))
        self.longest_save = 0.0
        # A new thread starts on GPU 0, whatever its process uses: it would allocate memory there, and DCP would
        # synchronise copies with that GPU.
        on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else ()
        self._thread = ThreadPoolExecutor(1, "checkpoint-save", *on_device)
        self._started: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        # DCP synchronizes the thread's stream again and again while it writes. On the default stream it would wait for
        # the steps in progress; nothing runs on this one, since what it writes is in host memory.
        self._stream = torch.cuda.Stream() if asynchronous and torch.cuda.is_initialized() else None

    def reserve(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Allocate the host memory for the copies now instead of in the first save. No collective. No-op if saves are
        synchronous.

        Raises:
            RunError: there is not enough host memory.
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
        """Whether this rank knows of a save that failed since the last `wait`. Does not block."""
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
        """Save the current values of the tensors; returns when they may be modified. Collective.

        Waits first for a save that is still in progress.

        Args:
            after_commit: called in the saving thread of the first rank with the checkpoint's folder, once it exists.

        Raises:
            RunError: on all ranks, if the previous save failed on any, or this one if saves are synchronous.
        """
        self.wait()
        content: Content | RunError
        ready: torch.cuda.Event | None = None
        try:
            content = checkpoint_content(step, model, optimizer, manifest)
            if self._asynchronous:
                staged, ready = self._staged(content.tensors)
                content = replace(content, tensors=staged)
        except RunError as error:  # the other ranks enter this save too, so it is raised there, on all of them
            content = error
        except (RuntimeError, MemoryError) as error:  # errors of the device or the allocation
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
        with torch.cuda.stream(self._stream):  # None changes nothing
            path = write_checkpoint(self._directory, step, content, group=self._group, hashes=self._hashes)
        if after_commit is not None and dist.get_rank(self._group) == 0:
            after_commit(path)
        self.longest_save = max(self.longest_save, time.monotonic() - began)

    @torch.no_grad()
    def _staged(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copies in host buffers that are reused from save to save, and the event to wait for before reading them.

        On CUDA the copies are only enqueued. Kernels enqueued later on the same stream run after the originals have
        been read, so they may modify them.
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
            # Not `from_local`, which would move the copy to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        ready = None
        if on_device:
            ready = torch.cuda.Event()
            ready.record()
        return staged, ready

    def wait(self) -> None:
        """Wait until no save is in progress. Collective if there was a save since the last call, else a no-op.

        Raises:
            RunError: on all ranks, if the save failed on any.
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
            # If this rank's save failed, its own message already names the failing rank and is the same on all ranks.
            raise (error or told) from told

    def settle(self, seconds: float) -> None:
        """Wait at most `seconds` for a save in progress to succeed or fail. No collective.

        For a rank that is about to exit with an error: with its thread alive, its peers can still finish the save.
        """
        if self._started is not None:
            wait_for([self._started], seconds)

    def close(self) -> None:
        """End the thread. Call `wait` first."""
        self._thread.shutdown()
