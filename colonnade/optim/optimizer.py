"""AdamW and Muon over `DTensor` parameters, and steps that can be skipped on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from colonnade.optim.muon import FOUND_INF, Muon
from colonnade.optim.parameter_groups import NamedParameters, parameter_groups
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings

EPSILON = 1e-8  # of AdamW

# Elements in the widest vector register that the fused CPU kernel uses (16-bit numbers in 512 bits).
VECTOR_ELEMENTS = 32


class LaidOutModel(NamedParameters, Protocol):
    """A model that knows how its parameters are laid out over ranks (`TensorParallelModel` does)."""

    layout: ParallelLayout


def fused_keeps_bits(parameters: Iterable[nn.Parameter], piece_counts: Iterable[int]) -> bool:
    """Whether fused AdamW gives each element the same bits however the parameters are cut into whole pieces.

    On the CPU, its vectorised body and the scalar code for the remaining elements round differently (torch 2.13: the
    second moment of a third of such elements differs in its last bit), so every shard has to end at a vector boundary.
    The CUDA kernels compute all elements alike.
    """
    return all(
        parameter.device.type == "cuda" or count == 1 or parameter.numel() // count % VECTOR_ELEMENTS == 0
        for parameter, count in zip(parameters, piece_counts, strict=True)
    )


def create_optimizer(model: LaidOutModel, settings: RunSettings, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that the settings select, over all parameters of a model of `DTensor`s."""
    common: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.weight_decay,
        "fused": fused,
    }
    if settings.optimizer == "muon":
        return create_muon(model, momentum=settings.muon_momentum, **common)
    return create_adamw(model, **common)


def create_adamw(
    model: NamedParameters, *, learning_rate: float, betas: tuple[float, float], weight_decay: float, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused by default. Weight decay applies to matrices, not to norms and biases."""
    sorted_ = parameter_groups(model)
    # The first parameter must be sharded over the tensor-parallel ranks, as q_proj is: torch's gradient scaler shares
    # an overflow with the ranks over which its first gradient is sharded, and with no others.
    groups = [
        {"params": sorted_.hidden + sorted_.vocabulary, "weight_decay": weight_decay},
        {"params": sorted_.vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=EPSILON, fused=fused)


def create_muon(
    model: LaidOutModel,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    momentum: float = 0.95,
    fused: bool = True,
    dtype: torch.dtype | None = None,
) -> Muon:
    """Muon for the hidden matrices; AdamW, as `create_adamw` makes it, for embedding, head, norms and biases.

    Args:
        dtype: dtype of Muon's iterations; None for bfloat16 on accelerators and float32 on the CPU. Many CPUs have no
            bfloat16 products: [512, 512] took 2.9 s, and 0.06 s in float32 (torch 2.13, one core of an EPYC).
    """
    if dtype is None:
        dtype = torch.float32 if model.layout.device.type == "cpu" else torch.bfloat16
    sorted_ = parameter_groups(model)
    adamw = torch.optim.AdamW(
        [
            {"params": sorted_.vocabulary, "weight_decay": weight_decay},
            {"params": sorted_.vectors, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=betas,
        eps=EPSILON,
        fused=fused,
    )
    return Muon(
        sorted_.hidden,
        adamw,
        lr=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        layout=model.layout,
        dtype=dtype,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Take a step, unless `skipped` is 1: then parameters, moments and step counts stay unchanged, to the bit.

    The fused update reads `skipped` on the device, without a host sync. For unfused updates, on the CPU, this function
    checks it.

    Args:
        skipped: float32 scalar on the parameters' device, 0 or 1.
    """
    if optimizer.defaults["fused"]:
        setattr(optimizer, FOUND_INF, skipped)
        optimizer.step()
        delattr(optimizer, FOUND_INF)
    elif not skipped:
        optimizer.step()


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate an optimizer's state as it is before the first step, without taking a step.

    A fused AdamW step with `found_inf` set (which a gradient scaler sets for an infinite gradient) creates the state
    and then changes neither parameters nor moments nor step counts. Other updates have no such step; their state is
    created here as they would create it.
    """
    if isinstance(optimizer, Muon):
        optimizer.allocate_momentum()
        allocate_state(optimizer.adamw)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not optimizer.defaults["fused"]:
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    setattr(optimizer, FOUND_INF, torch.ones((), device=parameters[0].device))
    optimizer.step()
    delattr(optimizer, FOUND_INF)
    optimizer.zero_grad(set_to_none=True)
