"""Our own training step for `benchmarks/step.py`, and the comparison of its deterministic mode with the default one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.training_step.peers import Contender, held_tensors
from benchmarks.training_step.work import BETAS, LEARNING_RATE, MAX_GRAD_NORM, PRECISIONS, WEIGHT_DECAY, Work
from colonnade.optim.optimizer import create_adamw
from colonnade.optim.step import optimizer_step
from colonnade.parallel.determinism import fix_arithmetic
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from model import ModelConfig, TensorParallelModel


def ours(work: Work, layout: ParallelLayout, *, alone: bool = False, **options: Any) -> Contender:
    """The step of a run with default settings, but eager and without recomputation unless `options` say otherwise."""
    model = TensorParallelModel(work.config, layout, compute_dtype=work.dtype, **options)
    return our_contender(model, our_optimizer(model), work, alone=alone)


def our_optimizer(model: TensorParallelModel) -> torch.optim.Optimizer:
    return create_adamw(model, learning_rate=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)


def our_contender(
    model: TensorParallelModel, optimizer: torch.optim.Optimizer, work: Work, *, alone: bool = False
) -> Contender:
    """Make a contender from a model and its optimizer."""
    device = model.layout.device
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    share = work.share(device)

    def step() -> torch.Tensor:
        return optimizer_step(
            model,
            optimizer,
            scaler,
            share,
            accumulation=1,
            targets=work.tokens,
            max_grad_norm=MAX_GRAD_NORM,
        ).loss

    def held() -> list[torch.Tensor]:
        buffers = [] if model.group.memory is None else model.group.memory.own_buffers
        return [*held_tensors(model, optimizer), *buffers]

    return Contender(step, held, alone)


# ------------------------------------------------------------------------------------- deterministic over default

SLICES = 4
# Large enough that matrix products dominate, small enough for two cores: about 0.3 s per step in float32.
MODE_SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 48,
    "max_position_embeddings": 256,
}
MODE_MICRO_BATCH = 4


def compare_modes(precision: str, rounds: int) -> float:
    """Speed of the deterministic mode over the default one on these ranks. Collective."""
    steps = {name: _stepper(precision, deterministic=name == "deterministic") for name in ("default", "deterministic")}
    for step in steps.values():
        step()  # allocates the gradients, the optimizer's state and the allocator's pools
    ratios = []
    for number in range(rounds):
        order = list(steps) if number % 2 else list(steps)[::-1]
        seconds = {name: steps[name]() for name in order}
        ratios.append(seconds["default"] / seconds["deterministic"])
    return statistics.median(ratios)


def _stepper(precision: str, *, deterministic: bool) -> Callable[[], float]:
    """A function that takes one optimizer step on all ranks and returns its seconds."""
    layout = init_parallel(None, torch.device("cpu"))
    config = ModelConfig(**MODE_SIZES)
    model = TensorParallelModel(
        config, layout, slices=SLICES if deterministic else None, compute_dtype=PRECISIONS[precision]
    )
    optimizer = our_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    share = Work(config, MODE_MICRO_BATCH, config.max_position_embeddings, PRECISIONS[precision]).share(layout.device)

    def step() -> float:
        torch.use_deterministic_algorithms(False)
        if deterministic:
            fix_arithmetic(compiled=False)
        dist.barrier()
        begin = time.perf_counter()
        optimizer_step(
            model,
            optimizer,
            scaler,
            share,
            accumulation=1,
            targets=share[:, 1:].numel(),
            max_grad_norm=MAX_GRAD_NORM,
            deterministic=deterministic,
        )
        dist.barrier()
        return time.perf_counter() - begin

    return step
