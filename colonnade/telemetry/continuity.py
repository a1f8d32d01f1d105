"""Checks that the loss continues where it was: compares the first steps after a restart with the last before it."""

from __future__ import annotations

from collections.abc import Sequence

FIRST_STEPS = 5
# A line fitted to fewer losses says little about their spread.
_LEAST_WINDOW = 10
_SIGMAS = 4.0
# Losses of large batches may lie on an almost smooth curve; a run on other ranks still differs from it by rounding.
_LEAST_SPREAD = 0.002


def loss_continuity(window: Sequence[float], first: Sequence[float]) -> str | None:
    """One line that says whether the mean of the `first` losses after a restart fits those in the `window` before it.

    The spread is the standard deviation of the window's losses around the least-squares line through them, at least
    0.2% of the loss. The mean must lie within four spreads of the line's extrapolation, or of the mean of the last
    quarter of the window, or between the two: a falling loss may keep falling, or level off. Returns None if the window
    is too short to tell.
    """
    import numpy as np

    if len(window) < _LEAST_WINDOW or not first:
        return None
    losses = np.asarray(window, np.float64)
    steps = np.arange(len(losses), dtype=np.float64)
    slope, start = np.polyfit(steps, losses, 1)
    recent = float(losses[-max(5, len(losses) // 4) :].mean())
    residual = float(np.sqrt(np.square(losses - start - slope * steps).sum() / (len(losses) - 2)))
    spread = max(residual, _LEAST_SPREAD * abs(recent))
    ahead = float(start + slope * (len(losses) + (len(first) - 1) / 2))
    found = float(np.mean(first))
    figures = f"{found:.4f} (recent mean {recent:.4f}, spread {spread:.4f})"
    if min(ahead, recent) - _SIGMAS * spread <= found <= max(ahead, recent) + _SIGMAS * spread:
        return f"loss continues at {figures}"
    return (
        f"warning: loss does not continue where it was: {figures}, the mean of the first {len(first)} steps is more "
        f"than {_SIGMAS:g} spreads away; see what has changed since the checkpoint"
    )
