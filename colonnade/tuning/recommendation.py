"""Finding the fastest way to run that fits in memory: every allowed candidate, with its memory and predicted time.

A candidate is a way to run that `search_space` allows, and a micro-batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from colonnade.command_settings import PlanSettings
from colonnade.decoder.column_parallel import can_hide_sums
from colonnade.decoder.float8 import require_bf16_beside_float8
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.shard_limits import Ranks
from colonnade.run_settings import CHECKPOINTING, DATA_PARALLEL_SHARDS, RunSettings
from colonnade.tuning.communication import step_traffic
from colonnade.tuning.cost_model import Memory, ParallelConfig, step_memory
from colonnade.tuning.flops import device_memory, has_float8_of_rows, peak_flops
from colonnade.tuning.memory import GIB
from colonnade.tuning.search_space import (
    micro_batches,
    parallel_configs,
    refusal_to_share,
    tensor_sizes,
    that_share_out,
)
from colonnade.tuning.step_time import (
    LATENCY_ACROSS,
    LATENCY_IN_NODE,
    WITHOUT_NVLINK,
    Machine,
    StepTime,
    interconnect_of,
    link_of,
    step_time,
)
from colonnade.tuning.traffic import Traffic

SAME_TIME = 0.02
"""Predicted times that differ by less than this fraction count as equal: the prediction is less exact than that."""

SAME_UNHIDDEN_TIME = 0.10
"""The same without overlap: what a candidate hides may at most cost this much more if it is not hidden. A guess."""

UNCOUNTED, LEAST_UNCOUNTED = 0.10, 3 * GIB
"""Memory of a GPU left free for what `step_memory` leaves out, as a fraction and at least so many bytes: the CUDA
context and libraries (about 1 GiB), NCCL's buffers (some 10 MiB a communicator and channel, up to 2 GiB), and the
allocator's fragmentation, which grows with the memory in use. A guess."""


@dataclass(frozen=True)
class Candidate:
    """One way to run and its cost; `time` is None if the device's peak FLOP/s are unknown."""

    parallel: ParallelConfig
    micro_batch: int
    accumulation: int
    memory: Memory
    fits: bool
    traffic: tuple[Traffic, ...]
    time: StepTime | None

    @property
    def seconds(self) -> float:
        """Of a step; 0 if unknown."""
        return 0.0 if self.time is None else self.time.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "parallel": asdict(self.parallel),
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "memory": asdict(self.memory),
            "fits": self.fits,
            "step_time": None if self.time is None else self.time.to_dict(),
        }

    @property
    def splits(self) -> tuple[int, ...]:
        """Sort key, the largest products first: more tensor-parallel ranks, and halves of micro-batches, cut them."""
        return self.parallel.tp, self.parallel.overlap_collectives

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Sort key, the simplest first: fewer tensor-parallel ranks, less sharding, less recomputation, and so on."""
        parallel = self.parallel
        return (
            parallel.tp,
            DATA_PARALLEL_SHARDS.index(parallel.data_parallel_shard),
            CHECKPOINTING.index(parallel.activation_checkpointing),
            parallel.overlap_collectives,
            parallel.replicas,
            parallel.sequence_parallel,
            -self.micro_batch,
        )


@dataclass(frozen=True)
class Choice:
    """The result of `recommend`.

    Attributes:
        candidates: one for each way to run, with its best micro-batch; the recommended one first.
        memory_limit: bytes a rank's tensors may take; None if the device is not given.
        machine: the devices and links; None if the device's peak FLOP/s are unknown.
    """

    candidates: tuple[Candidate, ...]
    memory_limit: int | None
    machine: Machine | None


def memory_of_device(asked: PlanSettings) -> int | None:
    """Memory of the planned device in bytes: --gpu-memory-gib, or the known size of --gpu; None without either."""
    if asked.gpu_memory_gib is not None:
        return int(asked.gpu_memory_gib * GIB)
    return None if asked.gpu is None else device_memory(asked.gpu)


def memory_for_tensors(memory: int, memory_limit_gib: float | None) -> int:
    """Bytes that a rank's tensors may take on a GPU, of its memory or of --memory-limit-gib where that is lower."""
    whole = memory if memory_limit_gib is None else min(memory, int(memory_limit_gib * GIB))
    return max(0, whole - max(int(whole * UNCOUNTED), LEAST_UNCOUNTED))


