"""Token ids of many documents in one array, so that no Python object is made per token between encoder and packer."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from colonnade.data.tokenization import BoundaryTokens


class FlatIds(NamedTuple):
    """Token ids of N documents, concatenated: `ids` (int32 [T]) and the tokens per document, `lengths` (int64 [N])."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


def to_lists(flat: FlatIds) -> list[list[int]]:
    """Each document's ids."""
    return [document.tolist() for document in np.split(flat.ids, np.cumsum(flat.lengths)[:-1])] if len(flat[1]) else []


def to_flat(ids: list[list[int]]) -> FlatIds:
    """The inverse of `to_lists`."""
    lengths = np.fromiter(map(len, ids), np.int64, count=len(ids))
    return FlatIds(np.fromiter(chain.from_iterable(ids), np.int32, count=int(lengths.sum())), lengths)


def flatten(flat: FlatIds, boundaries: BoundaryTokens | None) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Add the boundary tokens to each document: returns tokens (int32 [T]) and where each document ends (int64 [N])."""
    if boundaries is None:
        return flat.ids, np.cumsum(flat.lengths)
    before, after = (token is not None for token in boundaries)
    lengths = flat.lengths + before + after
    ends = np.cumsum(lengths)
    tokens = np.empty(len(flat.ids) + (before + after) * len(ends), np.int32)
    is_text = np.ones(len(tokens), np.bool_)
    for token, places in zip(boundaries, (ends - lengths, ends - 1), strict=True):
        if token is not None:
            tokens[places] = token
            is_text[places] = False
    tokens[is_text] = flat.ids
    return tokens, ends
