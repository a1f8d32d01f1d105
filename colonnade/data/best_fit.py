"""Best-fit packing of documents into blocks (best-fit decreasing, "Fewer Truncations", arXiv:2404.10830).

A document that fits into a block is never cut. Pure functions of their arguments: the same on every machine.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def best_fit_bins(lengths: Integers, capacity: int) -> list[Integers]:
    """Pack documents into bins of `capacity` tokens.

    A document longer than a bin is first cut into full bins and a remainder. Then each piece, longest first, goes into
    the bin with the least free space that still fits it, or into a new bin. Ties go to the first document, its first
    piece, and the first bin.

    Args:
        lengths: [N] tokens of each document; an empty document is in no bin.
        capacity: tokens a bin holds.

    Returns:
        One array [pieces, 3] per bin with rows (document, begin, end): tokens begin to end (exclusive) of that
        document. Bins are in the order they were opened, pieces in the order they were placed.

    Raises:
        ValueError: `capacity` is below 1 or a length is below 0.
    """
    pieces = cut_pieces(lengths, capacity)
    sizes = pieces[:, 2] - pieces[:, 1]
    order = np.argsort(-sizes, kind="stable")
    bin_of = _place(sizes[order].tolist(), capacity)
    by_bin = np.argsort(bin_of, kind="stable")
    ends = np.cumsum(np.bincount(bin_of))
    return np.split(pieces[order[by_bin]], ends[:-1]) if len(pieces) else []


def cut_pieces(lengths: Integers, capacity: int) -> Integers:
    """Cut documents into pieces of at most `capacity` tokens: [pieces, 3], rows (document, begin, end), in order."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or (lengths < 0).any():
        raise ValueError(f"capacity {capacity} must be at least 1 and no length below 0")
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts  # the number of each document's first piece
    begin = (np.arange(len(document)) - first[document]) * capacity
    return np.stack([document, begin, np.minimum(begin + capacity, lengths[document])], axis=1)


def _place(sizes: list[int], capacity: int) -> Integers:
    """The bin of each piece; `sizes` must be in descending order."""
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]  # heaps of bins, indexed by their free space
    occupied = 0  # bit r: some bin has r tokens free. One shift then finds the least free space that is enough
    bins = 0
    placed = np.empty(len(sizes), np.int64)
    for index, size in enumerate(sizes):
        enough = occupied >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            chosen = heappop(rooms[room])
            if not rooms[room]:
                occupied ^= 1 << room
        else:
            room, chosen = capacity, bins
            bins += 1
        placed[index] = chosen
        left = room - size
        if left:
            heappush(rooms[left], chosen)
            occupied |= 1 << left
    return placed
