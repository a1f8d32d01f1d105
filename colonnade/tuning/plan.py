"""Planning a run from sizes: the fastest way to split the ranks, the memory of a step, and the assumptions made."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from colonnade.command_settings import PlanSettings
from colonnade.config import sequences_of_step
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.idle_switches import idle_switches
from colonnade.run_settings import MAX_STEPS, MAX_TOKENS_PER_STEP, RunSettings
from colonnade.tuning.cost_model import Memory, ParallelConfig, run_flops
from colonnade.tuning.memory import GIB
from colonnade.tuning.recommendation import (
    LEAST_UNCOUNTED,
    SAME_TIME,
    SAME_UNHIDDEN_TIME,
    UNCOUNTED,
    Candidate,
    Choice,
    memory_of_device,
    recommend,
)
from colonnade.tuning.step_time import (
    LATENCY_ACROSS,
    LATENCY_IN_NODE,
    WITHOUT_NVLINK,
    Machine,
    StepTime,
    interconnect_of,
)
from colonnade.tuning.traffic import Traffic

LONGEST_WARMUP, SHORTEST_WARMUP = 2000, 10
STEP_SCALE, STEP_EXPONENT = 0.2920, 0.3271


@dataclass(frozen=True)
class Plan:
    """A run, and what it costs.

    Attributes:
        tokens: trained on in total: whole steps, so up to one step more than asked for.
        micro_batch, accumulation: sequences per micro-batch and micro-batches per step, on each rank.
        memory: of a rank, at the peak of a step.
        traffic: what a rank sends in a step.
        time: of a step; None if the device's peak FLOP/s are unknown.
        candidates: one for each way to run, the recommended one first, those that do not fit last.
        memory_limit: bytes a rank's tensors may take; None if the device is not given.
        flops: of the whole run.
        seconds: of the whole run; None if the device's peak FLOP/s are unknown.
        assumptions: what the numbers are based on, one line each.
    """

    gpus: int
    gpu: str | None
    parallel: ParallelConfig
    dp: int
    block_size: int
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    tokens: int
    steps: int
    warmup_steps: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    time: StepTime | None
    candidates: tuple[Candidate, ...]
    memory_limit: int | None
    flops: int
    seconds: float | None
    assumptions: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """The planned settings to pass to `training.py`."""
        return {
            "total_steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "tokens_per_step": self.tokens_per_step,
            "block_size": self.block_size,
            "initial_batch_size": str(self.micro_batch),
            "tensor_parallel_size": self.parallel.tp,
            "activation_checkpointing": self.parallel.activation_checkpointing,
            "data_parallel_shard": self.parallel.data_parallel_shard,
            "data_parallel_replicate_size": self.parallel.replicas,
            "sequence_parallel": self.parallel.sequence_parallel,
            "overlap_collectives": self.parallel.overlap_collectives,
        }

    def to_dict(self) -> dict[str, Any]:
        own = {**asdict(self), "candidates": [candidate.to_dict() for candidate in self.candidates]}
        own["step_time"] = None if self.time is None else self.time.to_dict()
        own["recommended"] = {**self.settings(), "micro_batch": self.micro_batch, "data_parallel_size": self.dp}
        del own["time"]
        return own


def warmup_of(steps: int) -> int:
    """Warm-up steps: a hundredth of all steps, between 10 and 2000, but never more than half of them."""
    return min(LONGEST_WARMUP, max(SHORTEST_WARMUP, steps // 100), steps // 2)


def recommended_step(flops: float) -> float:
    """Tokens per step for a compute budget in FLOPs that excludes the vocabulary's (arXiv:2401.02954, section 3.1)."""
    return float(STEP_SCALE * flops**STEP_EXPONENT)


def recommended_step_of(steps: int, flops_per_token: float) -> float:
    """The tokens B per step with `recommended_step(steps x B x flops_per_token)` = B."""
    return float((STEP_SCALE * (steps * flops_per_token) ** STEP_EXPONENT) ** (1 / (1 - STEP_EXPONENT)))


