"""The tree in which the deterministic mode sums a global batch, over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Split a node of the tree over a global batch: even and odd positions; an odd number of items in the middle.

    Data-parallel rank r of dp holds the items j with j mod dp == r. If dp is a power of two, these form a subtree, and
    the levels above it are the tree over ranks: the order of additions does not depend on which ranks hold the items.
    """
    if len(items) % 2 == 0:
        return items[0::2], items[1::2]
    return items[: len(items) // 2], items[len(items) // 2 :]


def leaf_order(items: Sequence[T]) -> list[T]:
    """The leaves of the tree from left to right; for a power of two, the bit-reversed order."""
    if len(items) <= 1:
        return list(items)
    left, right = halves(items)
    return [*leaf_order(left), *leaf_order(right)]


def nodes_completed(count: int) -> list[int]:
    """For each of `count` leaves, from left to right, the number of tree nodes of which it is the last leaf.

    With partial sums on a stack: after pushing the leaf, add the top two entries that many times.
    """
    if count <= 1:
        return [0] * count
    left, right = halves(range(count))
    completed = [*nodes_completed(len(left)), *nodes_completed(len(right))]
    completed[-1] += 1
    return completed
