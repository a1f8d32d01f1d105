"""Learning-rate schedules as pure functions of the step, so that a resumed run has no schedule state to restore."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from colonnade.run_settings import RunSettings


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one of three schedules.

    - `cosine`: from `peak` to `minimum` at the horizon (SGDR, arXiv:1608.03983, without restarts).
    - `wsd`: warm-up, stable, decay (MiniCPM, arXiv:2404.06395, section 4): at `peak` until `decay_steps` before the
      horizon, then down to `minimum` at the horizon. Before the decay, the rate does not depend on the horizon.
    - `constant`: at `peak`.

    With `cosine` and `wsd`, the rate stays at `minimum` from the horizon on.

    Attributes:
        peak, minimum: learning rates.
        warmup_steps: steps of the first warm-up.
        horizon: the step at which the rate reaches `minimum`; ignored by `constant`.
        kind: `cosine`, `wsd` or `constant`.
        decay_steps, decay_shape: length and shape (`decay_factor`) of the decay of `wsd`.
        rewarmup_start, rewarmup_steps: from that step on, for that many steps, the rate ramps up again linearly to the
            schedule's value; 0 steps for no second warm-up.
    """

    peak: float
    minimum: float
    warmup_steps: int
    horizon: int
    kind: str = "cosine"
    decay_steps: int = 0
    decay_shape: str = "1-sqrt"
    rewarmup_start: int = 0
    rewarmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step with the 0-based index `step`."""
        if step < self.warmup_steps:
            rate = self.peak * (step + 1) / self.warmup_steps
        elif self.kind == "constant":
            rate = self.peak
        elif self.kind == "wsd":
            rate = self._stable_then_decay(step)
        else:
            progress = min(1.0, (step - self.warmup_steps) / max(1, self.horizon - self.warmup_steps))
            rate = self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        since = step - self.rewarmup_start
        if 0 <= since < self.rewarmup_steps:
            rate *= (since + 1) / self.rewarmup_steps
        return rate

    def _stable_then_decay(self, step: int) -> float:
        decayed = step - (self.horizon - self.decay_steps)
        if decayed < 0:
            return self.peak
        progress = min(1.0, decayed / self.decay_steps) if self.decay_steps else 1.0
        return self.minimum + (self.peak - self.minimum) * decay_factor(self.decay_shape, progress)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decay_factor(shape: str, progress: float) -> float:
    """The remaining fraction of the way from the peak to the minimum: 1 at `progress` 0, 0 at `progress` 1.

    `1-sqrt` is from "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (arXiv:2405.18392),
    which found it better than a linear decay.
    """
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - math.sqrt(progress)


def schedule_of(settings: RunSettings, rewarmup_start: int = 0, rewarmup_steps: int = 0) -> Schedule:
    """The schedule that the settings select. Defaults: a minimum of peak / 10, a decay over a tenth of the horizon."""
    horizon = settings.schedule_steps or settings.total_steps
    minimum = settings.learning_rate / 10 if settings.min_learning_rate is None else settings.min_learning_rate
    decay = 0
    if settings.schedule == "wsd":
        decay = settings.decay_steps or min(max(1, horizon // 10), max(0, horizon - settings.warmup_steps))
    return Schedule(
        peak=settings.learning_rate,
        minimum=settings.learning_rate if settings.schedule == "constant" else minimum,
        warmup_steps=settings.warmup_steps,
        horizon=horizon,
        kind=settings.schedule,
        decay_steps=decay,
        decay_shape=settings.decay_shape,
        rewarmup_start=rewarmup_start,
        rewarmup_steps=rewarmup_steps,
    )
