"""The segments of a forward pass: the computation between two collectives, plain tensors in, plain tensors out.

A segment is the unit of compilation, so no compiled graph contains a collective; with `overlap_weight_gradients` the
unit is the part of a segment after its first projection. Shapes: B batch, T block, H hidden; i feed-forward channels
and v vocabulary entries of one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from colonnade.decoder.attention import (
    DocumentMask,
    SliceWeights,
    allow_recompilation,
    attend_projected,
    cached_attention_slice,
    linear,
)
from colonnade.decoder.column_parallel import column_parallel_linear
from colonnade.decoder.elementwise import rms_norm, swiglu
from colonnade.decoder.float8 import Linear
from colonnade.model_config import ModelConfig
from colonnade.parallel.head_loss import softmax_of_slice_


def residual_norm(x: Tensor, update: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, and the RMSNorm of that sum. All [B, T, H]."""
    x = x + update
    return x, rms_norm(x, weight, eps=eps)


def attention_slice(
    project: Linear,
    rest: Callable[..., Tensor],
    x: Tensor,
    weights: SliceWeights,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: DocumentMask | None = None,
) -> Tensor:
    """Attention over the heads of one slice: [B, T, H] -> partial [B, T, H]. `rest` is a bound `attend_projected`."""
    return rest(project(x, weights.qkv, weights.bias), weights.o, weights.norms, cos, sin, mask)


def mlp_slice(
    project: Linear, rest: Callable[..., Tensor], x: Tensor, gate_up: Tensor, bias: Tensor | None, down: Tensor
) -> Tensor:
    """One slice of the feed-forward: [B, T, H] -> partial [B, T, H]. gate_up [2 i, H]; down [H, i].

    `rest` is a bound `feed_projected`.
    """
    return rest(project(x, gate_up, bias), down)


def feed_projected(projected: Tensor, down: Tensor, *, linear: Linear = linear) -> Tensor:
    """The feed-forward (SwiGLU) after its first projection: [B, T, 2 i] -> partial [B, T, H]."""
    return linear(swiglu(projected), down, None)


def logits_slice(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of one slice of the vocabulary: [B, T, H] -> [B * T, v]."""
    return linear(x.reshape(-1, x.shape[-1]), weight, None)


class Segments:
    """The segments of a forward pass, compiled or eager. All blocks share one instance, so each segment compiles once.

    Args:
        cuda_graphs: replay the compiled segments as CUDA graphs.
        grouped: attention's kernel accepts fewer key heads than query heads (`takes_groups`).
        product: the function that computes a projection; None for a product in the activations' dtype.
        overlap_weight_gradients: in the backward pass, compute weight gradients while the all-reduce of the input
            gradient (f) is in flight. The projections after f are then outside compiled segments and run in the
            activations' dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compiled: bool,
        cuda_graphs: bool = False,
        grouped: bool = False,
        product: Linear | None = None,
        overlap_weight_gradients: bool = False,
    ) -> None:
        if compiled:
            # Each micro-batch size, and each slice with other strides, compiles a separate graph.
            allow_recompilation()

        product = product or linear

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
            "linear": product,
            "grouped": grouped,
        }
        attend, feed = partial(attend_projected, **heads), partial(feed_projected, linear=product)
        if overlap_weight_gradients:
            self.attention: Callable[..., Tensor] = partial(attention_slice, column_parallel_linear, build(attend))
            self.mlp: Callable[..., Tensor] = partial(mlp_slice, column_parallel_linear, build(feed))
        else:
            self.attention = build(partial(attention_slice, product, attend))
            self.mlp = build(partial(mlp_slice, product, feed))
        # Not compiled: the number of keys grows with every token.
        self.cached_attention: Callable[..., Tensor] = partial(cached_attention_slice, **heads)
        # Not compiled: used only in checks and generation.
        self.logits: Callable[..., Tensor] = logits_slice
        self.softmax = build(softmax_of_slice_)
