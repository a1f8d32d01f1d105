"""Learning-rate schedules as pure functions of the step, so that nothing about them has to be restored."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then a cosine from `peak` to `minimum` (SGDR, arXiv:1608.03983, without restarts).

    Attributes:
        peak, minimum: learning rates.
        warmup_steps: steps of the first warm-up.
        total_steps: where the cosine ends; later steps stay at `minimum`.
        rewarmup_start, rewarmup_steps: from that step on the rate is ramped up again linearly to where the cosine
            stands; 0 steps for no second warm-up.
    """

    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    rewarmup_start: int = 0
    rewarmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step with the 0-based index `step`."""
        if step < self.warmup_steps:
            rate = self.peak * (step + 1) / self.warmup_steps
        else:
            progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
            rate = self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        since = step - self.rewarmup_start
        if 0 <= since < self.rewarmup_steps:
            rate *= (since + 1) / self.rewarmup_steps
        return rate

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
