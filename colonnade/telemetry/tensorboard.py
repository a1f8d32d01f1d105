"""Writes rows as TensorBoard events, through torch's `SummaryWriter`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.telemetry.sinks import Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Scalars under their names in `metrics.jsonl`; samples and starts as text.

    Every start of the run writes a separate file, which tells TensorBoard to purge the steps after the one it starts
    at, so each step is shown once.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def write(self, row: Row) -> None:
        assert self._writer is not None
        step, time = int(row["step"]), datetime.fromisoformat(row["time"]).timestamp()
        if row.get("started"):
            self._writer.add_text("starts", _table(row), step, time)
        else:
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, step, walltime=time)
        for number, sample in enumerate(row.get("samples") or ()):
            self._writer.add_text(f"samples/{number}", _block(f"{sample['prompt']}{sample['text']}"), step, time)
        # Flush every row, since a killed run has no chance to.
        self._writer.flush()

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(row: Row) -> dict[str, float]:
    """The finite numbers in a row by name, except its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _block(text: str) -> str:
    """`text` as a Markdown code block, which is shown verbatim."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(row: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in row.items())])