def _has_bf16(gpu: str | None) -> bool:
    """Whether a device has bf16 products; False without a device, True for an unknown one, as it is probably newer."""
    return gpu is not None and (device_memory(gpu) is None or peak_flops(gpu, "bf16") is not None)


def recommend(
    asked: PlanSettings,
    settings: RunSettings,
    config: ModelConfig,
    given: Collection[str],
    per_step: int,
    block: int,
) -> Choice:
    """Compare all allowed candidates and rank them; without a device, only tp is varied and the simplest comes first.

    Args:
        asked: the plan's own settings.
        settings: the run's settings.
        config: sizes of the model.
        given: names of the settings that were explicitly given, which are not varied.
        per_step: tokens per step over all ranks.
        block: tokens per sequence.

    Raises:
        UsageError: nothing fits, or the ranks cannot be split as requested.
    """
    memory = memory_of_device(asked)
    limit = None if memory is None else memory_for_tensors(memory, settings.memory_limit_gib)
    start = _start(asked, settings)
    machine = _machine(asked, start.precision)
    chunks = per_step // block
    sizes = tensor_sizes(asked, settings, config, block)
    shared = that_share_out(chunks, sizes, asked, settings, block)
    device = torch.device("cpu" if asked.gpu is None else "cuda")
    best, refused = [], None
    for tp in shared:
        dp = asked.gpus // tp
        refusal = refusal_to_share(settings, config, Ranks(dp, tp, device))
        if refusal is not None:
            refused = refused or refusal  # keep the first: it has the lowest tp, so the most ranks to shard over
            continue
        sizes_of_rank = micro_batches(asked, settings, chunks // dp, limit)
        for parallel in parallel_configs(replace(start, tp=tp, dp=dp), asked, settings, config, given):
            best.append(_with_most_sequences(config, parallel, sizes_of_rank, chunks // dp, block, limit, machine))
    if refused is not None and not best:
        raise refused
    best = best_first(best, limit)
    if not best[0].fits:
        _refuse(min(best, key=lambda one: one.memory.total), asked, limit)
    return Choice(tuple(best), limit, machine)


def _with_most_sequences(
    config: ModelConfig,
    parallel: ParallelConfig,
    sizes: Sequence[int],
    chunks: int,
    block: int,
    limit: int | None,
    machine: Machine | None,
) -> Candidate:
    """The candidate with the largest micro-batch that fits, else the smallest one.

    A larger micro-batch is predicted to be at least as fast: it computes the same, sends no more, in no more calls, and
    gradients and parameters hide behind a longer micro-batch. So the time of the others need not be predicted.

    Args:
        sizes: micro-batches, descending.
        chunks: sequences of a step on each rank.
    """
    if parallel.overlap_collectives and sizes[0] > 1:
        sizes = [size for size in sizes if size > 1]  # one sequence has no halves
    for size in sizes:
        memory = step_memory(config, parallel, size, block, chunks // size)
        if limit is None or memory.total <= limit:
            break
    return _candidate(config, parallel, memory, size, chunks // size, block, limit, machine)


def best_first(candidates: Collection[Candidate], limit: int | None) -> list[Candidate]:
    """The recommended candidate, then the others that fit by time, then those that do not fit.

    Candidates within `SAME_TIME` of the fastest count as equal if they are also within `SAME_UNHIDDEN_TIME` of the
    fastest of them without overlap. Of equals, those with the fewest tensor-parallel ranks and with whole micro-batches
    are preferred, since smaller products are less efficient, which the prediction leaves out; of these the one with the
    most free memory is recommended. Free memory beyond half of `limit` does not count: there the simplest is taken. If
    no time is known, the simplest that fits is recommended.
    """
    timed = [(one.time, one) for one in candidates if one.fits and one.time is not None]
    rest = sorted(candidates, key=lambda one: (not one.fits, one.seconds, one.simplicity, one.memory.total))
    if not timed:
        return rest
    fastest = min(time.seconds for time, _ in timed)
    equals = [(time, one) for time, one in timed if time.seconds <= fastest * (1 + SAME_TIME)]
    least = min(time.unhidden for time, _ in equals)
    chosen = [one for time, one in equals if time.unhidden <= least * (1 + SAME_UNHIDDEN_TIME)]
    enough = 0 if limit is None else limit // 2
    best = min(chosen, key=lambda one: (one.splits, max(one.memory.total, enough), one.simplicity))
    return [best, *(one for one in rest if one is not best)]


def _refuse(closest: Candidate, asked: PlanSettings, limit: int | None) -> None:
    parallel = closest.parallel
    assert limit is not None
    advice = "" if parallel.activation_checkpointing == "full" else ", or --activation-checkpointing full"
    state = closest.memory.parameters + closest.memory.gradients + closest.memory.optimizer
    if state > limit:
        raise UsageError(
            f"parameters, gradients and moments alone take {state / GIB:.1f} GiB of a rank at tp {parallel.tp}, and "
            f"may use {limit / GIB:.1f} of {asked.gpu}; give more --gpus, or a smaller model"
        )
    raise UsageError(
        f"a rank would need {closest.memory.total / GIB:.1f} GiB at tp {parallel.tp}, and may use {limit / GIB:.1f} "
        f"of {asked.gpu}; give more --gpus, a smaller --block-size or --micro-batch-size{advice}"
    )


def _candidate(
    config: ModelConfig,
    parallel: ParallelConfig,
    memory: Memory,
    micro_batch: int,
    accumulation: int,
    block: int,
    limit: int | None,
    machine: Machine | None,
) -> Candidate:
    traffic = step_traffic(config, parallel, micro_batch, block, accumulation)
    time = None
    if machine is not None:
        tokens = parallel.dp * accumulation * micro_batch * block
        time = step_time(config, parallel, machine, traffic, tokens=tokens, block=block, accumulation=accumulation)
    fits = limit is None or memory.total <= limit
    return Candidate(parallel, micro_batch, accumulation, memory, fits, tuple(traffic), time)


def _start(asked: PlanSettings, settings: RunSettings) -> ParallelConfig:
    precision = settings.precision
    if precision == "auto":  # as `training.py` decides, once it sees the device
        precision = "bf16" if _has_bf16(asked.gpu) else "fp32"
    if precision == "bf16" and asked.gpu is not None and not _has_bf16(asked.gpu):
        raise UsageError(f"--precision bf16: {asked.gpu} only emulates its products; give fp16 or fp32")
    if settings.float8 and asked.gpu is not None:
        if not has_float8_of_rows(asked.gpu):
            raise UsageError(
                f"--float8 needs an NVIDIA GPU from Hopper on, and --gpu {asked.gpu} is none: leave it out"
            )
        require_bf16_beside_float8(precision)
    can_hide = can_hide_sums(
        compiled=settings.compiles_on("cpu" if asked.gpu is None else "cuda"),
        fixed_order=settings.deterministic or settings.tensor_slices is not None,
        cuda_graphs=settings.cuda_graphs,
        float8=settings.float8,
    )
    return ParallelConfig(
        precision=precision,
        optimizer=settings.optimizer,
        activation_checkpointing=settings.checkpointing,
        sequence_parallel=settings.sequence_parallel,
        overlap_collectives=settings.overlap_collectives,
        overlap_weight_gradients=can_hide and not settings.plain_step,
        overlaps_gradients=not (settings.plain_step or settings.deterministic),
        data_parallel_shard=settings.data_parallel_shard,
        replicas=settings.data_parallel_replicate_size,
        replicate_embeddings=settings.replicate_embeddings,
        deterministic=settings.deterministic,
        on_cpu=asked.gpu is None,
    )


def _machine(asked: PlanSettings, precision: str) -> Machine | None:
    network = link_of("--network", asked.network, LATENCY_ACROSS)
    interconnect = asked.interconnect or interconnect_of(asked.gpu or "") or WITHOUT_NVLINK
    inside = link_of("--interconnect", interconnect, LATENCY_IN_NODE)
    if asked.gpus > asked.gpus_per_node and asked.gpus % asked.gpus_per_node:
        raise UsageError(
            f"--gpus {asked.gpus} are no whole nodes of {asked.gpus_per_node}; give a multiple of it, or "
            "--gpus-per-node"
        )
    peak = None if asked.gpu is None else peak_flops(asked.gpu, precision)
    if asked.gpu_tflops is not None:
        peak = asked.gpu_tflops * 1e12
    if peak is None:
        return None
    lower = peak_flops(asked.gpu, "bf16") if precision == "fp32" and asked.gpu is not None else None
    return Machine(peak, asked.utilisation, asked.link_utilisation, asked.gpus_per_node, inside, network, lower)
