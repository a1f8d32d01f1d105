"""Causal attention over the heads of one slice, either over the whole block or within each document.

Shapes: B batch, T block, H hidden, D head size; n query heads and k key/value heads of one slice.

A batch of concatenated documents comes with `document_starts`, bool [B, T]. From it a `DocumentLayout` is built once
per micro-batch, in the form that the device's kernel takes:

    CUDA            a `BlockMask` for `flex_attention` (arXiv:2412.05496), which skips blocks outside a document
    CPU, eager      the documents' lengths; each document is a separate causal call
    otherwise       a bool mask [B, 1, T, T] for `scaled_dot_product_attention`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from colonnade.decoder.elementwise import rms_norm
from colonnade.decoder.float8 import Linear
from colonnade.decoder.rotary import rotate

FLEX_BLOCK = 128
"""Rows and columns of a block of `flex_attention`'s sparse mask (its default)."""

FLEX_SMALLEST_HEAD = 16
"""The smallest head size that `flex_attention`'s kernels accept: the tile size of a matrix unit."""

Kernel = Literal["flex", "documents", "masked"]

DocumentMask = BlockMask | list[list[int]] | Tensor
"""What a kernel needs to keep attention within documents: see `DocumentLayout.mask`."""


@dataclass(frozen=True)
class DocumentLayout:
    """The documents of a micro-batch.

    Attributes:
        positions: int64 [B, T], each token's distance from the start of its document.
        mask: a `BlockMask` (kernel "flex"), each row's document lengths ("documents") or bool [B, 1, T, T], True where
            a query may see a key ("masked").
    """

    positions: Tensor
    mask: DocumentMask


def document_kernel(device: torch.device, head_dim: int, dtype: torch.dtype, *, compiled: bool) -> Kernel:
    """Which kernel keeps attention within documents on this device.

    Args:
        dtype: of the activations.
        compiled: whether attention is part of a compiled graph.
    """
    if device.type == "cuda" and has_triton() and head_dim >= FLEX_SMALLEST_HEAD and dtype != torch.float64:
        return "flex"
    # One call per document does no work across documents and needs no mask in memory. At blocks of 1024 and 2048 it has
    # 1.5 to 4.6 times the speed of causal attention over the block, the masked call 0.5 to 0.7 times
    # (benchmarks/document_mask.py). In a compiled graph, however, the lengths would be constants, so that every batch
    # would compile again; a mask is an ordinary input.
    return "documents" if device.type == "cpu" and not compiled else "masked"


def document_layout(document_starts: Tensor, kernel: Kernel) -> DocumentLayout:
    """Positions and mask of a micro-batch. document_starts: bool [B, T]; the first column counts as True."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    positions = index - torch.where(document_starts, index, 0).cummax(dim=1).values
    mask: DocumentMask
    if kernel == "documents":
        mask = _lengths(document_starts)
    else:
        documents = document_starts.cumsum(dim=1, dtype=torch.int32)
        mask = _block_mask(documents) if kernel == "flex" else _dense_mask(documents)
    return DocumentLayout(positions, mask)


def _lengths(document_starts: Tensor) -> list[list[int]]:
    rows = []
    for row in document_starts:
        begins = [0, *(row[1:].nonzero().flatten() + 1).tolist(), len(row)]
        rows.append([end - begin for begin, end in pairwise(begins)])
    return rows


def _dense_mask(documents: Tensor) -> Tensor:
    return (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)


def _block_mask(documents: Tensor) -> BlockMask:
    """The result of `create_block_mask` for the same rule, without evaluating it at all T x T positions.

    Document numbers rise along a row, so the first and last tokens of two blocks show whether these share a document.
    """
    block = documents.shape[1]
    # The padding of the last block belongs to no document, so that a padded block never counts as whole.
    stretches = F.pad(documents, (0, -block % FLEX_BLOCK), value=block + 1).unflatten(1, (-1, FLEX_BLOCK))
    first, last = stretches[..., 0], stretches[..., -1]
    number = torch.arange(first.shape[1], device=documents.device)
    earlier = number[:, None] > number[None, :]  # [queries, keys]
    touching = earlier & (first[:, :, None] == last[:, None, :])
    whole = earlier & (last[:, :, None] == first[:, None, :])
    partial = (touching & ~whole) | (number[:, None] == number[None, :])

    def within_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=within_document,
        seq_lengths=(block, block),
    )


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """For bool [B, queries, keys]: the count of True per row, and the columns, True first. int32, with a head axis."""
    dense = dense.unsqueeze(1).to(torch.int32)
    columns = dense.argsort(dim=-1, descending=True, stable=True)
    return dense.sum(dim=-1, dtype=torch.int32), columns.to(torch.int32).contiguous()


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Uncompiled, it computes all T x T scores. Each micro-batch size that the autotuner tries compiles its own graph.
    allow_recompilation()
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def allow_recompilation() -> None:
    """Allow a function to be compiled for many shapes: with the default of 8, the autotuner's trials would fail."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection in the activations' dtype, whatever dtype the parameters are stored in."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class SliceWeights(NamedTuple):
    """The attention parameters of one slice.

    Attributes:
        qkv: [(n + 2 k) * D, H], the rows of queries, keys and values.
        bias: the bias of `qkv`; None if there is none.
        o: [H, n * D].
        norms: [2, D], the norm weights for each head's queries and for its keys; None if there are none.
    """

    qkv: Tensor
    bias: Tensor | None
    o: Tensor
    norms: Tensor | None


