"""The losses of the last steps that were taken, and when a new loss counts as a spike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class WindowStatistics(NamedTuple):
    """Mean and (population) standard deviation of a window, and the limit above which a loss is a spike.

    float64 scalars on the device; `limit` is NaN, which no loss exceeds, while the window is less than half full.
    """

    mean: Tensor
    deviation: Tensor
    limit: Tensor


class LossWindow:
    """The last `size` losses, in the order of their steps, on the device: `append` and `statistics` need no host sync.

    Skipped steps leave it unchanged. Its statistics depend only on its current values, not on earlier ones, so a
    resumed run makes the same decisions.
    """

    def __init__(self, size: int, device: torch.device, values: Sequence[float] = ()) -> None:
        kept = list(values)[-size:]
        # Unfilled entries are NaN, which no stored loss is: a step with a loss that is not finite is skipped.
        padded = [float("nan")] * (size - len(kept)) + kept
        self._values = torch.tensor(padded, dtype=torch.float64, device=device)

    def append(self, loss: Tensor, skipped: Tensor) -> None:
        """Add the loss of a step, unless the step was skipped. Both are scalars on the device."""
        shifted = torch.cat([self._values[1:], loss.detach().double().reshape(1)])
        self._values = torch.where(skipped > 0, self._values, shifted)

    def statistics(self, sigma: float) -> WindowStatistics:
        """Statistics of the window, with a limit `sigma` standard deviations above the mean."""
        filled = ~torch.isnan(self._values)
        count = filled.sum()
        mean = torch.where(filled, self._values, 0.0).sum() / count
        deviation = (torch.where(filled, self._values - mean, 0.0).square().sum() / count).sqrt()
        is_enough = 2 * count >= len(self._values)
        return WindowStatistics(mean, deviation, torch.where(is_enough, mean + deviation * sigma, torch.nan))

    def values(self) -> list[float]:
        """The losses, the oldest first. Waits for the device (a host sync)."""
        values: list[float] = self._values[~torch.isnan(self._values)].tolist()
        return values
