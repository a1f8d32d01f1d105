"""The tree in which the deterministic mode adds up a global batch: over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """One node of the tree over a global batch: every second item and the others; an odd number is cut in the middle.

    Data-parallel rank r of dp holds the items j with j mod dp == r. For a power of two these are a subtree, and the
    levels above it are the tree over ranks: whoever holds the items, they are added in one order.
    """
    if len(items) % 2 == 0:
        return items[0::2], items[1::2]
    return items[: len(items) // 2], items[len(items) // 2 :]


def leaf_order(items: Sequence[T]) -> list[T]:
    """The leaves of the tree from left to right; for a power of two the bit-reversed order."""
    if len(items) <= 1:
        return list(items)
    left, right = halves(items)
    return [*leaf_order(left), *leaf_order(right)]


def nodes_completed(count: int) -> list[int]:
    """Of each of `count` leaves, taken from left to right, the nodes of the tree that it is the last leaf of.

    With the sums so far on a stack, that many additions of its two topmost are due once the leaf is on it.
    """
    if count <= 1:
        return [0] * count
    left, right = halves(range(count))
    completed = [*nodes_completed(len(left)), *nodes_completed(len(right))]
    completed[-1] += 1
    return completed
