"""`loss.png` and `report.html`: the report is also drawn during a run, both at its end."""

from __future__ import annotations

import time
from pathlib import Path

from colonnade.telemetry.plots import plot_loss
from colonnade.telemetry.report import METRICS_NAME, REPORT_NAME, write_report
from colonnade.telemetry.sinks import Row

PLOT_NAME = "loss.png"
# Drawing takes about one core-second that the training could have used.
REPORT_SECONDS = 300.0


class Pictures:
    """The pictures in a run's folder, made from its `metrics.jsonl`.

    `report.html` is redrawn after a validation, at most every five minutes; both are drawn at the end.
    """

    name = "loss.png and report.html"

    def __init__(self, directory: Path, unigram_entropy: float | None) -> None:
        self._directory, self._unigram_entropy = directory, unigram_entropy
        self._drawn = time.monotonic()

    def open(self, step: int) -> None:
        """No-op: a picture is always drawn from the whole record."""

    def write(self, row: Row) -> None:
        if "validation_loss" in row and time.monotonic() - self._drawn >= REPORT_SECONDS:
            write_report([self._directory], self._directory / REPORT_NAME)
            self._drawn = time.monotonic()

    def close(self, failed: bool) -> None:
        # A failed run exits at once; `python -m colonnade.telemetry.report` can draw its report later.
        if failed:
            return
        plot_loss(self._directory / METRICS_NAME, self._directory / PLOT_NAME, unigram_entropy=self._unigram_entropy)
        write_report([self._directory], self._directory / REPORT_NAME)