def split_heads(
    projected: Tensor,
    o: Tensor,
    norms: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, n, T, D], key and value [B, k, T, D] of one slice, normed and rotated if the model does so.

    projected: [B, T, (n + 2 k) * D]. o and norms are those of `SliceWeights`. cos, sin: [T, D], or [B, 1, T, D] if each
    row has its own positions; None for a layer without rotary positions.
    """
    batch, block, width = projected.shape
    heads = o.shape[1] // head_dim
    shared = (width // head_dim - heads) // 2
    turning, value = projected.view(batch, block, -1, head_dim).transpose(1, 2).split([heads + shared, shared], dim=1)
    if norms is not None:
        query, key = turning.split([heads, shared], dim=1)
        query, key = rms_norm(query, norms[0], eps=eps), rms_norm(key, norms[1], eps=eps)
        turning = torch.cat((query, key), dim=1)
    if cos is not None and sin is not None:
        turning = rotate(turning, cos.to(turning.dtype), sin.to(turning.dtype), interleaved=interleaved)
    query, key = turning.split([heads, shared], dim=1)
    return query, key, value


def attend_projected(
    projected: Tensor,
    o: Tensor,
    norms: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: DocumentMask | None = None,
    *,
    linear: Linear = linear,
    grouped: bool = False,
    **constants: Any,
) -> Tensor:
    """Causal grouped-query attention over the heads of one slice: [B, T, (n + 2 k) * D] -> partial [B, T, H].

    `constants`, cos and sin are those of `split_heads`, `grouped` is that of `attend`. Without a mask, attention is
    over the whole block.
    """
    query, key, value = split_heads(projected, o, norms, cos, sin, **constants)
    return _merge_heads(attend(query, key, value, mask, grouped=grouped), o, linear)


def cached_attention_slice(
    x: Tensor,
    weights: SliceWeights,
    cos: Tensor | None,
    sin: Tensor | None,
    visible: Tensor | None,
    extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    linear: Linear = linear,
    grouped: bool = False,
    **constants: Any,
) -> Tensor:
    """Attention of new tokens over the cached ones and themselves: [B, T, H] -> partial [B, T, H].

    Args:
        visible: bool [B, 1, T, S]; None for causal attention (`KeyValueCache.visible`).
        extend: stores the new keys and values, and returns those of all S tokens, [B, k, S, D]
            (`KeyValueCache.extend`).
    """
    projected = linear(x, weights.qkv, weights.bias)
    query, key, value = split_heads(projected, weights.o, weights.norms, cos, sin, **constants)
    keys, values = extend(key, value)
    if visible is None and query.shape[2] > 1:
        mixed = attend(query, keys, values, None, grouped=grouped)
    else:
        group = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    return _merge_heads(mixed, weights.o, linear)


def _merge_heads(mixed: Tensor, o: Tensor, linear: Linear) -> Tensor:
    return linear(mixed.transpose(1, 2).flatten(2), o, None)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None, *, grouped: bool = False) -> Tensor:
    """Causal attention of query [B, n, T, D] over key and value [B, k, T, D], n a multiple of k: [B, n, T, D].

    Args:
        grouped: pass the kernel without a mask k heads instead of repeating them to n (`takes_groups`).
    """
    group = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockMask):
        alone = query.is_cuda and not torch.compiler.is_compiling()
        flex: Any = _compiled_flex_attention() if alone else flex_attention
        mixed: Tensor = flex(query, key, value, block_mask=mask, enable_gqa=group > 1)
        return mixed
    if group > 1 and not (mask is None and grouped):
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        group = 1
    if isinstance(mask, list):
        return _attend_one_by_one(query, key, value, mask)
    if mask is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)


def takes_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused, unmasked kernel of `scaled_dot_product_attention` accepts fewer key heads than query heads.

    Only kernels for half precision on GPUs from Ampere on do. Elsewhere a grouped call materialises all scores, [B, n,
    T, T], while repeated heads keep the kernel fused. Do not call this inside a compiled graph, where device properties
    are not available.

    Args:
        dtype: of the activations.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and torch.cuda.get_device_properties(device).major >= 8


def _attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]]) -> Tensor:
    rows = []
    for row, own in enumerate(lengths):
        parts = zip(*(tensor[row : row + 1].split(own, dim=2) for tensor in (query, key, value)), strict=True)
        mixed = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
        rows.append(torch.cat(mixed, dim=2))
    return torch.cat(rows)
