"""What a prediction says of one collective: how often it is called in a step, and what it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, BROADCAST = "all-to-all", "broadcast"

Computation = Literal["step", "micro-batch", "last backward pass", "gradients of q, k, v", "gradients of gate, up"]
"""What may go on during a collective: all of a step, of one micro-batch, of the last one's backward pass; or, in all
backward passes, the products that give the gradients of these column-parallel weights."""


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective in a step.

    Attributes:
        group: "tp"; "dp" (all data-parallel ranks, or those that share out one copy), or "replicas".
        what: what is sent.
        ranks: of the group.
        size: bytes of all calls together.
        behind: the computation that goes on meanwhile; None for none.
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
        """Bytes that pass the busiest link of a ring of G ranks.

        2 (G - 1) / G of an all-reduce's, all of a broadcast's, (G - 1) / G of the others'.
        """
        if self.collective == BROADCAST:
            return float(self.size)
        rounds = 2 if self.collective == ALL_REDUCE else 1
        return rounds * (self.ranks - 1) / self.ranks * self.size
