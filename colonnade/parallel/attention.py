"""Causal attention over the heads of one slice.

Shapes: B batch, T block, H hidden, D head size; n query heads and k key/value heads of one slice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection in the activation's dtype, whatever the parameter is stored in."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout of Hugging Face's Llama. x [B, n, T, D]; cos, sin [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_slice(
    x: Tensor,
    q: tuple[Tensor, Tensor | None],
    k: tuple[Tensor, Tensor | None],
    v: tuple[Tensor, Tensor | None],
    o: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
) -> Tensor:
    """Causal grouped-query attention over the heads of one slice: [B, T, H] -> partial [B, T, H].

    q, k, v are (weight [heads * D, H], bias); o is [H, n * D].
    """
    batch, block, _ = x.shape
    query = linear(x, *q).view(batch, block, -1, head_dim).transpose(1, 2)  # [B, n, T, D]
    key = linear(x, *k).view(batch, block, -1, head_dim).transpose(1, 2)  # [B, k, T, D]
    value = linear(x, *v).view(batch, block, -1, head_dim).transpose(1, 2)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    group = query.shape[1] // key.shape[1]
    if group > 1 and not x.is_cuda:
        # On the CPU a grouped call falls back to unfused attention; repeated heads keep it fused.
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1 and x.is_cuda)
    return linear(mixed.transpose(1, 2).reshape(batch, block, -1), o, None)