def plan_run(asked: PlanSettings, settings: RunSettings, config: ModelConfig, given: Collection[str]) -> Plan:
    """Choose how to split the ranks, and the sizes of a step.

    Args:
        asked: the plan's own settings.
        settings: the run's settings, including the preset's; the numbers of steps and the batch are determined here.
        config: sizes of the model.
        given: names of the settings that were explicitly given, which are kept.

    Raises:
        UsageError: names the settings that contradict each other, or says what does not fit.
    """
    _require_known(asked)
    block = settings.block_size or config.max_position_embeddings
    if block > config.max_position_embeddings:
        raise UsageError(
            f"--block-size {block} is above the model's context of {config.max_position_embeddings}; give at most that"
        )
    per_step, steps = _step_and_steps(asked, settings, config, block)
    choice = recommend(asked, settings, config, given, per_step, block)
    best = choice.candidates[0]
    dp = best.parallel.dp
    trained = steps * per_step
    warmup_is_given = "warmup_steps" in given
    return Plan(
        gpus=asked.gpus,
        gpu=asked.gpu,
        parallel=best.parallel,
        dp=dp,
        block_size=block,
        micro_batch=best.micro_batch,
        accumulation=best.accumulation,
        tokens_per_step=per_step,
        tokens=trained,
        steps=steps,
        warmup_steps=settings.warmup_steps if warmup_is_given else warmup_of(steps),
        memory=best.memory,
        traffic=best.traffic,
        time=best.time,
        candidates=choice.candidates,
        memory_limit=choice.memory_limit,
        flops=run_flops(config, trained, block),
        seconds=None if best.time is None else steps * best.time.seconds,
        assumptions=tuple(_assumptions(asked, settings, choice, warmup_is_given=warmup_is_given)),
    )


def _require_known(asked: PlanSettings) -> None:
    for flag, value in (("--gpu-memory-gib", asked.gpu_memory_gib), ("--gpu-tflops", asked.gpu_tflops)):
        if asked.gpu is None and value is not None:
            raise UsageError(f"{flag} {value:g} is of no device: name it with --gpu, or leave it out")
    if asked.gpu is not None and memory_of_device(asked) is None:
        raise UsageError(
            f"--gpu {asked.gpu!r:.80}: its memory is not known; give --gpu-memory-gib, or a name such as H200, H100, "
            "A100 80GB, L40S or MI300X, or leave it out"
        )


