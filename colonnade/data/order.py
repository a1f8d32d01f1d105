"""The order of a corpus: which lane a unit belongs to, and seeded orders of units and rows.

Every order is a pure function of its key, so there is no random state to save. Orders are derived from the raw output
of Philox (Salmon et al., SC 2011), which numpy guarantees not to change; the methods of its `Generator` may change.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Candidates for the default number of lanes. The largest, 48, is divisible by every dp up to 4 and by 6, 8, 12, 16, 24
# and 48.
_LANE_CHOICES = (48, 24, 12, 8, 4, 2, 1)
# Fewest units per lane. Lanes end an epoch up to one unit apart, which is too far apart if they have few units.
_UNITS_A_LANE = 16
# Fewest blocks per lane. With fewer, the tail that each epoch drops is too large a part of the data. A token is about
# four bytes.
_BLOCKS_A_LANE = 64
_BYTES_A_TOKEN = 4
# Most lanes of all corpora together. Each keeps two files open, and a process may often open 1024.
_LANES_OF_ALL_CORPORA = 384


def keyed_permutation(count: int, *key: int | str) -> npt.NDArray[np.int64]:
    """A permutation of range(count) that depends on `key` alone."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    random = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(random, kind="stable")


def deal_units(unit_bytes: Sequence[int], lanes: int, *key: int | str, shuffled: bool) -> list[npt.NDArray[np.int64]]:
    """The units of each lane, ascending. Units are dealt once for the whole run, largest first, each to the lane with
    the least text so far (Graham's LPT rule): lanes are read at the same pace, so they should end together. With
    `shuffled`, units of equal size are dealt in an order seeded by `key`, else in file order."""
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
    """Number of lanes of each corpus for a new run, from the sizes in bytes of each corpus's units.

    It depends on the data and the block size, never on the number of ranks: the token stream of a run must not depend
    on the machines it was started on.
    """

    def suits(lanes: int) -> bool:
        return lanes * len(corpora) <= _LANES_OF_ALL_CORPORA and all(
            len(units) >= _UNITS_A_LANE * lanes and sum(units) >= _BLOCKS_A_LANE * _BYTES_A_TOKEN * block_size * lanes
            for units in corpora
        )

    return next((lanes for lanes in _LANE_CHOICES if suits(lanes)), 1)
