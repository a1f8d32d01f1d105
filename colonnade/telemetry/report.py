"""`report.html`: one run, or several side by side, as a self-contained page that needs no network.

    python -m colonnade.telemetry.report RUN [RUN...] [--output FILE]

Everything is read from `metrics.jsonl`, except whether the run has ended: COMPLETE.json or STOPPED.json beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from colonnade.errors import RunError, UsageError
from colonnade.files import replace_file
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch
from colonnade.telemetry.charts import CURVE_COLORS, Curve, chart
from colonnade.telemetry.metrics import perplexity_of, read_metrics, restarts, series
from colonnade.telemetry.plots import SMOOTH_FROM_POINTS, smooth
from colonnade.telemetry.report_page import PAGE

METRICS_NAME, REPORT_NAME = "metrics.jsonl", "report.html"
# The page shows samples of this many steps, and only counts the earlier ones.
SAMPLED_STEPS = 20


@dataclass(frozen=True)
class History:
    """What a run has recorded.

    Attributes:
        name: name of the run's folder.
        rows: the rows of `metrics.jsonl`.
        end: how the run ended, from COMPLETE.json or STOPPED.json; empty if neither can be read.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    end: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        return series(self.rows, key)

    @cached_property
    def restarts(self) -> list[int]:
        return restarts(self.rows)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("started")]

    def last(self, key: str) -> Any:
        """The last value of `key` that is not None."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    @cached_property
    def shares(self) -> list[str]:
        """The keys `data_share/<corpus>` of the corpora of a mixture, sorted."""
        return sorted({key for row in self.rows for key in row if key.startswith("data_share/")})


@dataclass(frozen=True)
class Panel:
    """A chart on the page with its legend, whose entries are (label, colour or None, style)."""

    title: str
    svg: str
    legend: Sequence[tuple[str, int | None, str]]


def read_history(run: Path) -> History:
    """Read a run from its folder or its metrics file.

    Raises:
        UsageError: there is no such run, or its metrics cannot be read.
    """
    file = run / METRICS_NAME if run.is_dir() else run
    if not file.exists():
        raise UsageError(f"{run} holds no {METRICS_NAME}; give a run's folder")
    end = {}
    for name in ("COMPLETE.json", "STOPPED.json"):
        try:
            end = {"how": name.partition(".")[0].lower(), **json.loads((file.parent / name).read_text())}
        except (OSError, ValueError, TypeError):  # missing, or not a readable JSON object
            continue
        break
    return History(file.resolve().parent.name, read_metrics(file), end)


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write the page of these runs to `output`, atomically by rename.

    Raises:
        UsageError: a run has no readable metrics.
        RunError: the page cannot be written.
    """
    page = report_page([read_history(run) for run in runs])
    try:
        replace_file(output, page)
    except OSError as error:
        raise RunError(f"cannot write the report to {output}: {error.strerror or error}") from error


def report_page(histories: Sequence[History]) -> str:
    """The page, as HTML."""
    # Two folders may have the same name.
    names = [history.name for history in histories]
    labels = [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]
    return PAGE.render(
        labels=labels,
        facts=_facts_table(histories),
        panels=_panels(histories, labels),
        samples=[(label, *_samples(history)) for label, history in zip(labels, histories, strict=True)],
        curve_colors=CURVE_COLORS,
        missing=_missing(histories),
    )


# ------------------------------------------------------------------------------------------------------------- facts


