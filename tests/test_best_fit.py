"""Best-fit packing against a plain search over all bins, and against documents laid end to end and cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade.data.best_fit import best_fit_bins


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[tuple[int, int, int]]]:
    """The rule as it is written in the paper: every piece looks at every bin."""
    pieces = []
    for document, length in enumerate(lengths):
        pieces += [(document, begin, min(begin + capacity, length)) for begin in range(0, length, capacity)]
    bins: list[list[tuple[int, int, int]]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: piece[1] - piece[2]):
        size = piece[2] - piece[1]
        fitting = [number for number in range(len(bins)) if room[number] >= size]
        if not fitting:
            bins.append([])
            room.append(capacity)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda number: room[number])
        bins[best].append(piece)
        room[best] -= size
    return bins


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 17))
def test_bins_are_those_of_the_plain_search(lengths: list[int], capacity: int) -> None:
    bins = best_fit_bins(np.array(lengths, np.int64), capacity)
    assert [[tuple(piece) for piece in own.tolist()] for own in bins] == plain_best_fit(lengths, capacity)


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 128))
def test_every_token_is_in_one_bin_and_no_bin_overflows(lengths: list[int], capacity: int) -> None:
    bins = best_fit_bins(np.array(lengths, np.int64), capacity)
    seen = [np.zeros(length, np.int64) for length in lengths]
    for own in bins:
        assert 0 < (own[:, 2] - own[:, 1]).sum() <= capacity
        for document, begin, end in own:
            assert 0 <= begin < end
            seen[document][begin:end] += 1
    assert all((counts == 1).all() for counts in seen)


def web_lengths(count: int) -> np.ndarray:
    """Token counts like those of web text: log-normal, median 400, a tail beyond any block."""
    return np.random.default_rng(3).lognormal(6.0, 1.1, count).astype(np.int64) + 1


@pytest.mark.parametrize("capacity", [513, 2049])
def test_fewer_documents_are_cut_than_by_cutting_a_stream(capacity: int) -> None:
    lengths = web_lengths(20_000)
    bins = best_fit_bins(lengths, capacity)
    pieces = np.bincount(np.concatenate(bins)[:, 0], minlength=len(lengths))
    assert np.array_equal(pieces > 1, lengths > capacity)  # only what fits nowhere is cut
    ends = np.cumsum(lengths)
    cut_by_stream = (ends - lengths) // capacity != (ends - 1) // capacity
    assert (pieces > 1).sum() < cut_by_stream.sum()
    assert 1 - lengths.sum() / (len(bins) * capacity) < 0.001  # the share of padding


def test_a_hundred_thousand_documents() -> None:
    lengths = web_lengths(100_000)
    bins = best_fit_bins(lengths, 2049)
    assert sum(int((own[:, 2] - own[:, 1]).sum()) for own in bins) == lengths.sum()
    assert len(bins) <= 1.001 * lengths.sum() / 2049


def test_what_cannot_be_packed() -> None:
    assert best_fit_bins(np.zeros(0, np.int64), 8) == []
    assert best_fit_bins(np.zeros(3, np.int64), 8) == []
    with pytest.raises(ValueError, match="capacity 0"):
        best_fit_bins(np.array([1]), 0)
    with pytest.raises(ValueError, match="length below 0"):
        best_fit_bins(np.array([-1]), 8)
