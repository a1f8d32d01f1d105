"""One chart as inline SVG for a page: drawn by matplotlib, coloured by the page's style sheet.

Colours are put in as marks that no drawing has by itself, and replaced: ink by `currentColor`, the curve of number i by
the variable `--curve-i`. So a page can be light or dark.
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
# More points than pixels tell nothing: of each stretch the lowest and the highest stay.
MOST_POINTS = 1600
# Points (1/72 inch) that a page of 400 to 1400 pixels shows at 0.7 to 1.2 times their size.
_WIDTH, _HEIGHT = 400, 215


@dataclass(frozen=True)
class Curve:
    """What is drawn of one series.

    Attributes:
        steps, values: of its points; a NaN leaves a gap.
        color: number of the page's colour, from 0.
        style: "line", "faint" (below another one), "dashed", or "dots" (a line with its points).
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
    """An `<svg>` element of the curves over their steps.

    Args:
        restarts: (step, colour) of vertical dotted lines; None for the colour of the text.
        from_zero: the lower end of the axis is 0.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Text stays text: small, and in the font of the page.
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
    """At most `MOST_POINTS` of the points: the lowest and the highest of each stretch, in their order."""
    if len(steps) <= MOST_POINTS:
        return list(steps), list(values)
    array = np.asarray(values, np.float64)
    kept: list[int] = []
    for part in np.array_split(np.arange(len(array)), MOST_POINTS // 2):
        finite = part[np.isfinite(array[part])]
        # A stretch of nothing but NaN stays a gap.
        ends = {finite[array[finite].argmin()], finite[array[finite].argmax()]} if len(finite) else {part[0]}
        kept += sorted(int(end) for end in ends)
    return [steps[index] for index in kept], [values[index] for index in kept]


def _tick(value: float, _position: float = 0) -> str:
    """A number at an axis: 0.00024, 1.6, 412k."""
    from matplotlib.ticker import EngFormatter

    return f"{value:.4g}" if abs(value) < 10_000 else EngFormatter(sep="")(value)


def _mark(color: int) -> str:
    return f"#0a0b{color % CURVE_COLORS:02x}"


def _for_page(text: str) -> str:
    """The element alone, without a size of its own and without names that the next chart would repeat."""
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
