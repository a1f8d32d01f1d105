"""A run planned from sizes: how the ranks are split, what a step holds, how long it takes, and what that rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from colonnade.command_settings import PlanSettings
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.parallel.sharding import check_slices, slice_counts
from colonnade.run_settings import MAX_STEPS, MAX_TOKENS_PER_STEP, RunSettings
from colonnade.tuning.batch_record import micro_batch_candidates
from colonnade.tuning.cost_model import Memory, Placement, run_flops, step_memory
from colonnade.tuning.flops import device_memory, peak_flops
from colonnade.tuning.memory import GIB, SAFETY_MARGIN, accelerator_memory_limit

LONGEST_WARMUP, SHORTEST_WARMUP = 2000, 10


@dataclass(frozen=True)
class Plan:
    """A run, and what it costs.

    Attributes:
        tokens: that are trained on: whole steps, so up to a step more than were asked for.
        micro_batch, accumulation: of each rank.
        memory: of a rank, at the worst moment of a step.
        memory_limit: bytes a rank may use; None where the device is not known.
        flops: of the whole run.
        seconds: None where the device's peak is not known.
        assumptions: what the numbers rest on, a line each.
    """

    gpus: int
    gpu: str | None
    placement: Placement
    dp: int
    block_size: int
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    tokens: int
    steps: int
    warmup_steps: int
    memory: Memory
    memory_limit: int | None
    flops: int
    seconds: float | None
    assumptions: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """What `training.py` has to be told."""
        return {
            "total_steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "tokens_per_step": self.tokens_per_step,
            "block_size": self.block_size,
            "initial_batch_size": str(self.micro_batch),
            "tensor_parallel_size": self.placement.tp,
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def warmup_of(steps: int) -> int:
    """A hundredth of the steps, between 10 and 2000, and never more than half of them."""
    return min(LONGEST_WARMUP, max(SHORTEST_WARMUP, steps // 100), steps // 2)


def recommended_step(flops: float) -> float:
    """Tokens a step for a compute budget in FLOPs, those of the vocabulary left out (arXiv:2401.02954, section 3.1)."""
    return float(0.2920 * flops**0.3271)


def plan_run(asked: PlanSettings, settings: RunSettings, config: ModelConfig, *, warmup_is_given: bool) -> Plan:
    """Split the ranks and settle the sizes of a step.

    Args:
        settings: of the run, the preset's included; what they say of steps and batch is settled here.
        warmup_is_given: whether `settings.warmup_steps` was asked for.

    Raises:
        UsageError: names what does not go together, or does not fit.
    """
    _require_known(asked)
    block = settings.block_size or config.max_position_embeddings
    if block > config.max_position_embeddings:
        raise UsageError(
            f"--block-size {block} is above the model's context of {config.max_position_embeddings}; give at most that"
        )
    tokens = asked.tokens or round(asked.tokens_per_parameter * config.num_parameters)
    per_step = _tokens_per_step(asked, settings, config, tokens, block)
    steps = -(-tokens // per_step)
    if steps > MAX_STEPS:
        raise UsageError(f"{tokens:,} tokens are {steps:,} steps of {per_step:,}; at most {MAX_STEPS:,} can be")
    placement, micro_batch, memory, limit = _split(asked, settings, config, per_step, block)
    dp = asked.gpus // placement.tp
    trained = steps * per_step
    flops = run_flops(config, trained, block)
    peak = None if asked.gpu is None else peak_flops(asked.gpu, placement.precision)
    return Plan(
        gpus=asked.gpus,
        gpu=asked.gpu,
        placement=placement,
        dp=dp,
        block_size=block,
        micro_batch=micro_batch,
        accumulation=per_step // block // dp // micro_batch,
        tokens_per_step=per_step,
        tokens=trained,
        steps=steps,
        warmup_steps=settings.warmup_steps if warmup_is_given else warmup_of(steps),
        memory=memory,
        memory_limit=limit,
        flops=flops,
        seconds=None if peak is None else flops / (peak * asked.utilisation * asked.gpus),
        assumptions=tuple(_assumptions(asked, settings, placement, peak, warmup_is_given=warmup_is_given)),
    )


def _require_known(asked: PlanSettings) -> None:
    if asked.gpu is not None and device_memory(asked.gpu) is None:
        raise UsageError(
            f"--gpu {asked.gpu!r:.80}: its memory is not known; give a name such as H200, H100, A100 80GB, L40S or "
            "MI300X, or leave it out"
        )


def _tokens_per_step(asked: PlanSettings, settings: RunSettings, config: ModelConfig, tokens: int, block: int) -> int:
    """As given, or recommended for the compute of so many tokens, in whole sequences for each device."""
    if settings.tokens_per_step is not None:
        if settings.tokens_per_step % block:
            raise UsageError(f"--tokens-per-step {settings.tokens_per_step} is no multiple of --block-size {block}")
        return settings.tokens_per_step
    share = block * asked.gpus
    if share > MAX_TOKENS_PER_STEP:
        raise UsageError(
            f"one sequence of {block} tokens on each of {asked.gpus} devices is more than the {MAX_TOKENS_PER_STEP:,} "
            "tokens that a step can have; lower one of them"
        )
    head = 6 * config.hidden_size * config.vocab_size * tokens
    best = min(recommended_step(run_flops(config, tokens, block) - head), MAX_TOKENS_PER_STEP)
    # A power of two sequences for each device: it can be shared out in many ways.
    return share * 2 ** max(0, round(math.log2(best / share))) if best > share else share


def _split(
    asked: PlanSettings, settings: RunSettings, config: ModelConfig, per_step: int, block: int
) -> tuple[Placement, int, Memory, int | None]:
    """The smallest tensor-parallel size whose ranks hold a micro-batch, and the largest such micro-batch."""
    limit = None
    if asked.gpu is not None:
        limit = accelerator_memory_limit(device_memory(asked.gpu) or 0, settings.memory_limit_gib)
    closest: tuple[Placement, Memory] | None = None
    sizes = _tensor_sizes(asked, settings, config)
    shared = [tp for tp in sizes if per_step // block % (asked.gpus // tp) == 0]
    if not shared:
        raise UsageError(
            f"--tokens-per-step {per_step} are {per_step // block} sequences, which {asked.gpus} devices cannot share "
            f"out at tp {', '.join(map(str, sizes))}; give a multiple of {block * asked.gpus}"
        )
    for tp in shared:
        placement = _placement(asked, settings, tp)
        for size in _micro_batches(asked, settings, per_step // block // (asked.gpus // tp), limit):
            memory = step_memory(config, placement, size, block)
            if limit is None or memory.total <= limit:
                return placement, size, memory, limit
            closest = placement, memory
    assert closest is not None
    assert limit is not None
    placement, memory = closest
    raise UsageError(
        f"a rank would need {memory.total / GIB:.1f} GiB at tp {placement.tp}, and may use {limit / GIB:.1f} of "
        f"{asked.gpu}; give more --gpus, a smaller --block-size or --micro-batch-size"
        + ("" if placement.gradient_checkpointing else ", or leave out --disable-gradient-checkpointing")
    )


def _tensor_sizes(asked: PlanSettings, settings: RunSettings, config: ModelConfig) -> list[int]:
    tp = settings.tensor_parallel_size
    if tp is None:
        return [size for size in slice_counts(config, range(1, asked.gpus + 1)) if asked.gpus % size == 0]
    if asked.gpus % tp:
        raise UsageError(f"--tensor-parallel-size {tp} does not divide --gpus {asked.gpus}")
    check_slices(config, tp, None)
    return [tp]


def _placement(asked: PlanSettings, settings: RunSettings, tp: int) -> Placement:
    precision = settings.precision
    if precision == "auto":  # as `training.py` decides, once it sees the device
        precision = "bf16" if asked.gpu is not None and peak_flops(asked.gpu, "bf16") else "fp32"
    return Placement(
        tp=tp,
        precision=precision,
        optimizer=settings.optimizer,
        gradient_checkpointing=settings.checkpointing == "full",
        replicate_embeddings=settings.replicate_embeddings,
        repeats_heads=asked.gpu is None,
    )


def _micro_batches(asked: PlanSettings, settings: RunSettings, chunks: int, limit: int | None) -> list[int]:
    """Sizes to try, the best first: of those that divide a rank's sequences of a step."""
    sizes = micro_batch_candidates(chunks)
    given = asked.micro_batch_size
    if given is not None:
        if given not in sizes:
            near = ", ".join(map(str, sorted(sizes, key=lambda size: abs(size - given))[:3]))
            raise UsageError(
                f"--micro-batch-size {given} does not divide the {chunks} sequences of a step on each "
                f"rank; near it do: {near}"
            )
        return [given]
    if limit is not None:
        return sizes[::-1]
    wanted = 1 if settings.initial_batch_size == "auto" else int(settings.initial_batch_size)
    return [max(size for size in sizes if size <= wanted)]


