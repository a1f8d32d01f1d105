"""The wire format of blocks, against values written out and against loops over single tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade.data.blocks import BEGIN, PADDING, counted_targets, pack_blocks, unpack_blocks

IGNORED = -100


def test_a_block_written_out() -> None:
    tokens = np.array([[5, 6, 7, 8, 9, 1, 2]], np.int32)
    starts = np.array([[1, 0, 0, 1, 1, 0, 0]], np.bool_)
    padding = np.array([[0, 0, 0, 0, 0, 1, 1]], np.bool_)
    wire = pack_blocks(tokens, starts, padding)
    assert wire.dtype == np.int32
    assert wire.tolist() == [[5 | 1 << 30, 6, 7, 8 | 1 << 30, 9 | 1 << 30, -1, -1]]

    blocks = unpack_blocks(torch.from_numpy(wire), document_mask=True)
    assert blocks.input_ids.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert blocks.labels.tolist() == [[6, 7, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert blocks.document_starts is not None
    assert blocks.document_starts.tolist() == [[True, False, False, True, True, True]]
    assert counted_targets(wire, True) == 2

    blocks = unpack_blocks(torch.from_numpy(wire), document_mask=False)
    assert blocks.labels.tolist() == [[6, 7, 8, 9, IGNORED, IGNORED]]
    assert blocks.document_starts is None
    assert counted_targets(torch.from_numpy(wire), False) == 4


def test_blocks_without_marks_are_their_tokens() -> None:
    tokens = np.random.default_rng(0).integers(0, BEGIN, (3, 4, 9), dtype=np.int32)
    none = np.zeros(tokens.shape, np.bool_)
    assert np.array_equal(pack_blocks(tokens, none, none), tokens)
    blocks = unpack_blocks(torch.from_numpy(tokens[0]), document_mask=False)
    assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64
    assert np.array_equal(blocks.input_ids.numpy(), tokens[0, :, :-1])
    assert np.array_equal(blocks.labels.numpy(), tokens[0, :, 1:])
    assert counted_targets(tokens, False) == tokens[..., 1:].size


@pytest.mark.parametrize("token", [-1, BEGIN])
def test_ids_that_do_not_fit_are_refused(token: int) -> None:
    tokens = np.array([3, token], np.int32)
    with pytest.raises(ValueError, match="30 bits"):
        pack_blocks(tokens, np.zeros(2, np.bool_), np.zeros(2, np.bool_))
    assert pack_blocks(tokens, np.zeros(2, np.bool_), np.array([False, True])).tolist() == [3, PADDING]


cells = st.tuples(st.integers(0, BEGIN - 1), st.booleans(), st.booleans())
rows = st.integers(2, 12).flatmap(lambda width: st.lists(cells, min_size=width, max_size=width))


@settings(deadline=None)
@given(rows, st.booleans())
def test_unpacking_equals_a_loop_over_tokens(row: list[tuple[int, bool, bool]], document_mask: bool) -> None:
    tokens, starts, padding = (np.array(column)[None] for column in zip(*row, strict=True))
    wire = pack_blocks(tokens.astype(np.int32), starts, padding)
    blocks = unpack_blocks(torch.from_numpy(wire), document_mask=document_mask)

    labels, begins = [], [True]
    for (_, _, padded), (target, start, target_padded) in pairwise(row):
        begins.append(padded != target_padded or (start and not target_padded))
        left_out = padded or target_padded or (document_mask and begins[-1])
        labels.append(IGNORED if left_out else target)
    assert blocks.input_ids.tolist() == [[0 if padded else token for token, _, padded in row[:-1]]]
    assert blocks.labels.tolist() == [labels]
    assert counted_targets(wire, document_mask) == len(labels) - labels.count(IGNORED)
    if document_mask:
        assert blocks.document_starts is not None
        assert blocks.document_starts.tolist() == [begins[:-1]]
    else:
        assert blocks.document_starts is None
