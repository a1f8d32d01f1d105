"""Does a micro-batch of this size fit? One rank's answer, without any collective.

Two ways to find out:

- On an accelerator (CUDA, ROCm) the size is tried: an out-of-memory error, or a peak above the limit, means no.
- On the CPU, a process that uses too much memory is killed, or the machine swaps; there is no error to catch. Sizes 1
  and 2 are measured, memory is fitted as fixed + slope x size, and a larger size runs only if it is predicted to fit.
  Every size that runs is added to the fit.

``trial_runner`` picks the one for a device. The caller provides the probe (it runs one step at a given size and returns
the seconds it took), which must not contain any collective.
"""

from __future__ import annotations

import gc
import os
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

GIB = 1024**3

# Fraction of memory that the limit leaves free: collectives allocate their buffers only when they first run,
# fragmentation grows over a long run, and a step may need a little more than the probed one (evaluation, saving).
SAFETY_MARGIN = 0.05

# A forward and backward pass that is large enough to run short of memory takes tens of milliseconds or more; reading
# the memory in use takes about 20 us.
SAMPLE_INTERVAL_SECONDS = 0.002

CALIBRATION_SIZES = (1, 2)

_OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA/HIP runtime errors, NCCL's "Cuda failure 2 'out of memory'"
    "can't allocate memory",  # torch's CPU allocator
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "failed to cuda malloc",  # NCCL
    "failed to cuda calloc",
    "failed to cuda host alloc",
)

Probe = Callable[[int], float]


class TrialRunner(Protocol):
    """Runs one trial on this rank and returns ``(fits, seconds)``; seconds are infinite if the size does not fit."""

    @property
    def limit_bytes(self) -> int:
        """Bytes that one rank may use."""

    @property
    def flat_doublings(self) -> int | None:
        """Stop growing after this many doublings without more throughput; None: grow to the memory limit."""

    def __call__(self, size: int) -> tuple[bool, float]: ...


def trial_runner(
    device: torch.device, probe: Probe, memory_limit_gib: float | None = None, *, cuda_graphs: bool = False
) -> TrialRunner:
    """The trial runner for a device.

    Call it once model and optimizer state are in memory on all ranks of the machine: on the CPU, the memory that is
    free at this moment is divided among them.

    Args:
        device: where the model is.
        probe: runs a forward and a backward pass, and whatever else a step keeps in memory, at the given micro-batch
            size; returns the seconds it took, excluding first-use costs (compilation, kernel selection).
        memory_limit_gib: ``--memory-limit-gib``, for one rank; None: what the device has, less ``SAFETY_MARGIN``.
        cuda_graphs: whether the probe records CUDA graphs.
    """
    if device.type == "cpu":
        return HostTrials(probe, PeakRss(), host_memory_limit(memory_limit_gib))
    memory = AcceleratorMemory(device, cuda_graphs=cuda_graphs)
    return AcceleratorTrials(probe, memory, accelerator_memory_limit(memory.total_bytes, memory_limit_gib))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that device or host memory ran out, in torch, cuBLAS, cuDNN or NCCL."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(known in text for known in _OUT_OF_MEMORY_TEXTS)


# ---------------------------------------------------------------------------------------------------------------------
# Accelerators


class DeviceMemory(Protocol):
    """What ``AcceleratorTrials`` needs from a device."""

    def start_trial(self) -> None:
        """Release the allocator's cached blocks and reset the peak."""

    def peak_bytes(self) -> int:
        """The most memory the device had in use since ``start_trial``."""


class AcceleratorMemory:
    """Memory of one CUDA or ROCm device, as its caching allocator and its driver report it.

    Args:
        cuda_graphs: discard recorded graphs between trials. Their memory lives as long as they do, so one size's
            graphs would count towards the next size's peak.
    """

    def __init__(self, device: torch.device, *, cuda_graphs: bool = False) -> None:
        import torch

        self._device, self._has_graphs = device, cuda_graphs
        self._module = torch.get_device_module(device)
        self.total_bytes: int = self._module.mem_get_info(device)[1]

    def start_trial(self) -> None:
        if self._has_graphs:
            import torch

            torch.compiler.reset()  # also drops compiled code, which is reloaded from the cache on disk
        gc.collect()
        self._module.empty_cache()
        self._module.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Peak reserved by the allocator, plus what is in use outside it: context, collectives, other processes."""
        free, total = self._module.mem_get_info(self._device)
        beside = total - free - self._module.memory_reserved(self._device)
        return int(self._module.max_memory_reserved(self._device) + max(0, beside))


def accelerator_memory_limit(total_bytes: int, memory_limit_gib: float | None) -> int:
    """Bytes a rank may use on its device: total x (1 - ``SAFETY_MARGIN``), or the given limit where that is lower."""
    limit = int(total_bytes * (1 - SAFETY_MARGIN))
    return limit if memory_limit_gib is None else min(limit, int(memory_limit_gib * GIB))


class AcceleratorTrials:
    """Trials on an accelerator: a size fits if the probe does not run out of memory and peaks within the limit."""

    flat_doublings: int | None = None

    def __init__(self, probe: Probe, memory: DeviceMemory, limit_bytes: int) -> None:
        self._probe = probe
        self._memory = memory
        self.limit_bytes = limit_bytes

    def __call__(self, size: int) -> tuple[bool, float]:
        self._memory.start_trial()
        seconds = self._run(size)
        # Read the peak before cleaning up, which releases the blocks and resets it.
        fits = seconds is not None and self._memory.peak_bytes() <= self.limit_bytes
        self._memory.start_trial()
        return (True, seconds) if fits and seconds is not None else (False, float("inf"))

    def _run(self, size: int) -> float | None:
        """Seconds, or None if memory ran out; in that case no stack frame of the failed probe keeps a tensor alive."""
        try:
            return self._probe(size)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            link: BaseException | None = error
            while link is not None:
                traceback.clear_frames(link.__traceback__)
                link = link.__context__
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The CPU


class HostMemory(Protocol):
    """What ``HostTrials`` needs from the host."""

    def peak_during(self, probe: Probe, size: int) -> tuple[float, int]:
        """Run ``probe(size)``; return its seconds, and this process's peak memory during the call in bytes."""


