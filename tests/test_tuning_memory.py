"""Memory trials: the CPU's prediction, limits, out-of-memory errors, and real measurements in a fresh process."""

from __future__ import annotations

import math
import multiprocessing
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from colonnade.tuning.autotuner import agree_alone, find_micro_batch, plan_search, tune_micro_batch
from colonnade.tuning.memory import (
    GIB,
    SAFETY_MARGIN,
    AcceleratorMemory,
    AcceleratorTrials,
    HostTrials,
    PeakRss,
    Probe,
    accelerator_memory_limit,
    host_memory_limit,
    is_out_of_memory,
    trial_runner,
)

MIB = 2**20


class SimulatedHost:
    """Memory of exactly fixed + slope x size (MiB), with an optional higher slope beyond a size."""

    def __init__(self, fixed: float, slope: float, bend: int = 10**9, slope_beyond: float = 0.0) -> None:
        self.ran: list[int] = []
        self._parameters = fixed, slope, bend, slope_beyond

    def peak_during(self, probe: Probe, size: int) -> tuple[float, int]:
        self.ran.append(size)
        fixed, slope, bend, slope_beyond = self._parameters
        peak = fixed + slope * min(size, bend) + slope_beyond * max(0, size - bend)
        return probe(size), int(peak * MIB)


def seconds_of(size: int) -> float:
    return size / (size + 10)  # larger sizes are always more efficient, so that only memory bounds the search


def test_the_cpu_runs_only_what_is_predicted_to_fit() -> None:
    host = SimulatedHost(fixed=300, slope=50)
    trials = HostTrials(seconds_of, host, limit_bytes=1000 * MIB)  # (1000 - 300) / 50 = 14
    result = find_micro_batch(range(1, 100), trials)
    assert result.size == 14
    assert [trial.size for trial in result.trials] == [1, 2, 4, 8, 16, 12, 14, 15]
    assert host.ran == [1, 2, 4, 8, 12, 14]


def test_the_cpu_measures_sizes_one_and_two_before_it_judges_a_number() -> None:
    host = SimulatedHost(fixed=300, slope=50)
    trials = HostTrials(seconds_of, host, limit_bytes=1000 * MIB)
    plan = plan_search(28, gradient_accumulation_steps=1)
    assert find_micro_batch(plan.candidates, trials, from_above=True).size == 14
    assert host.ran == [1, 2, 4, 7, 14]  # 28 was asked for first, and refused unrun


def test_a_measured_size_is_not_measured_again() -> None:
    host = SimulatedHost(fixed=300, slope=50)
    trials = HostTrials(seconds_of, host, limit_bytes=1000 * MIB)
    assert trials(4) == trials(4)
    assert trials(2) == (True, seconds_of(2))
    assert host.ran == [1, 2, 4]


def test_every_trial_corrects_the_prediction() -> None:
    # Sizes up to 4 show 10 MiB a sample, larger ones 100: what 1, 2 and 4 predict for 16 would fit, what 8 shows not.
    host = SimulatedHost(fixed=100, slope=10, bend=4, slope_beyond=100)
    trials = HostTrials(seconds_of, host, limit_bytes=1000 * MIB)
    for size in (1, 2, 4):
        trials(size)
    assert trials.predicted_bytes(16) == pytest.approx(260 * MIB)
    trials(8)
    assert trials(16) == (False, math.inf)
    assert host.ran == [1, 2, 4, 8]
    assert find_micro_batch(range(1, 100), trials).size == 12  # 100 + 4 x 10 + 8 x 100 = 940; 13 would take 1040


def test_a_slope_hidden_by_the_small_sizes_is_followed() -> None:
    # Nothing grows up to size 8, 50 MiB a sample after it: size 32 takes 2200 MiB, a fit through all sizes says 1795.
    host = SimulatedHost(fixed=1000, slope=0, bend=8, slope_beyond=50)
    trials = HostTrials(seconds_of, host, limit_bytes=2000 * MIB)
    for size in (1, 2, 4, 8, 16):
        assert trials(size) == (True, seconds_of(size))
    assert trials(32) == (False, math.inf)
    assert host.ran == [1, 2, 4, 8, 16]


def test_a_measured_peak_above_the_limit_does_not_fit() -> None:
    host = SimulatedHost(fixed=100, slope=10, bend=4, slope_beyond=300)
    trials = HostTrials(seconds_of, host, limit_bytes=1000 * MIB)
    assert trials(8) == (False, math.inf)  # predicted 180 MiB, measured 1340
    assert host.ran == [1, 2, 8]
    assert HostTrials(seconds_of, host, limit_bytes=50 * MIB)(4) == (False, math.inf)
    assert host.ran == [1, 2, 8, 1]  # size 1 is above the limit: nothing else runs


def test_an_error_on_the_cpu_is_not_caught() -> None:
    def probe(size: int) -> float:
        raise MemoryError("simulated")

    with pytest.raises(MemoryError):
        HostTrials(probe, PeakRss(), limit_bytes=GIB)(1)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Real memory is measured in a process of its own: one that ran other tests frees their memory meanwhile."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=120)


def hold(size_bytes: int) -> None:
    """Keep this much memory in use for a while, as activations do."""
    block = torch.ones(size_bytes, dtype=torch.uint8)
    for _ in range(10):
        block.add_(1)


