"""The vocabulary-parallel embedding and cross-entropy.

Each rank holds a stretch of the vocabulary. Logits are never gathered: the loss needs from the other ranks only, a
token each, a maximum, a sum of exponentials and the logit of the target (Megatron-LM, arXiv:1909.08053, section 3).

Shapes: M tokens (B * T), v vocabulary entries of one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.parallel.collectives import TensorGroup

IGNORE_INDEX = -100
"""A label that takes no part in the loss (the value `torch.nn.functional.cross_entropy` uses)."""


def embed_tokens(input_ids: Tensor, weight: Tensor, start: int, group: TensorGroup) -> Tensor:
    """Look up token embeddings in a vocabulary-sharded table.

    Args:
        input_ids: [B, T] token ids.
        weight: [rows, H], this rank's stretch of the table.
        start: id of its first row.

    Returns:
        [B, T, H], whole on every rank. Exactly one rank contributes to each token, so no order of sums matters.
    """
    if group.size == 1:
        return F.embedding(input_ids, weight)
    return _Embedding.apply(input_ids, weight, start, group)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, start: int, group: TensorGroup) -> Tensor:
        rows = weight.shape[0]
        elsewhere = (input_ids < start) | (input_ids >= start + rows)
        local_ids = input_ids - start
        # Slices of one rank are neighbours in its table: the lookup is one partial, whatever V is. What another rank
        # holds is -0.0 here, the neutral element of addition.
        partial = F.embedding(local_ids.masked_fill(elsewhere, 0), weight).masked_fill_(elsewhere.unsqueeze(-1), -0.0)
        ctx.rows = rows
        ctx.save_for_backward(local_ids.masked_fill_(elsewhere, rows))
        return group.sum_(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        (local_ids,) = ctx.saved_tensors
        # The id one past the table stands for the tokens of other ranks, and as padding it is left out: each row sums
        # its own tokens in their order, as it does in the whole table.
        table = torch.ops.aten.embedding_dense_backward(gradient.contiguous(), local_ids, ctx.rows, ctx.rows, False)
        return None, table, None, None


class _CrossEntropy(torch.autograd.Function):
    """Sum of token losses over vocabulary slices. Saves one float32 tensor of the local logits' size a slice."""

    @staticmethod
    def forward(
        ctx: Any, group: TensorGroup, labels: Tensor, starts: Sequence[int], vocab_size: int, *logits: Tensor
    ) -> Tensor:
        accumulate = torch.promote_types(logits[0].dtype, torch.float32)
        # Padded entries stand at the end of the table; a slice may consist of nothing else.
        real = [
            part[:, : max(0, min(part.shape[1], vocab_size - start))]
            for part, start in zip(logits, starts, strict=True)
        ]
        lowest = torch.finfo(accumulate).min
        maximum = labels.new_full(labels.shape, lowest, dtype=accumulate)
        for part in real:
            if part.shape[1]:
                torch.maximum(maximum, part.amax(dim=1).to(accumulate), out=maximum)
        group.max_(maximum)

        exponentials, sums, targets = [], [], []
        for part, start in zip(real, starts, strict=True):
            shifted = part.to(accumulate) - maximum.unsqueeze(1)
            present, position = _position(labels, start, part.shape[1])
            if part.shape[1]:
                targets.append(shifted.gather(1, position.unsqueeze(1)).squeeze(1).masked_fill(~present, 0.0))
            else:
                targets.append(torch.zeros_like(maximum))
            exponentials.append(shifted.exp_())
            sums.append(exponentials[-1].sum(dim=1))
        partials = [torch.stack(pair) for pair in zip(sums, targets, strict=True)]
        total, target = group.sum_slices(partials).unbind(0)  # each [M]

        counted = labels != IGNORE_INDEX
        ctx.save_for_backward(labels, total, *exponentials)
        ctx.starts, ctx.widths, ctx.dtype = starts, [part.shape[1] for part in logits], logits[0].dtype
        return torch.where(counted, total.log() - target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        labels, total, *exponentials = ctx.saved_tensors
        counted = (labels != IGNORE_INDEX).to(total.dtype) * gradient
        scale = (counted / total).unsqueeze(1)
        gradients = []
        for values, start, width in zip(exponentials, ctx.starts, ctx.widths, strict=True):
            # The saved exponentials become the gradient in place: nothing else reads them.
            values.mul_(scale)
            present, position = _position(labels, start, values.shape[1])
            if values.shape[1]:
                values.scatter_add_(1, position.unsqueeze(1), -(present * counted).unsqueeze(1))
            gradients.append(F.pad(values.to(ctx.dtype), (0, width - values.shape[1])))
        return (None, None, None, None, *gradients)


def _position(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether a label lies in [start, start + width), and its column there (0 when it does not)."""
    present = (labels >= start) & (labels < start + width)
    return present, (labels - start).masked_fill(~present, 0)


def cross_entropy_sum(
    logits: Sequence[Tensor], labels: Tensor, starts: Sequence[int], vocab_size: int, group: TensorGroup
) -> Tensor:
    """Sum over tokens of the cross-entropy, from vocabulary-sharded logits.

    Args:
        logits: one [M, v] tensor a local slice.
        labels: [M] target ids; `IGNORE_INDEX` leaves a token out.
        starts: id of the first entry of each local slice.
        vocab_size: ids from here on are padding and never enter the loss.

    Returns:
        A scalar in float32 (float64 for float64 logits), equal on every rank. It can be differentiated once.
    """
    return _CrossEntropy.apply(group, labels, tuple(starts), vocab_size, *logits)
