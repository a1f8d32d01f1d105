"""The wire format of a block: `block_size + 1` int32, one per token, and how inputs and labels are derived from it.

    bits 0 to 29   the token id
    bit 30         set where a document begins
    -1             padding: no token

A block without marks and padding is just its token ids. `pack_blocks` and `counted_targets` accept any leading
dimensions.
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
"""The bit that marks a document's first token."""


@dataclass(frozen=True)
class Blocks:
    """The model's inputs, taken from blocks.

    Attributes:
        input_ids: int64 [B, T]; 0 at padding.
        labels: int64 [B, T], the next tokens; `IGNORE_INDEX` where a label does not count.
        document_starts: bool [B, T], True where a document begins, always in the first column; a run of padding is a
            document of its own. None if attention spans the whole block.
    """

    input_ids: Tensor
    labels: Tensor
    document_starts: Tensor | None


def pack_blocks(
    tokens: npt.NDArray[np.int32], starts: npt.NDArray[np.bool_], padding: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """Encode tokens and marks in the wire format.

    Args:
        tokens: [..., block_size + 1] ids below 2**30; values where `padding` is set are ignored.
        starts: True where a document begins, of the same shape.
        padding: True where there is no token, of the same shape.

    Raises:
        ValueError: an id is negative or has more than 30 bits.
    """
    real = np.where(padding, np.int32(0), tokens)
    if real.size and not 0 <= int(real.min()) <= int(real.max()) < BEGIN:
        raise ValueError(f"token ids {real.min()} to {real.max()} do not fit into 30 bits")
    return np.where(padding, np.int32(PADDING), real | np.where(starts, np.int32(BEGIN), np.int32(0)))


def unpack_blocks(wire: Tensor, *, document_mask: bool) -> Blocks:
    """Inputs and labels of blocks [B, T + 1], on their device.

    A label counts unless it, or the token it is predicted from, is padding. With `document_mask` the first token of a
    document does not count as a label either, because the token before it belongs to another document. The loss is
    then the same as for each document run on its own.
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
    """Number of labels in blocks [..., T + 1] that count, as in `unpack_blocks`. A host sync for a device tensor."""
    import torch

    return int(_counted(torch.as_tensor(wire), document_mask=document_mask).sum())


def _begins(wire: Tensor) -> Tensor:
    """For each token but the first, whether a document or a run of padding begins with it: bool [..., T]."""
    padding = wire < 0
    return (padding[..., 1:] != padding[..., :-1]) | (~padding[..., 1:] & ((wire[..., 1:] & BEGIN) != 0))


def _counted(wire: Tensor, *, document_mask: bool) -> Tensor:
    """For each token but the first, whether it is a label that counts: bool [..., T]."""
    real = wire >= 0
    counted = real[..., 1:] & real[..., :-1]
    return counted & ~_begins(wire) if document_mask else counted
