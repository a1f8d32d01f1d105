"""What a block computes besides matrix products: RMSNorm and SwiGLU, with few passes over memory and little kept.

Written out by autograd, each of them keeps several tensors of its input's size for the backward pass, and reads and
writes one for every step of the formula. Compiled, they are fused anyway; uncompiled these functions keep the input
alone, and compute the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) over the last dimension, its statistics in float32 or wider. [..., C] -> [..., C]"""
    if torch.compiler.is_compiling():
        return _normed(x, weight, eps)[0]
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factor).to(x.dtype) * weight.to(x.dtype), factor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, factor = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        unit = x * factor  # float32 or wider, as the factor is
        of_weight = (gradient * unit.to(x.dtype)).flatten(0, -2).sum(0, dtype=factor.dtype).to(weight.dtype)
        scaled = (gradient * weight.to(x.dtype)).to(factor.dtype)
        along = (scaled * unit).mean(-1, keepdim=True)
        return torch.addcmul(scaled, unit, along, value=-1).mul_(factor).to(x.dtype), of_weight, None


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv:2002.05202) of the two halves of the last dimension. [..., 2 I] -> [..., I]"""
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
