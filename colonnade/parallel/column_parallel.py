"""The product of a column-parallel projection, and what its backward pass computes while f sums over the ranks.

Backward, the gradient of the input has to be summed over the ranks (f), and the gradient of the weight has not. So the
first comes first; while its sum is under way the second is computed (as Megatron-LM does). It hides the sum, and the
time by which ranks are not quite in step.

Both are autograd nodes of their own, so the product is no part of a compiled graph, in which the two would be one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.parallel.collectives import run_late


def can_hide_sums(*, compiled: bool, fixed_order: bool, cuda_graphs: bool, float8: bool) -> bool:
    """Whether gradients of weights may wait for a sum to be under way.

    A CUDA graph's replay copies what it is given from outside, and products in float8 are fused with their scales. In a
    fixed order every rank count has to compile the same graphs, also one rank, which sums nothing.
    """
    return not (cuda_graphs or float8 or (compiled and fixed_order))


def column_parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in the dtype of x [..., H], weight [C, H] and bias [C] being stored in any: [..., C]."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad and x.requires_grad):
        return F.linear(x, weight, bias)
    factors: list[tuple[Tensor, Tensor]] = []
    weight = _LateGradient.apply(weight, factors)
    run_late(weight)
    product: Tensor = _Product.apply(x, weight, bias, factors)
    return product


class _Product(torch.autograd.Function):
    """The product. Backward it leaves the factors of the weight's gradient to `_LateGradient`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        ctx.factors.append((rows, x.flatten(0, -2)))
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return (rows @ weight).view(x.shape), None, of_bias, None


class _LateGradient(torch.autograd.Function):
    """The identity of a weight, whose backward pass is given no gradient and makes it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor, None]:
        gradient, x = ctx.factors.pop()
        return gradient.T @ x, None