def _step_and_steps(asked: PlanSettings, settings: RunSettings, config: ModelConfig, block: int) -> tuple[int, int]:
    """Tokens per step and steps: each as given, or following from the other and from the tokens."""
    per_token = run_flops(config, 1, block) - 6 * config.hidden_size * config.vocab_size
    if asked.total_steps is not None:
        best = recommended_step_of(asked.total_steps, per_token)
        return _tokens_per_step(asked, settings, best, block), asked.total_steps
    tokens = asked.tokens or round(asked.tokens_per_parameter * config.num_parameters)
    per_step = _tokens_per_step(asked, settings, recommended_step(per_token * tokens), block)
    steps = -(-tokens // per_step)
    if steps > MAX_STEPS:
        raise UsageError(f"{tokens:,} tokens are {steps:,} steps of {per_step:,}; at most {MAX_STEPS:,} can be")
    return per_step, steps


def _tokens_per_step(asked: PlanSettings, settings: RunSettings, best: float, block: int) -> int:
    """Tokens per step: as given, or the recommended `best` in whole sequences per device."""
    if settings.tokens_per_step is not None:
        return sequences_of_step(settings.tokens_per_step, block) * block
    share = block * asked.gpus
    if share > MAX_TOKENS_PER_STEP:
        raise UsageError(
            f"one sequence of {block} tokens on each of {asked.gpus} devices is more than the {MAX_TOKENS_PER_STEP:,} "
            "tokens that a step can have; lower one of them"
        )
    best = min(best, MAX_TOKENS_PER_STEP)
    # A power-of-two number of sequences per device can be split into micro-batches and over ranks in many ways.
    return share * 2 ** max(0, round(math.log2(best / share))) if best > share else share


def _assumptions(asked: PlanSettings, settings: RunSettings, choice: Choice, *, warmup_is_given: bool) -> Iterator[str]:
    best = choice.candidates[0]
    parallel = best.parallel
    if asked.total_steps is not None:
        yield f"tokens: those of {asked.total_steps:,} steps"
    elif asked.tokens is None:
        yield f"tokens: {asked.tokens_per_parameter:g} a parameter, embeddings included"
    else:
        yield f"tokens: {asked.tokens:,}, rounded up to whole steps"
    if settings.tokens_per_step is None:
        yield "tokens a step: 0.292 x FLOPs^0.3271 without the head (arXiv:2401.02954), 2^n sequences a device"
    if not warmup_is_given:
        yield f"warm-up: a hundredth of the steps, {SHORTEST_WARMUP} to {LONGEST_WARMUP}, at most half of them"
    kept = {
        "none": "all activations kept",
        "selective": "the feed-forward computed again",
        "full": "one layer at a time computed again",
    }[parallel.activation_checkpointing]
    yield f"memory: tensors of eager {parallel.precision} steps, {kept}; compiled segments may need less"
    planned = settings.replace(
        data_parallel_shard=parallel.data_parallel_shard,
        data_parallel_replicate_size=parallel.replicas,
        sequence_parallel=parallel.sequence_parallel,
        overlap_collectives=parallel.overlap_collectives,
    )
    yield from idle_switches(planned, parallel.tp, parallel.dp, best.micro_batch)
    if settings.deterministic:
        yield "deterministic: collectives and times are those of the default mode; slices that share a rank hold more"
    if settings.float8:
        yield "float8: neither the time nor the memory it saves is counted"
    memory = memory_of_device(asked)
    if memory is not None:
        size = memory / GIB
        yield (
            f"memory: {asked.gpu} has {size:.4g} GiB; {UNCOUNTED:.0%} of what a rank may use, at least "
            f"{LEAST_UNCOUNTED / GIB:g} GiB, are left free (a guess) for CUDA's context, NCCL's buffers and the "
            "allocator's fragmentation"
        )
    yield "FLOPs: 6 for each weight and token, attention in full, nothing for what is computed again"
    if choice.machine is not None:
        yield (
            f"ranking: times within {SAME_TIME:.0%} ({SAME_UNHIDDEN_TIME:.0%} without overlap) are equal; of these the "
            "lowest tp, then the most free memory (half of it is enough), then the simplest"
        )
        yield from _assumptions_of_time(asked, best, choice.machine)
    elif asked.gpu is not None:
        yield f"time: the peak of {asked.gpu} in {parallel.precision} is not known; give --gpu-tflops"
    else:
        yield "time: not told without --gpu"


def _assumptions_of_time(asked: PlanSettings, best: Candidate, machine: Machine) -> Iterator[str]:
    yield (
        f"time: {asked.utilisation:.0%} (--utilisation, a guess) of {machine.peak / 1e12:g} TFLOP/s "
        f"({best.parallel.precision}) on every device, for what is computed again too; validation and saving are left "
        "out"
    )
    if asked.interconnect is None and interconnect_of(asked.gpu or "") is None:
        yield f"communication: the link of {asked.gpu} is not known, {WITHOUT_NVLINK} is assumed; give --interconnect"
    inside = machine.interconnect
    links = [f"{inside.name} {inside.bandwidth / 1e9:g} GB/s in nodes of {asked.gpus_per_node}"]
    if asked.gpus > asked.gpus_per_node:
        links.append(f"{machine.network.name} {machine.network.bandwidth / 1e9:g} GB/s a device between them")
    yield (
        f"communication: rings at {asked.link_utilisation:.0%} (--link-utilisation) of {' and '.join(links)}, "
        f"{LATENCY_IN_NODE * 1e6:g} and {LATENCY_ACROSS * 1e6:g} us a call (a guess)"
    )
    assert best.time is not None
    longer = best.time.unhidden / best.time.seconds - 1
    yield (
        "overlap: communication is hidden up to the computation that it overlaps with; if none were, the step would "
        f"take {best.time.unhidden:.3g} s, {longer:.1%} longer"
    )
