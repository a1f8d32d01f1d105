"""Plots of a run, drawn from its metrics file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.errors import RunError
from colonnade.files import replace_file
from colonnade.telemetry.metrics import perplexity_of, read_metrics, restarts, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# With fewer points, the raw curve is clear enough without smoothing.
SMOOTH_FROM_POINTS = 40
# How far the smoothing window reaches to each side, as a fraction of the points.
SMOOTH_REACH = 1 / 50

TRAIN_COLOR, VALIDATION_COLOR, RATE_COLOR, REFERENCE_COLOR = "#1f5fa8", "#d1495b", "#4d7c43", "#666666"


def plot_loss(metrics_path: str | Path, output_png: str | Path, *, unigram_entropy: float | None = None) -> bool:
    """Plot the losses and learning rate in `metrics_path` over steps, and atomically replace `output_png`.

    Losses and `unigram_entropy` (the lower bound for models that ignore context) are in nats per token. Restarts are
    dotted vertical lines. Returns False, and draws nothing, if the file has no finite loss yet. Rows whose loss is not
    finite leave a gap.

    Raises UsageError if the metrics cannot be read and RunError if the picture cannot be written.
    """
    rows = read_metrics(metrics_path)
    train = series(rows, "loss")
    validation = series(rows, "validation_loss")
    if not any(math.isfinite(value) for _, values in (train, validation) for value in values):
        return False

    # Figure without pyplot needs no window system, has no global state, and always uses the Agg canvas.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6.5), dpi=130, layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for axes in (loss_axes, rate_axes):
        for number, step in enumerate(restarts(rows)):
            label = None if number else "restart"
            axes.axvline(step, color=REFERENCE_COLOR, linestyle=":", linewidth=1.0, label=label)
    _draw_losses(loss_axes, train, validation, unigram_entropy)
    _draw_learning_rate(rate_axes, series(rows, "learning_rate"))
    rate_axes.set_xlabel("optimizer step")
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    output = Path(output_png)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, picture.getvalue())
    except OSError as error:
        raise RunError(f"cannot write the plot to {output}: {error.strerror or error}") from error
    return True


def _draw_losses(
    axes: Axes,
    train: tuple[list[int], list[float]],
    validation: tuple[list[int], list[float]],
    unigram_entropy: float | None,
) -> None:
    steps, losses = train
    if len(steps) >= SMOOTH_FROM_POINTS:
        axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.3, linewidth=0.9, label="training")
        axes.plot(steps, smooth(losses), color=TRAIN_COLOR, linewidth=1.8, label="training, smoothed")
    elif steps:
        axes.plot(steps, losses, color=TRAIN_COLOR, linewidth=1.5, marker=".", label="training")
    if validation[0]:
        axes.plot(*validation, color=VALIDATION_COLOR, linewidth=1.5, marker="o", markersize=4, label="validation")
    if unigram_entropy is not None:
        label = f"unigram entropy of the validation tokens ({unigram_entropy:.2f})"
        axes.axhline(unigram_entropy, color=REFERENCE_COLOR, linestyle="--", linewidth=1.2, label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    axes.set_title(_title(train, validation), loc="left", fontsize="medium")


def _draw_learning_rate(axes: Axes, rates: tuple[list[int], list[float]]) -> None:
    marker = "." if len(rates[0]) < SMOOTH_FROM_POINTS else None
    axes.plot(*rates, color=RATE_COLOR, linewidth=1.5, marker=marker, label="learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylabel("learning rate")


def _title(train: tuple[list[int], list[float]], validation: tuple[list[int], list[float]]) -> str:
    """The last losses with their perplexities, for readers who want the number rather than the curve."""
    parts = []
    for name, (steps, losses) in (("training", train), ("validation", validation)):
        if steps and math.isfinite(losses[-1]):
            perplexity = f"{perplexity_of(losses[-1]):.4g}"
            parts.append(f"{name} loss {losses[-1]:.3f} (perplexity {perplexity}) at step {steps[-1]}")
    return " · ".join(parts)


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over `SMOOTH_REACH` of the points on each side; a NaN stays NaN and enters no average.

    Centred, because an average of past values alone lies above a falling loss. At the start, where the loss is steep,
    the window shrinks on both sides; at the end it is cut off at the last point.
    """
    import numpy as np

    losses = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, losses, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(losses))
    reach = np.minimum(index, max(1, round(len(losses) * SMOOTH_REACH)))
    first, last = index - reach, np.minimum(index + reach + 1, len(losses))
    averages = np.full(len(losses), math.nan)
    np.divide(sums[last] - sums[first], counts[last] - counts[first], out=averages, where=finite)
    return [float(average) for average in averages]