class PeakRss:
    """Peak resident memory of this process during a call, sampled by a thread through psutil.

    Not ``resource.getrusage().ru_maxrss``: that is the peak over the process's whole lifetime and never falls, so a
    trial below the peak of loading the model or reading a checkpoint would not show; on Linux it also survives
    ``exec``, and its unit is KiB on Linux but bytes on macOS.
    """

    def peak_during(self, probe: Probe, size: int) -> tuple[float, int]:
        import psutil

        process = psutil.Process()
        gc.collect()  # reference cycles left by the previous trial would count towards this one
        peak = process.memory_info().rss
        done = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(SAMPLE_INTERVAL_SECONDS):
                peak = max(peak, process.memory_info().rss)

        sampler = threading.Thread(target=sample, name="peak-rss", daemon=True)
        sampler.start()
        try:
            seconds = probe(size)
        finally:
            done.set()
            sampler.join()
        return seconds, max(peak, process.memory_info().rss)


def host_memory_limit(memory_limit_gib: float | None) -> int:
    """Resident bytes this rank may use: the given limit, or what it uses now plus its share of the free memory.

    The share is psutil's available memory, less ``SAFETY_MARGIN``, divided by the ranks of this machine
    (``LOCAL_WORLD_SIZE``, 1 without torchrun). psutil reports the machine's memory: under a tighter limit set by a
    container or a batch system, give ``--memory-limit-gib``.
    """
    if memory_limit_gib is not None:
        return int(memory_limit_gib * GIB)
    import psutil

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = psutil.virtual_memory().available * (1 - SAFETY_MARGIN) / ranks
    return int(psutil.Process().memory_info().rss + share)


class HostTrials:
    """Trials on the CPU: sizes 1 and 2 are measured; a larger one runs only if the fit predicts that it fits."""

    # CPU throughput saturates at small sizes; a search up to the memory limit would take minutes and gain nothing.
    flat_doublings: int | None = 2

    def __init__(self, probe: Probe, memory: HostMemory, limit_bytes: int) -> None:
        self._probe = probe
        self._memory = memory
        self.limit_bytes = limit_bytes
        self._measured: dict[int, tuple[float, int]] = {}  # size -> seconds, peak bytes

    def __call__(self, size: int) -> tuple[bool, float]:
        # Calibrating lazily, inside a trial, keeps the sequence of voted trials the same on every kind of device.
        for smaller in (*(calibration for calibration in CALIBRATION_SIZES if calibration < size), size):
            if smaller not in self._measured:
                if self.predicted_bytes(smaller) > self.limit_bytes:
                    return False, float("inf")
                self._measured[smaller] = self._memory.peak_during(self._probe, smaller)
            seconds, peak = self._measured[smaller]
            if peak > self.limit_bytes:
                return False, float("inf")
        return True, seconds

    def predicted_bytes(self, size: int) -> int:
        """The predicted peak at ``size`` as fixed + slope x size; 0 before two sizes are measured.

        The highest of: the least-squares line through all measured sizes; the line through the largest two, since the
        first trial's one-time costs can hide the slope at small sizes; and the peaks measured at sizes up to this one.
        """
        if len(self._measured) < len(CALIBRATION_SIZES):
            return 0
        import numpy as np

        sizes = np.array(sorted(self._measured), dtype=np.float64)
        peaks = np.array([self._measured[int(measured)][1] for measured in sizes], dtype=np.float64)
        lines = (np.polyfit(sizes, peaks, deg=1), np.polyfit(sizes[-2:], peaks[-2:], deg=1))
        predictions = [float(np.polyval(line, size)) for line in lines]
        return round(max(*predictions, float(peaks[sizes <= size].max(initial=0.0))))
