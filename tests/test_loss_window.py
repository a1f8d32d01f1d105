"""The window of losses against numpy: its statistics, what a skipped step leaves of it, and its way through JSON."""

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from colonnade.optim.loss_window import LossWindow
from colonnade.telemetry.continuity import loss_continuity


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def decisions(losses: list[float], size: int, sigma: float, *, skips: bool) -> list[bool]:
    """Which of `losses` are spikes, by numpy over a plain list."""
    kept: list[float] = []
    spikes = []
    for loss in losses:
        window = np.array(kept[-size:], np.float64)
        spike = len(window) * 2 >= size and loss > window.mean() + sigma * window.std()
        spikes.append(bool(spike))
        if math.isfinite(loss) and not (spike and skips):
            kept.append(loss)
    return spikes


@pytest.mark.parametrize("skips", [True, False], ids=["skip", "warn"])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 4.0])
def test_spikes_are_numpys(sigma: float, skips: bool) -> None:
    generator = np.random.default_rng(3)
    losses = (5 * np.exp(-np.arange(300) / 100) + generator.standard_normal(300)).astype(np.float32)
    losses[[40, 41, 150]] += 12
    losses[[60, 200]] = np.nan, np.inf
    window = LossWindow(20, torch.device("cpu"))
    found = []
    for loss in losses.tolist():
        limit = window.statistics(sigma).limit
        is_spike = bool(scalar(loss) > limit)
        found.append(is_spike)
        window.append(scalar(loss), scalar(float(not math.isfinite(loss) or (is_spike and skips))))
    expected = decisions(losses.tolist(), 20, sigma, skips=skips)
    assert found == expected
    assert 3 <= sum(expected) < 200


def test_statistics_are_numpys_and_come_with_half_a_window() -> None:
    window = LossWindow(10, torch.device("cpu"))
    losses = np.array([3.25, 2.5, 2.75, 1.125, 9.5], np.float32)
    for number, loss in enumerate(losses.tolist()):
        assert math.isnan(window.statistics(1.0).limit), number
        window.append(scalar(loss), scalar(0.0))
    mean, deviation, limit = (float(value) for value in window.statistics(3.0))
    assert mean == pytest.approx(losses.astype(np.float64).mean(), rel=1e-15)
    assert deviation == pytest.approx(losses.astype(np.float64).std(), rel=1e-15)
    assert limit == mean + deviation * 3.0


def test_a_skipped_loss_leaves_the_window() -> None:
    window = LossWindow(10, torch.device("cpu"), [1.0, 2.0])
    for loss in (math.nan, math.inf, 7.0):
        window.append(scalar(loss), scalar(1.0))
    assert window.values() == [1.0, 2.0]
    for loss in range(12):
        window.append(scalar(loss), scalar(0.0))
    assert window.values() == [float(loss) for loss in range(2, 12)]


def bits(window: LossWindow) -> list[str]:
    return [float(value).hex() for value in window.statistics(4.0)]


@pytest.mark.parametrize("stop", [3, 10, 77])
def test_stopped_and_gone_on_its_statistics_are_the_same_bits(stop: int) -> None:
    losses = np.random.default_rng(0).standard_normal(137).astype(np.float32).tolist()
    whole = LossWindow(25, torch.device("cpu"))
    for loss in losses[:stop]:
        whole.append(scalar(loss), scalar(0.0))
    second = LossWindow(25, torch.device("cpu"), json.loads(json.dumps(whole.values())))
    for loss in losses[stop:]:
        assert bits(second) == bits(whole)
        whole.append(scalar(loss), scalar(0.0))
        second.append(scalar(loss), scalar(0.0))
    assert second.values() == whole.values() == losses[-25:]
    assert bits(second) == bits(whole)


def test_a_window_of_another_size_takes_the_newest() -> None:
    assert LossWindow(10, torch.device("cpu"), range(30)).values() == list(range(20, 30))
    assert LossWindow(40, torch.device("cpu"), range(30)).values() == list(range(30))


def curve(kind: str, steps: int = 200) -> npt.NDArray[np.float64]:
    """Losses of which the window is 100 steps and the rest is what follows."""
    step = np.arange(steps, dtype=np.float64)
    noise = 0.05 * np.random.default_rng(1).standard_normal(steps)
    means = {"flat": 3.0 + 0 * step, "line": 9 - 0.03 * step, "falling": 6 * np.exp(-step / 80) + 1}
    curve: npt.NDArray[np.float64] = means[kind] + noise
    return curve


@pytest.mark.parametrize("kind", ["flat", "line", "falling"])
def test_a_loss_that_goes_on_is_told_with_its_figures(kind: str) -> None:
    losses = curve(kind)
    line = loss_continuity(losses[:100].tolist(), losses[100:105].tolist())
    fit = np.polynomial.Polynomial.fit(np.arange(100), losses[:100], 1)
    spread = np.sqrt(np.square(losses[:100] - fit(np.arange(100))).sum() / 98)
    found, recent = losses[100:105].mean(), losses[75:100].mean()
    assert line == f"loss continues at {found:.4f} (recent mean {recent:.4f}, spread {spread:.4f})"


@pytest.mark.parametrize("kind", ["flat", "line", "falling"])
@pytest.mark.parametrize("jump", [0.6, -0.6])
def test_a_loss_that_jumps_is_a_warning(kind: str, jump: float) -> None:
    losses = curve(kind)
    fit = np.polynomial.Polynomial.fit(np.arange(100), losses[:100], 1)
    spread = np.sqrt(np.square(losses[:100] - fit(np.arange(100))).sum() / 98)
    distance = jump * (1 + 10 * spread)
    if kind == "line":
        distance *= 3  # a loss that has been falling may level off, or be where it was a while ago
    line = loss_continuity(losses[:100].tolist(), (losses[100:105] + distance).tolist())
    assert line is not None
    assert line.startswith("warning: loss does not continue where it was: ")


def test_a_smooth_curve_allows_for_rounding_and_a_short_window_says_nothing() -> None:
    window = [2.0 - step * 1e-4 for step in range(100)]
    assert "continues at 1.9910" in str(loss_continuity(window, [1.991] * 5))
    assert "warning" in str(loss_continuity(window, [2.03] * 5))
    assert loss_continuity(window[:9], [1.99] * 5) is None
    assert loss_continuity([], [1.99] * 5) is None
