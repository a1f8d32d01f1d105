"""`metrics.csv`: the run as a table with one row per step, for spreadsheets."""

from __future__ import annotations

import csv
import io
import math
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from colonnade.files import replace_file
from colonnade.telemetry.sinks import Row

COLUMNS = (
    *("step", "time", "loss", "perplexity", "validation_loss", "validation_perplexity", "learning_rate", "grad_norm"),
    *("tokens_seen", "tokens_per_second", "model_flops_utilization", "memory_gib", "data_wait_fraction", "epoch"),
    "skipped_steps",
)
_OWN = set(COLUMNS) - {"step", "time", "tokens_seen"}


class CsvTable:
    """One row per step that was logged or validated; a validation goes into the row of its step.

    UTF-8, comma-separated, with a header; lines end in a newline. Unknown or non-finite values are empty cells; `time`
    is UTC in a format that spreadsheets read. A row is in the file when `write` returns. `open` drops the rows of later
    steps, a partial last line, and unknown columns.

    Raises OSError.
    """

    name = "metrics.csv"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._last: dict[str, Any] = {}
        self._last_at = 0

    def open(self, step: int) -> None:
        kept = self._rows_up_to(step)
        replace_file(self._path, "".join(map(_line, [dict(zip(COLUMNS, COLUMNS, strict=True)), *kept])))
        self._file = open(self._path, "r+b")  # noqa: SIM115 - closed by close()
        self._last_at = self._file.seek(0, io.SEEK_END)
        # This step's validation may still follow, and is merged into this row.
        if kept:
            self._last = dict(kept[-1])
            self._last_at -= len(_line(self._last).encode())

    def _rows_up_to(self, step: int) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole)))
        return [row for row in rows if (row.get("step") or "").isdecimal() and int(row["step"]) <= step]

    def write(self, row: Row) -> None:
        assert self._file is not None
        if not _OWN & row.keys():
            return
        cells = {name: _cell(name, row[name]) for name in COLUMNS if name in row}
        if cells["step"] == self._last.get("step"):
            cells = {**self._last, **cells}
        else:
            self._last_at = self._file.seek(0, io.SEEK_END)
        self._file.seek(self._last_at)
        self._file.write(_line(cells).encode())
        self._file.truncate()
        self._file.flush()
        self._last = cells

    def close(self, failed: bool) -> None:
        if self._file is not None:
            self._file.close()


def _cell(name: str, value: Any) -> str:
    if name == "time":
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M:%S")
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else str(value)


def _line(cells: dict[str, Any]) -> str:
    out = io.StringIO()
    csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(cells)
    return out.getvalue()