def measure_peak() -> tuple[float, int, int]:
    def probe(size: int) -> float:
        hold(size * MIB)
        return float(size)

    probe(1)  # first use of the kernels
    before = psutil.Process().memory_info().rss
    seconds, peak = PeakRss().peak_during(probe, 512)
    return seconds, peak - before, psutil.Process().memory_info().rss - before


def test_peak_rss_sees_what_is_freed_before_the_end() -> None:
    seconds, peak, left = in_fresh_process(measure_peak)
    assert seconds == 512
    assert peak == pytest.approx(512 * MIB, rel=0.1)
    assert left < 256 * MIB


def tune_in_real_memory(directory: Path) -> tuple[int, list[int]]:
    def probe(size: int) -> float:
        hold(size * 128 * MIB)
        return seconds_of(size)

    probe(1)  # first use of the kernels
    used = psutil.Process().memory_info().rss
    trials = trial_runner(torch.device("cpu"), probe, memory_limit_gib=(used + 5.5 * 128 * MIB) / GIB)
    tuned = tune_micro_batch(
        plan_search(None, gradient_accumulation_steps=1),
        trials,
        agree_alone,
        directory=directory,
        depends_on={},
        is_writer=True,
    )
    return tuned.micro_batch_size, [trial.size for trial in tuned.trials]


def test_tuning_in_real_memory(tmp_path: Path) -> None:
    """128 MiB a sample under a limit of 5.5 samples above what the process uses."""
    size, tried = in_fresh_process(tune_in_real_memory, tmp_path)
    assert size == 5
    assert tried == [1, 2, 4, 8, 6, 5]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator_memory_limit(100 * GIB, None) == int(100 * GIB * (1 - SAFETY_MARGIN))
    assert accelerator_memory_limit(100 * GIB, 40.0) == 40 * GIB
    assert accelerator_memory_limit(100 * GIB, 400.0) == int(100 * GIB * (1 - SAFETY_MARGIN))

    assert host_memory_limit(1.5) == 3 * GIB // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    used, available = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    assert host_memory_limit(None) == pytest.approx(used + available * (1 - SAFETY_MARGIN) / 4, rel=0.05)


def test_out_of_memory_errors_are_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)  # a petabyte, from the real allocator
    assert is_out_of_memory(refused.value)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL error ... Last error:\nFailed to CUDA calloc async 6291456 bytes"),
        RuntimeError("NCCL error ... Cuda failure 2 'out of memory'"),
    ):
        assert is_out_of_memory(error), error
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ):
        assert not is_out_of_memory(other), other


class SimulatedAccelerator:
    def __init__(self, peak: int) -> None:
        self.peak = peak
        self.starts = 0

    def start_trial(self) -> None:
        self.starts += 1

    def peak_bytes(self) -> int:
        return self.peak


def test_an_accelerator_peak_above_the_limit_does_not_fit() -> None:
    assert AcceleratorTrials(seconds_of, SimulatedAccelerator(peak=10), limit_bytes=10)(3) == (True, seconds_of(3))
    assert AcceleratorTrials(seconds_of, SimulatedAccelerator(peak=11), limit_bytes=10)(3) == (False, math.inf)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_graphs_of_a_size_are_forgotten_before_the_next(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to what was compiled, so that is made anew."""
    module = SimpleNamespace(
        mem_get_info=lambda device: (0, 0), empty_cache=lambda: None, reset_peak_memory_stats=lambda device: None
    )
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "get_device_module", lambda device: module)
            AcceleratorMemory(torch.device("cuda"), cuda_graphs=cuda_graphs).start_trial()
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    assert len(compiled) == (2 if cuda_graphs else 1)


def test_a_failed_probe_keeps_no_tensor_alive() -> None:
    activations: list[weakref.ref[torch.Tensor]] = []
    kept: list[BaseException] = []  # somebody keeps the error, as a debugger or a log record may

    def layer() -> None:
        activation = torch.ones(1000)
        activations.append(weakref.ref(activation))
        error = torch.OutOfMemoryError("CUDA out of memory")
        kept.append(error)
        raise error

    def probe(size: int) -> float:
        residual = torch.ones(1000)
        activations.append(weakref.ref(residual))
        try:
            layer()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("CUDA out of memory, while handling the first") from error
        return 0.0

    memory = SimulatedAccelerator(peak=0)
    assert AcceleratorTrials(probe, memory, limit_bytes=10)(3) == (False, math.inf)
    assert len(activations) == 2
    assert [reference() for reference in activations] == [None, None]
    assert memory.starts == 2, "the cached blocks were not handed back after the failure"


def test_other_errors_of_a_probe_pass_through() -> None:
    def probe(size: int) -> float:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        AcceleratorTrials(probe, SimulatedAccelerator(peak=0), limit_bytes=10)(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_tuning_on_a_real_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    sample = torch.cuda.get_device_properties(device).total_memory // 10

    def probe(size: int) -> float:
        torch.ones(size, sample, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        return seconds_of(size)

    trials = trial_runner(device, probe)
    result = find_micro_batch(range(1, 100), trials)
    free = torch.cuda.mem_get_info(device)[0]
    assert result.size == (free - sample * 10 * SAFETY_MARGIN) // sample
    assert not next(trial for trial in result.trials if trial.size == 16).fits
    assert torch.cuda.memory_reserved(device) < sample, "a failed trial left memory behind"
