"""The wire format of a block: one int32 a token, `block_size + 1` wide, and how inputs and labels are taken from it.

    bits 0 to 29   the token id
    bit 30         set where a document begins
    -1             padding: no token

A block without marks and padding is its token ids. Everything here takes leading dimensions as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # a reader packs blocks without torch
    from torch import Tensor

PADDING = -1
BEGIN = 1 << 30
"""The mark of a document's first token."""


@dataclass(frozen=True)
class Blocks:
    """What a model is given of blocks.

    Attributes:
        input_ids: int64 [B, T]; 0 where padding stands.
        labels: int64 [B, T], the next tokens; `IGNORE_INDEX` where none counts.
        document_starts: bool [B, T], True where a document begins, the first column included; a stretch of padding is a
            document. None where attention is over the whole block.
    """

    input_ids: Tensor
    labels: Tensor
    document_starts: Tensor | None


def pack_blocks(
    tokens: npt.NDArray[np.int32], starts: npt.NDArray[np.bool_], padding: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """Put tokens and marks into the wire format.

    Args:
        tokens: [..., block_size + 1] ids below 2**30; what stands where `padding` is set does not matter.
        starts: where a document begins, of the same shape.
        padding: where no token stands, of the same shape.

    Raises:
        ValueError: an id is negative or has more than 30 bits.
    """
    real = np.where(padding, np.int32(0), tokens)
    if real.size and not 0 <= int(real.min()) <= int(real.max()) < BEGIN:
        raise ValueError(f"token ids {real.min()} to {real.max()} do not fit into 30 bits")
    return np.where(padding, np.int32(PADDING), real | np.where(starts, np.int32(BEGIN), np.int32(0)))


def unpack_blocks(wire: Tensor, *, document_mask: bool) -> Blocks:
    """Inputs and labels of blocks [B, T + 1], on their device.

    A label counts unless it, or the token it is predicted from, is padding; with `document_mask` the first token of a
    document is no label either: the token before it, which another document holds, does not predict it. So the loss is
    that of the documents run one by one.
    """
    import torch

    from colonnade.parallel.head_loss import IGNORE_INDEX

    ids = torch.where(wire < 0, 0, wire & (BEGIN - 1)).long()
    labels = ids[:, 1:].masked_fill(~_counted(wire, document_mask=document_mask), IGNORE_INDEX)
    starts = None
    if document_mask:
        starts = torch.cat([torch.ones_like(wire[:, :1], dtype=torch.bool), _begins(wire)[:, :-1]], dim=1)
    return Blocks(ids[:, :-1], labels, starts)


def counted_targets(wire: npt.NDArray[np.int32] | Tensor, document_mask: bool) -> int:
    """How many labels of blocks [..., T + 1] `unpack_blocks` counts. For a tensor on a device this waits for it."""
    import torch

    return int(_counted(torch.as_tensor(wire), document_mask=document_mask).sum())


def _begins(wire: Tensor) -> Tensor:
    """Of each token but the first, whether a document or a stretch of padding begins with it: bool [..., T]."""
    padding = wire < 0
    return (padding[..., 1:] != padding[..., :-1]) | (~padding[..., 1:] & ((wire[..., 1:] & BEGIN) != 0))


def _counted(wire: Tensor, *, document_mask: bool) -> Tensor:
    """Of each token but the first, whether it is a label that counts: bool [..., T]."""
    real = wire >= 0
    counted = real[..., 1:] & real[..., :-1]
    return counted & ~_begins(wire) if document_mask else counted