def _number(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _time(value: Any) -> str | None:
    return None if value is None else str(value)[:19].replace("T", " ") + " UTC"


def _ranks(start: dict[str, Any]) -> str | None:
    if start.get("tp") is None or start.get("dp") is None:
        return None
    return f"{start['tp'] * start['dp']} (tp {start['tp']} × dp {start['dp']}) on {start.get('device')}"


def _state(history: History) -> str:
    if not history.end:
        return "under way, or failed"
    reason = history.end.get("reason")
    return f"{history.end['how']} at step {history.end.get('step')}" + (f" ({reason})" if reason else "")


def _loss(value: Any) -> str | None:
    return None if value is None else f"{value:.4f} (perplexity {perplexity_of(value):.4g})"


# What the page says of a run: (name, value from its history and its newest start).
_FACTS: tuple[tuple[str, Callable[[History, dict[str, Any]], Any]], ...] = (
    ("state", lambda history, _: _state(history)),
    ("parameters", lambda _, start: _number(start.get("parameters"))),
    ("step", lambda history, _: _number(history.last("step"))),
    ("steps in all", lambda _, start: _number(start.get("total_steps"))),
    ("tokens", lambda history, _: _number(history.last("tokens_seen"))),
    ("tokens a step", lambda _, start: _number(start.get("tokens_per_step"))),
    ("precision", lambda _, start: start.get("precision")),
    ("ranks", lambda _, start: _ranks(start)),
    ("code", lambda _, start: start.get("code")),
    ("started", lambda history, _: _time(history.starts[0].get("time")) if history.starts else None),
    ("last row", lambda history, _: _time(history.last("time"))),
    ("restarts at steps", lambda history, _: ", ".join(map(str, history.restarts)) or "none"),
    ("training loss", lambda history, _: _loss(history.last("loss"))),
    ("validation loss", lambda history, _: _loss(history.last("validation_loss"))),
    ("tokens a second", lambda history, _: _number(history.last("tokens_per_second"))),
    ("skipped steps", lambda history, _: _number(history.last("skipped_steps"))),
    ("tokens read again", lambda history, _: _number(history.last("data_tokens_repeated"))),
)


def _facts_table(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Rows of (fact, its value in each run); facts unknown for every run are left out."""
    table = []
    for name, read in _FACTS:
        values = [read(history, history.starts[-1] if history.starts else {}) for history in histories]
        if any(value is not None for value in values):
            table.append((name, ["–" if value is None else str(value) for value in values]))
    return table


# ------------------------------------------------------------------------------------------------------------ charts

_Entry = tuple[str, int | None, str]
_SIMPLE = (
    ("Learning rate", "learning_rate"),
    ("Gradient norm", "grad_norm"),
    ("Tokens a second", "tokens_per_second"),
    ("Utilisation (model FLOPs / peak)", "model_flops_utilization"),
)
# From this many points on, the later half of the loss gets a second chart: the early fall hides recent changes.
_ZOOM_FROM_POINTS = 80


def _panels(histories: Sequence[History], labels: Sequence[str]) -> list[Panel]:
    alone = len(histories) == 1
    marks: list[tuple[int, int | None]] = [
        (step, None if alone else index) for index, history in enumerate(histories) for step in history.restarts
    ]
    restarted: list[_Entry] = [("restart", None, "dotted")] if marks else []
    panels = []
    curves, legend = _losses(histories, labels)
    if curves:
        panels.append(Panel("Loss (nats a token)", chart(curves, marks), [*legend, *restarted]))
    if max((len(curve.steps) for curve in curves), default=0) >= _ZOOM_FROM_POINTS:
        half = max(curve.steps[-1] for curve in curves) // 2
        late = [_after(half, curve) for curve in curves]
        late_marks = [mark for mark in marks if mark[0] > half]
        panels.append(Panel(f"Loss from step {half:,} on", chart(late, late_marks), [*legend, *restarted]))
    for title, key in _SIMPLE:
        curves, legend = [], []
        for index, (history, label) in enumerate(zip(histories, labels, strict=True)):
            if history.last(key) is not None:
                points = history.series(key)
                # The learning-rate schedule has no noise, and smoothing would round off its corners.
                is_smooth = key == "learning_rate"
                curves += [Curve(*points, index)] if is_smooth else _smoothed(*points, index, alone=alone)
                legend.append((label, index, "line"))
        if curves:
            legend = [] if alone else legend
            panels.append(Panel(title, chart(curves, marks, from_zero=True), [*legend, *restarted]))
    curves, legend = _data_shares(histories, labels)
    if curves:
        panels.append(Panel("Data: share of the tokens so far", chart(curves, marks), [*legend, *restarted]))
    return panels


def _smoothed(steps: Sequence[int], values: Sequence[float], color: int, *, alone: bool) -> list[Curve]:
    """The curves of a series: smoothed if it is long, with the raw curve behind if there is only one run."""
    if len(steps) < SMOOTH_FROM_POINTS:
        return [Curve(steps, values, color)]
    raw = [Curve(steps, values, color, "faint")] if alone else []
    return [*raw, Curve(steps, smooth(values), color)]


def _after(step: int, curve: Curve) -> Curve:
    points = [point for point in zip(curve.steps, curve.values, strict=True) if point[0] >= step]
    return replace(curve, steps=[at for at, _ in points], values=[value for _, value in points])


def _losses(histories: Sequence[History], labels: Sequence[str]) -> tuple[list[Curve], list[_Entry]]:
    """Training and validation losses: in two colours for a single run, in one colour per run for several."""
    curves: list[Curve] = []
    legend: list[_Entry] = []
    alone = len(histories) == 1
    for index, (history, label) in enumerate(zip(histories, labels, strict=True)):
        of_run = "" if alone else f"{label}: "
        if history.last("loss") is not None:
            drawn = _smoothed(*history.series("loss"), index, alone=alone)
            curves += drawn
            if len(drawn) > 1:
                legend.append(("training", index, "faint"))
            is_smooth = len(drawn[-1].steps) >= SMOOTH_FROM_POINTS
            legend.append((f"{of_run}training{', smoothed' if is_smooth else ''}", index, "line"))
        if history.last("validation_loss") is not None:
            color = 1 if alone else index
            curves.append(Curve(*history.series("validation_loss"), color, "dots"))
            legend.append((f"{of_run}validation", color, "dots"))
    return curves, legend


def _data_shares(histories: Sequence[History], labels: Sequence[str]) -> tuple[list[Curve], list[_Entry]]:
    """One line per corpus and run, each in its own colour as long as there are enough; then dashed."""
    curves: list[Curve] = []
    legend: list[_Entry] = []
    for history, label in zip(histories, labels, strict=True):
        for key in history.shares:
            corpus = key.partition("/")[2]
            color = len(curves) % CURVE_COLORS
            style = "line" if len(curves) < CURVE_COLORS else "dashed"
            curves.append(Curve(*history.series(key), color, style))
            legend.append((corpus if len(histories) == 1 else f"{label}: {corpus}", color, style))
    return curves, legend


def _missing(histories: Sequence[History]) -> list[str]:
    """Lines that say which charts are missing, and why."""
    lines = []
    if not any(history.series("loss")[0] for history in histories):
        lines.append("No step has been logged yet.")
    elif all(history.last("model_flops_utilization") is None for history in histories):
        lines.append("No utilisation: the peak of this device is not known.")
    if not any(history.shares for history in histories):
        lines.append("No data shares: the data are one corpus.")
    return lines


# ----------------------------------------------------------------------------------------------------------- samples


def _samples(history: History) -> tuple[list[tuple[int, list[dict[str, str]]]], int]:
    """(step, samples) of the last steps with samples, newest first, and how many earlier steps are left out."""
    rows = [(int(row["step"]), list(row["samples"])) for row in history.rows if row.get("samples")]
    return rows[::-1][:SAMPLED_STEPS], max(0, len(rows) - SAMPLED_STEPS)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m colonnade.telemetry.report",
        description="Write a page of a run, or of several beside each other.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", metavar="FILE", help=f"the page (default {REPORT_NAME} in the folder of one run)")
    given = parser.parse(arguments)
    runs = [Path(run) for run in given["runs"]]
    output = Path(given["output"]) if given["output"] else (runs[0] if len(runs) == 1 else Path()) / REPORT_NAME
    if given["output"] is None and len(runs) == 1 and runs[0].is_file():
        output = runs[0].with_name(REPORT_NAME)
    write_report(runs, output)
    print(output)


if __name__ == "__main__":
    launch(main)
