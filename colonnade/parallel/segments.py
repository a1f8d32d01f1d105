"""The segments of a forward pass: what lies between two collectives, plain tensors in, plain tensors out.

A segment is the unit of compilation, so that no compiled graph holds a collective. Shapes: B batch, T block, H hidden;
i feed-forward channels and v vocabulary entries of one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.model_config import ModelConfig
from colonnade.parallel.attention import allow_recompilation, attention_slice, linear


def residual_norm(x: Tensor, update: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, and its RMSNorm. All [B, T, H]."""
    x = x + update
    return x, rms_norm(x, weight, eps=eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last dimension, its statistics in float32 or wider. [B, T, H] -> [B, T, H]"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def mlp_slice(x: Tensor, gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None], down: Tensor) -> Tensor:
    """SwiGLU over one slice of the feed-forward: [B, T, H] -> partial [B, T, H]. gate, up [i, H]; down [H, i]."""
    return linear(F.silu(linear(x, *gate)) * linear(x, *up), down, None)


def logits_slice(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of one slice of the vocabulary: [B, T, H] -> [B * T, v]."""
    return linear(x.reshape(-1, x.shape[-1]), weight, None)


class Segments:
    """The segments of a forward pass, compiled or eager. All blocks share one set, so each compiles once."""

    def __init__(self, config: ModelConfig, *, compiled: bool) -> None:
        if compiled:
            # Each micro-batch size and each slice's strides are a graph of their own.
            allow_recompilation()

        def build(function: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
            bound = partial(function, **constants) if constants else function
            return torch.compile(bound, fullgraph=True, dynamic=False) if compiled else bound

        self.norm = build(rms_norm, eps=config.rms_norm_eps)
        self.residual_norm = build(residual_norm, eps=config.rms_norm_eps)
        self.attention = build(attention_slice, head_dim=config.head_dim)
        self.mlp = build(mlp_slice)
        self.logits = build(logits_slice)
