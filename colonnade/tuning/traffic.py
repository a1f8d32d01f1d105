"""The predicted traffic of one collective: how often it is called in a step, and how much it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, BROADCAST = "all-to-all", "broadcast"

Computation = Literal["step", "micro-batch", "last backward pass", "gradients of q, k, v", "gradients of gate, up"]
"""The computation that a collective may overlap with: all of a step's, one micro-batch's, or that of the last
micro-batch's backward pass; or, in all backward passes, the products for these column-parallel weights' gradients."""


@dataclass(frozen=True)
class Traffic:
    """All calls of one collective, for one purpose, in a step.

    Attributes:
        group: "tp", "dp" (all data-parallel ranks, or those that shard one copy of the parameters) or "replicas".
        what: what is sent.
        ranks: size of the group.
        size: bytes of all calls together.
        behind: the computation that the collective overlaps with; None for none.
    """

    group: str
    what: str
    collective: str
    ranks: int
    calls: int
    size: int
    behind: Computation | None = None

    @property
    def sent(self) -> float:
        """Bytes over the busiest link of a ring of G ranks.

        As a fraction of `size`: 2 (G - 1) / G for an all-reduce, 1 for a broadcast, (G - 1) / G for the others.
        """
        if self.collective == BROADCAST:
            return float(self.size)
        rounds = 2 if self.collective == ALL_REDUCE else 1
        return rounds * (self.ranks - 1) / self.ranks * self.size
