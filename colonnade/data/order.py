"""The order of a corpus: which lane a unit belongs to, and seeded orders of units and rows.

Every order is a pure function of its key, so there is no random state to save. It is made from the raw output of
Philox (Salmon et al., SC 2011), which numpy promises not to change, where the methods of its `Generator` may.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# The most lanes a run gets unless told otherwise: every dp up to 4, and 6, 8, 12, 16, 24 and 48, divides it.
_LANE_CHOICES = (48, 24, 12, 8, 4, 2, 1)
# Lanes end an epoch up to a unit apart: with fewer units a lane than this, too far apart.
_UNITS_A_LANE = 16
# Fewer blocks than this a lane, and the tails that its epochs drop are too much of it. A token is about four bytes.
_BLOCKS_A_LANE = 64
_BYTES_A_TOKEN = 4


def keyed_permutation(count: int, *key: int | str) -> npt.NDArray[np.int64]:
    """A permutation of range(count) that depends on `key` alone."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    random = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(random, kind="stable")


def deal_units(unit_bytes: Sequence[int], lanes: int, *key: int | str, shuffled: bool) -> list[npt.NDArray[np.int64]]:
    """The units of each lane, ascending. Units are dealt once for the whole run, the largest first, each to the lane
    that holds the least text so far (Graham's LPT rule): lanes are read at one pace, so they should end together. With
    `shuffled`, units of one size are dealt in a seeded order, else in their own."""
    order = keyed_permutation(len(unit_bytes), "deal", *key) if shuffled else np.arange(len(unit_bytes))
    largest_first = order[np.argsort(-np.asarray(unit_bytes, np.int64)[order], kind="stable")]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    loads = [(0, lane) for lane in range(lanes)]
    for unit in largest_first.tolist():
        load, lane = heapq.heappop(loads)
        dealt[lane].append(unit)
        heapq.heappush(loads, (load + max(1, unit_bytes[unit]), lane))
    return [np.array(sorted(units), np.int64) for units in dealt]


def unit_order(
    members: npt.NDArray[np.int64], seed: int, name: str, epoch: int, *, shuffled: bool
) -> npt.NDArray[np.int64]:
    """The units of a lane (`members`, ascending) of corpus `name`, in the order they are read in `epoch`."""
    if not shuffled:
        return members
    return members[keyed_permutation(len(members), seed, name, "units", epoch, int(members[0]))]


def default_lanes(corpora: Sequence[Sequence[int]], block_size: int) -> int:
    """Lanes for a new run, from the sizes in bytes of each corpus's units.

    It follows from the data and the block size, never from the number of ranks: the token stream of a run must not
    depend on where it was started.
    """

    def suits(lanes: int) -> bool:
        return all(
            len(units) >= _UNITS_A_LANE * lanes and sum(units) >= _BLOCKS_A_LANE * _BYTES_A_TOKEN * block_size * lanes
            for units in corpora
        )

    return next((lanes for lanes in _LANE_CHOICES if suits(lanes)), 1)
