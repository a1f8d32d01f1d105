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

from colonnade.model_config import ModelConfig
from colonnade.parallel.attention import allow_recompilation, attention_slice, cached_attention_slice, linear
from colonnade.parallel.elementwise import rms_norm, swiglu
from colonnade.parallel.float8 import Linear
from colonnade.parallel.head_loss import softmax_of_slice_


def residual_norm(x: Tensor, update: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, and its RMSNorm. All [B, T, H]."""
    x = x + update
    return x, rms_norm(x, weight, eps=eps)


def mlp_slice(x: Tensor, gate_up: Tensor, bias: Tensor | None, down: Tensor, *, linear: Linear = linear) -> Tensor:
    """SwiGLU over one slice of the feed-forward: [B, T, H] -> partial [B, T, H]. gate_up [2 i, H]; down [H, i]."""
    return linear(swiglu(linear(x, gate_up, bias)), down, None)


def logits_slice(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of one slice of the vocabulary: [B, T, H] -> [B * T, v]."""
    return linear(x.reshape(-1, x.shape[-1]), weight, None)


class Segments:
    """The segments of a forward pass, compiled or eager. All blocks share one set, so each compiles once.

    Args:
        cuda_graphs: replay the compiled segments as CUDA graphs.
        product: of the projections; None for one in the activations' dtype.
    """

    def __init__(
        self, config: ModelConfig, *, compiled: bool, cuda_graphs: bool = False, product: Linear | None = None
    ) -> None:
        if compiled:
            # Each micro-batch size and each slice's strides are a graph of their own.
            allow_recompilation()

        def build(function: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
            bound = partial(function, **constants) if constants else function
            if not compiled:
                return bound
            options: dict[str, Any] | None = {"triton.cudagraphs": True} if cuda_graphs else None
            return torch.compile(bound, fullgraph=True, dynamic=False, options=options)

        self.norm = build(rms_norm, eps=config.rms_norm_eps)
        self.residual_norm = build(residual_norm, eps=config.rms_norm_eps)
        heads: dict[str, Any] = {
            "head_dim": config.head_dim,
            "eps": config.rms_norm_eps,
            "interleaved": config.rope_interleaved,
            "linear": product or linear,
        }
        self.attention = build(attention_slice, **heads)
        # Not compiled: the keys grow with every token.
        self.cached_attention: Callable[..., Tensor] = partial(cached_attention_slice, **heads)
        self.mlp = build(mlp_slice, linear=product or linear)
        # Not compiled: in checks and generation only.
        self.logits: Callable[..., Tensor] = logits_slice
        self.softmax = build(softmax_of_slice_)
