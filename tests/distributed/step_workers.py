"""Optimizer steps run on ranks, with parameters replicated or sharded over data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from colonnade.optim.optimizer import allocate_state
from colonnade.optim.step import StepOutcome, optimizer_step
from colonnade.parallel import data_parallel
from distributed.workers import build, make_optimizer, whole
from model import ModelConfig, TensorParallelModel
from run.batch import _probe_seconds


def every_token(config: ModelConfig, batch: int, block: int = 24) -> tuple[Tensor, Tensor]:
    """Ids and labels [batch, block], with no label masked out."""
    tokens = torch.randint(0, config.vocab_size, (batch, block + 1), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1], tokens[:, 1:]


def take_step(model: TensorParallelModel, optimizer: torch.optim.Optimizer, accumulation: int) -> StepOutcome:
    ids, labels = every_token(model.config, 8)
    blocks = torch.cat((ids, labels[:, -1:]), dim=1)[model.layout.dp_rank :: model.layout.dp]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return optimizer_step(
        model, optimizer, scaler, blocks, accumulation=accumulation, targets=labels.numel(), max_grad_norm=0.5
    )


def held_bytes(model: TensorParallelModel, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of this rank's parameters, and of its moments."""
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    counted = []
    for tensors in (list(model.parameters()), moments):
        assert all(isinstance(tensor, DTensor) for tensor in tensors)
        # Count storages: these include padding, and the parameters of a fused projection share one.
        storages = {memory.data_ptr(): memory.nbytes() for memory in (t.to_local().untyped_storage() for t in tensors)}
        counted.append(sum(storages.values()))
    return counted[0], counted[1]


def optimizer_steps(
    config: ModelConfig, tp: int, steps: int, accumulation: int = 2, kind: str = "adamw", **options: Any
) -> dict[str, Any]:
    """Steps on one global batch of 8, clipped at 0.5.

    In the result, `counts` has the number of all-gathers and reduce-scatters of units in the last step, and `copies`
    this rank's value of each parameter that tensor-parallel ranks replicate.
    """
    layout, model = build(config, tp, **options)
    optimizer = make_optimizer(kind, model)
    allocate_state(optimizer)
    initial = whole(model)
    counts = {"all_gather": 0, "reduce_scatter": 0}
    replaced = {name: getattr(data_parallel, name) for name in counts}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return replaced[name](*args, **kwargs)

        return call

    outcomes = [take_step(model, optimizer, accumulation) for _ in range(steps - 1)]
    for name in counts:
        setattr(data_parallel, name, counting(name))
    try:
        outcomes.append(take_step(model, optimizer, accumulation))
    finally:
        for name, function in replaced.items():
            setattr(data_parallel, name, function)
    result: dict[str, Any] = {
        "losses": [outcome.loss for outcome in outcomes],
        "norms": [float(outcome.grad_norm) for outcome in outcomes],
        "bytes": held_bytes(model, optimizer),
        "counts": tuple(counts.values()),
        "copies": {
            name: parameter.to_local().detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.placements[-1].is_replicate()
        },
        "logits": model.logits(every_token(config, 2)[0]),
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    parameters = whole(model)
    return {**result, "initial": initial, "parameters": parameters} if layout.is_main else result


def step_after_trials(config: ModelConfig, tp: int, fails_on: int | None, **options: Any) -> dict[str, Any]:
    """A step after the autotuner's trials, one of which runs out of memory on one rank during the backward pass."""
    _, model = build(config, tp, activation_checkpointing="full", **options)
    optimizer = make_optimizer("adamw", model)
    mlp, calls = model.segments.mlp, 0

    def failing(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == config.num_hidden_layers + 1:  # the recomputation in the backward pass
            raise MemoryError("no more of it")
        return mlp(*args)

    failures = 0
    for size in (1, 4, 2):
        if size == 4 and dist.get_rank() == fails_on:
            model.segments.mlp = failing
        try:
            _probe_seconds(model, size, 16, warm=True, document_mask=False)
        except MemoryError:
            failures += 1
        model.segments.mlp = mlp
    outcome = take_step(model, optimizer, 2)
    return {"failures": failures, "loss": float(outcome.loss), "norm": float(outcome.grad_norm)}
