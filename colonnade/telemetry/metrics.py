"""The run's record, `metrics.jsonl` with one JSON object per line, and what is computed from such records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from colonnade.errors import RunError, UsageError
from colonnade.files import replace_file

if TYPE_CHECKING:
    import numpy as np


_HIGHEST_EXPONENT = 700.0  # exp of slightly more overflows a float


def perplexity_of(loss: float) -> float:
    """exp of the mean cross-entropy per token in nats."""
    return math.exp(min(loss, _HIGHEST_EXPONENT))


class MetricsLog:
    """Appends rows to a JSON Lines file, one write and flush per row; a kill loses at most the row being written.

    Only one process writes (rank 0). Opening the log removes a partial last line left by a kill. Rows are strict JSON:
    non-finite numbers become null.

    Raises RunError if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row of numbers (NumPy's too), strings, booleans, None, and lists and mappings of them."""
        try:
            self._file.write(_encode(row))
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def truncate_after(self, step: int) -> int:
        """Drop the rows of steps later than `step`, and return how many there were.

        A run that resumes at `step` repeats the later steps; without this the file would contain them twice. A row
        without a step is treated like the row before it. The file is replaced atomically by rename.
        """
        rows = read_metrics(self.path)
        kept = []
        lost = False
        for row in rows:
            if isinstance(row.get("step"), int):
                lost = row["step"] > step
            if not lost:
                kept.append(row)
        if len(kept) == len(rows):
            return 0
        try:
            replace_file(self.path, b"".join(_encode(row) for row in kept))
            self._file.close()
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return len(rows) - len(kept)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file, in order; a partial last line is skipped.

    Raises UsageError if the file cannot be read or if a complete line is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read metrics from {path}: {error.strerror or error}") from error
    # The text after the last newline is empty, or an unfinished row.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"line {number} of {path} is not a JSON object: remove that line or move the file away")
        rows.append(row)
    return rows


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `key`; null, which stands for a non-finite value, becomes NaN."""
    points = [
        (int(row["step"]), math.nan if row[key] is None else float(row[key]))
        for row in rows
        if key in row and row.get("step") is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def restarts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps at which a run was restarted, without duplicates."""
    return sorted({int(row["step"]) for row in rows[1:] if row.get("started") and row.get("step") is not None})


def unigram_entropy(token_ids: np.ndarray) -> float:
    """Entropy of the tokens' own frequencies, in nats per token: -sum p log p.

    This is the lowest loss that a model ignoring context can reach on these tokens, so a model that has learnt more
    than frequencies is below it. `token_ids` has any shape. Raises ValueError if it is empty.
    """
    import numpy as np

    if token_ids.size == 0:
        raise ValueError("the entropy of no tokens is undefined")
    counts = np.unique(token_ids, return_counts=True)[1]
    frequencies = counts / token_ids.size
    # Adding 0.0 turns the -0.0 of a single distinct token into 0.0.
    return float(-(frequencies * np.log(frequencies)).sum()) + 0.0


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(row), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """`value` with NumPy scalars converted to Python's, and None in place of non-finite floats."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is not None and not isinstance(value, str | bool | int | float) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cut_torn_line(path: Path) -> None:
    """Truncate the file after its last newline."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write metrics to {path}: {error.strerror or error}")
