"""The vocabulary-parallel embedding: each rank holds a range of rows (Megatron-LM, arXiv:1909.08053, section 3).

Shapes: B batch, T block, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.parallel.collectives import TensorGroup


def embed_tokens(input_ids: Tensor, weight: Tensor, start: int, group: TensorGroup) -> Tensor:
    """Look up token embeddings in a vocabulary-sharded table.

    Args:
        input_ids: [B, T] token ids.
        weight: [rows, H], this rank's rows of the table.
        start: id of its first row.

    Returns:
        Partial [B, T, H], to be summed over the ranks. For each token exactly one rank contributes, and the others hold
        -0.0, the neutral element of addition. So the order of the sum does not matter, nor whether the result is cast
        before or after it.
    """
    if group.size == 1:
        return F.embedding(input_ids, weight)
    return _Embedding.apply(input_ids, weight, start)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, start: int) -> Tensor:
        rows = weight.shape[0]
        elsewhere = (input_ids < start) | (input_ids >= start + rows)
        local_ids = input_ids - start
        # A rank's slices are adjacent in its table, so one look-up gives one partial, whatever V is.
        partial = F.embedding(local_ids.masked_fill(elsewhere, 0), weight).masked_fill_(elsewhere.unsqueeze(-1), -0.0)
        ctx.rows = rows
        ctx.save_for_backward(local_ids.masked_fill_(elsewhere, rows))
        return partial

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (local_ids,) = ctx.saved_tensors
        # The id one past the table stands for tokens of other ranks; it is passed as the padding index, so they are
        # ignored. Each row sums its own tokens in their order, as it would in the whole table.
        table = torch.ops.aten.embedding_dense_backward(gradient.contiguous(), local_ids, ctx.rows, ctx.rows, False)
        return None, table, None
