"""One chart as inline SVG for a page: drawn by matplotlib, coloured by the page's style sheet.

Charts are drawn in placeholder colours that matplotlib does not use otherwise, which are then replaced: the text colour
by `currentColor`, that of curve i by the CSS variable `--curve-i`. This lets a page be light or dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_INK = "#010203"
CURVE_COLORS = 8
# More points than pixels add nothing: only the lowest and the highest point of each stretch are kept.
MOST_POINTS = 1600
# In points (1/72 inch); pages that are 400 to 1400 pixels wide show the chart at 0.7 to 1.2 times this size.
_WIDTH, _HEIGHT = 400, 215


@dataclass(frozen=True)
class Curve:
    """One series to draw.

    Attributes:
        steps, values: the points; a NaN leaves a gap.
        color: index of one of the page's curve colours, from 0.
        style: "line", "faint" (a line behind another one), "dashed", or "dots" (a line with markers at its points).
    """

    steps: Sequence[int]
    values: Sequence[float]
    color: int
    style: str = "line"


_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "faint": {"linewidth": 0.8, "alpha": 0.35},
    "dashed": {"linewidth": 1.4, "linestyle": (0, (4, 2))},
    "dots": {"linewidth": 1.3, "marker": "o", "markersize": 3},
}


def chart(curves: Sequence[Curve], restarts: Sequence[tuple[int, int | None]] = (), *, from_zero: bool = False) -> str:
    """An `<svg>` element with the curves plotted over steps.

    Args:
        restarts: (step, colour) of vertical dotted lines; None for the text colour.
        from_zero: start the value axis at 0.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # fonttype "none" keeps text as text instead of paths: smaller, and shown in the page's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        axes = figure.add_axes((0.14, 0.13, 0.84, 0.83))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for step, color in restarts:
            shade = _INK if color is None else _mark(color)
            axes.axvline(step, color=shade, linestyle=":", linewidth=1.2, alpha=0.8, zorder=1)
        for curve in curves:
            steps, values = thinned(curve.steps, curve.values)
            style = dict(_STYLES[curve.style])
            if len(steps) == 1:
                style["marker"] = "o"
            axes.plot(steps, values, color=_mark(curve.color), **style)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_tick)
        axes.tick_params(colors=_INK, length=3)
        axes.grid(color=_INK, alpha=0.14, linewidth=0.7)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
            spine.set_alpha(0.5)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(text.getvalue())


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `MOST_POINTS` of the points: the lowest and the highest of each stretch, in order."""
    if len(steps) <= MOST_POINTS:
        return list(steps), list(values)
    array = np.asarray(values, np.float64)
    kept: list[int] = []
    for part in np.array_split(np.arange(len(array)), MOST_POINTS // 2):
        finite = part[np.isfinite(array[part])]
        # A stretch of only non-finite values remains a gap.
        ends = {finite[array[finite].argmin()], finite[array[finite].argmax()]} if len(finite) else {part[0]}
        kept += sorted(int(end) for end in ends)
    return [steps[index] for index in kept], [values[index] for index in kept]


def _tick(value: float, _position: float = 0) -> str:
    """The label of an axis tick: 0.00024, 1.6, 412k."""
    from matplotlib.ticker import EngFormatter

    return f"{value:.4g}" if abs(value) < 10_000 else EngFormatter(sep="")(value)


def _mark(color: int) -> str:
    return f"#0a0b{color % CURVE_COLORS:02x}"


def _for_page(text: str) -> str:
    """Only the `<svg>` element, without its fixed size and the ids that other charts on the page would repeat."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z]+\d?[a-z]?_\d+"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([^;\"]*?)'[^\"]*?sans-serif", r"font: \1sans-serif", svg)
    return re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--curve-{int(found[1], 16)})", svg).replace(
        _INK, "currentColor"
    )