def _assumptions(
    asked: PlanSettings, settings: RunSettings, placement: Placement, peak: float | None, *, warmup_is_given: bool
) -> Iterator[str]:
    if asked.tokens is None:
        yield f"tokens: {asked.tokens_per_parameter:g} a parameter, embeddings included"
    if settings.tokens_per_step is None:
        yield "tokens a step: 0.292 x FLOPs^0.3271 without the head (arXiv:2401.02954), 2^n sequences a device"
    if not warmup_is_given:
        yield f"warm-up: a hundredth of the steps, {SHORTEST_WARMUP} to {LONGEST_WARMUP}, at most half of them"
    kept = "one layer at a time computed again" if placement.gradient_checkpointing else "all activations kept"
    yield f"memory: tensors of eager {placement.precision} steps, {kept}; without caches of allocator and libraries"
    if asked.gpu is not None:
        size = (device_memory(asked.gpu) or 0) / 2**30
        yield (
            f"memory: {asked.gpu} has {size:g} GiB, of which {SAFETY_MARGIN:.0%} are left free; compiled segments may "
            "need less"
        )
    yield "FLOPs: 6 for each weight and token, attention in full, nothing for what is computed again"
    if peak is not None:
        yield (
            f"time: {asked.utilisation:.0%} of {peak / 1e12:g} TFLOP/s ({placement.precision}) on every device is a "
            "guess (--utilisation); validation and saving are left out"
        )
    elif asked.gpu is not None:
        yield f"time: the peak of {asked.gpu} in {placement.precision} is not known"
    else:
        yield "time: not told without --gpu"
