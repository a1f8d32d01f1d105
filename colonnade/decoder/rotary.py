"""Rotary position embeddings (arXiv:2104.09864): the angle of each channel pair at each position, and the rotation.

Shapes: T positions, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colonnade.model_config import ModelConfig


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] for the positions 0 .. length - 1, computed in float32 as Hugging Face does.

    Each angle appears at both channels of its pair: (i, i + D / 2), or adjacent ones if the config interleaves them.
    """
    frequencies, scale = _frequencies(config)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    angles = angles.repeat_interleave(2, dim=-1) if config.rope_interleaved else torch.cat((angles, angles), dim=-1)
    angles = angles.to(device)
    return angles.cos() * scale, angles.sin() * scale


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position for each of the D / 2 pairs, and the factor that cos and sin are multiplied by."""
    if config.rope_scaling is None:
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return 1.0 / (config.rope_theta**pairs), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_theta": config.rope_theta, **config.rope_scaling},
    )
    return ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](theirs, torch.device("cpu"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the channel pairs of x [B, n, T, D] by the angles of the tables, which broadcast to x."""
    if torch.compiler.is_compiling():
        if interleaved:
            turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
        return x * cos + turned * sin
    rotated: Tensor = _Rotation.apply(x, cos, sin, interleaved)
    return rotated


class _Rotation(torch.autograd.Function):
    """The same in two passes over memory; the backward pass rotates the other way and does not need x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x, cos, sin, 1, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1, interleaved=ctx.interleaved), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int, *, interleaved: bool) -> Tensor:
    result = x * cos
    (first, second), (of_first, of_second), (sine, _) = (_pairs(whole, interleaved) for whole in (x, result, sin))
    of_first.addcmul_(second, sine, value=-direction)
    of_second.addcmul_(first, sine, value=direction)
    return result


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channel of each pair, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
