"""What a block computes besides matrix products: RMSNorm and SwiGLU, with few passes over memory and few saved tensors.

Composed of plain autograd operations, each would save several tensors of its input's size for the backward pass, and
read and write one for every step of the formula. Compiled, they are fused anyway; uncompiled, these functions save no
tensor of that size but the input, and recompute the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Number of elements normed at a time on the CPU, so that intermediate results stay in a core's cache.
IN_CACHE = 1 << 16


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) over the last dimension, its statistics in float32 or wider. [..., C] -> [..., C]"""
    if torch.compiler.is_compiling():
        return _normed(x, weight, eps)[0]
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x [..., C], and the factor [..., 1] that multiplies each row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    factor = torch.rsqrt(mean_square + eps)
    return (wide * factor).to(x.dtype).mul_(weight.to(x.dtype)), factor


def _gradients_of_norm(x: Tensor, weight: Tensor, factor: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., C] and of the weight [C], both in the factor's dtype."""
    wide, weight, gradient = x.to(factor.dtype), weight.to(factor.dtype), gradient.to(factor.dtype)
    # The layer norm kernel computes it in one pass. Given a mean of zero for x, its result differs in one term only:
    # it subtracts the mean of gradient * weight, which is added back here.
    of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, wide, [x.shape[-1]], torch.zeros_like(factor), factor, weight, None, [True, False, False]
    )
    of_x.add_((gradient @ weight).unsqueeze(-1).mul_(factor).div_(x.shape[-1]))
    # On the CPU, that kernel would sum the weight's gradient row by row in each thread: less precise, and with other
    # bits on ranks with other thread counts.
    return of_x, (gradient * wide).mul_(factor).flatten(0, -2).sum(0)


def _rows_at_a_time(x: Tensor) -> int | None:
    """Number of rows of x [..., C] that are normed at a time; None for all of them."""
    return max(1, IN_CACHE // x.shape[-1]) if x.is_cpu and x.is_contiguous() else None


def _split(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All tensors [..., C], `rows` rows at a time."""
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(rows) for tensor in tensors), strict=True)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # In float32 there is no wider copy that would have to stay in the cache.
        rows = _rows_at_a_time(x) if x.dtype.itemsize < 4 else None
        if rows is None:
            normed, factor = _normed(x, weight, eps)
        else:
            normed, factor = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            for part, *own in _split(rows, x, normed, factor):
                for whole, made in zip(own, _normed(part, weight, eps), strict=True):
                    whole.copy_(made)
        ctx.save_for_backward(x, weight, factor)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        rows = _rows_at_a_time(x)
        if rows is None:
            of_x, of_weight = _gradients_of_norm(x, weight, factor, gradient)
        else:
            of_x, of_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=factor.dtype)
            for whole, *part in _split(rows, of_x, x, factor, gradient):
                made, of_part = _gradients_of_norm(part[0], weight, *part[1:])
                whole.copy_(made)
                of_weight.add_(of_part)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv:2002.05202), the two halves of the last dimension. [..., 2 I] -> [..., I]"""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    product: Tensor = _SwiGLU.apply(gate_up)
    return product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        of_gate, of_up = both.chunk(2, dim=-1)
        torch.mul(F.silu(gate), gradient, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return both
