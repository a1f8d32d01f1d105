"""Where the rows of a run go: a small sink interface, and the isolation of the run from sinks that fail or hang.

`Tracker` passes each row synchronously to the screen and to `metrics.jsonl`, and to every other sink through a queue
and a thread per sink. A sink that raises is reported in one line and receives nothing more; one that hangs is abandoned
at the end of the run, after a timeout.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeAlias

from colonnade.errors import RunError
from colonnade.runtime.vote import one_line
from colonnade.telemetry.metrics import MetricsLog
from colonnade.telemetry.progress import ProgressReport

Row: TypeAlias = Mapping[str, Any]
# Lines for the screen from the sinks' threads, printed with the next row.
Lines: TypeAlias = "queue.SimpleQueue[str]"

# Most rows that may be queued for a sink's thread. A row is some hundred bytes; a sink this far behind is hanging.
MOST_WAITING = 10_000


class Sink(Protocol):
    """A destination for the rows of a run. Its methods are called in order, on one thread, and may raise."""

    name: str

    def open(self, step: int) -> None:
        """Called once, before the first row. Should drop rows of steps after `step` that an earlier start wrote."""

    def write(self, row: Row) -> None:
        """Take a row: `step`, `time`, and whatever else `metrics.jsonl` holds. Values may be NaN or infinite."""

    def close(self, failed: bool) -> None:
        """Complete the output. `failed`: whether the run ended with an error."""


class JsonLines:
    """`metrics.jsonl`, the run's own record: the pictures are made from it, and an audit compares with it."""

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log: MetricsLog | None = None

    def open(self, step: int) -> None:
        """Raises RunError if the file cannot be written, and UsageError if it cannot be read as rows."""
        self._log = MetricsLog(self._path)
        self._log.truncate_after(step)

    def write(self, row: Row) -> None:
        """Raises RunError."""
        if self._log is not None:
            self._log.append(row)

    def close(self, failed: bool) -> None:
        if self._log is not None:
            self._log.close()


class Tracker:
    """The sinks of a run. Without any, as on ranks other than 0, rows only go to `progress` (a no-op on those ranks).

    Args:
        step: the step the run is at.
        progress: the screen, already open.
        record: `metrics.jsonl`; None if it is not written.
        must_record: whether the run ends if `record` fails, instead of continuing without it.
        others: sinks that each get their own thread.
        lines: messages for the screen from sinks and others.

    Raises:
        RunError, UsageError: `record` cannot be opened.
    """

    def __init__(
        self,
        step: int,
        progress: ProgressReport,
        record: Sink | None,
        *,
        must_record: bool = False,
        others: Sequence[Sink] = (),
        lines: Lines | None = None,
    ) -> None:
        self._progress, self._record, self._must_record = progress, record, must_record
        self._lines: Lines = queue.SimpleQueue() if lines is None else lines
        self._is_silent = record is None and not others
        if record is not None:
            record.open(step)
        self._others = [_OnThread(sink, step, self._lines) for sink in others]

    def write(self, row: Row) -> None:
        """Pass on a row with the current time added. Waits only for the screen and for `metrics.jsonl`.

        Raises:
            RunError: `metrics.jsonl` cannot be written, and `must_record` is set.
        """
        self._progress.write(row)
        if self._is_silent:
            return
        row = {**row, "time": now()}
        if self._record is not None:
            try:
                self._record.write(row)
            except RunError as error:
                if self._must_record:
                    raise
                self._lines.put(f"warning: {one_line(error)}; the run goes on without it")
                self._record = None
        for other in self._others:
            other.write(row)
        self.tell()

    def tell(self) -> None:
        """Print the messages that sinks have queued."""
        while True:
            try:
                self._progress.message(self._lines.get_nowait())
            except queue.Empty:
                return

    def close(self, seconds: float, *, failed: bool = False) -> None:
        """Close all sinks in parallel, and wait at most `seconds` for all of them together."""
        if self._record is not None:
            self._record.close(failed)
            self._record = None
        others, self._others = self._others, []
        deadline = time.monotonic() + seconds
        for other in others:
            other.finish(failed)
        for other in others:
            other.wait(max(0.0, deadline - time.monotonic()))
        self.tell()


class _OnThread:
    """A sink, its thread and its queue of rows."""

    def __init__(self, sink: Sink, step: int, lines: Lines) -> None:
        self._sink, self._step, self._lines = sink, step, lines
        self._rows: queue.Queue[Row | None] = queue.Queue(MOST_WAITING)
        self._failed_run = False
        self._is_off = False
        # A daemon thread: a hanging sink does not keep the process alive.
        self._thread = Thread(target=self._live, name=f"sink {sink.name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        if self._is_off:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up(f"it has not taken {MOST_WAITING:,} rows")

    def finish(self, failed: bool) -> None:
        self._failed_run = failed
        if not self._is_off:
            try:
                self._rows.put_nowait(None)
            except queue.Full:
                self._give_up(f"it has not taken {MOST_WAITING:,} rows")

    def wait(self, seconds: float) -> None:
        if self._is_off:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up("it did not end in time, and what it had not written is lost")

    def _live(self) -> None:
        try:
            self._sink.open(self._step)
            while (row := self._rows.get()) is not None:
                self._sink.write(row)
            self._sink.close(self._failed_run)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a client raises, the run goes on
            self._give_up(one_line(error))

    def _give_up(self, reason: str) -> None:
        self._is_off = True
        self._lines.put(f"warning: {self._sink.name} is off ({reason}); the run goes on without it")


def now() -> str:
    """The current time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
