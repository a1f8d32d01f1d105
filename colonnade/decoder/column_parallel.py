"""A column-parallel projection whose backward pass computes the weight gradient while f sums the input gradient.

In the backward pass, the input gradient has to be summed over the ranks (f), and the weight gradient does not. So the
input gradient is computed first, and the weight gradient while the all-reduce is in flight (as in Megatron-LM). This
hides the all-reduce, and also the time by which ranks are out of step.

The two gradients are separate autograd nodes, so the product is not part of a compiled graph, which would make them one
node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.parallel.collectives import run_late


def can_hide_sums(*, compiled: bool, fixed_order: bool, cuda_graphs: bool, float8: bool) -> bool:
    """Whether weight gradients can be deferred until a sum is in flight.

    The replay of a CUDA graph copies inputs that come from outside, and float8 products are fused with their scaling.
    With a fixed order of sums, every number of ranks has to compile the same graphs, even one rank, which has no
    all-reduce to hide.
    """
    return not (cuda_graphs or float8 or (compiled and fixed_order))


def column_parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, [..., C], in the dtype of x [..., H]; weight [C, H] and bias [C] may have other dtypes."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad and x.requires_grad):
        return F.linear(x, weight, bias)
    factors: list[tuple[Tensor, Tensor]] = []
    weight = _LateGradient.apply(weight, factors)
    run_late(weight)
    product: Tensor = _Product.apply(x, weight, bias, factors)
    return product


class _Product(torch.autograd.Function):
    """The product. Its backward pass hands the factors of the weight gradient to `_LateGradient`."""

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
    """The identity on a weight; its backward pass receives no gradient and computes it from the factors."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor, None]:
        gradient, x = ctx.factors.pop()
        return gradient.T @ x, None
