"""A few steps of a run recorded with torch.profiler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function, schedule

logger = logging.getLogger(__name__)

TABLE_ROWS = 60


def activities(*, on_cuda: bool) -> list[ProfilerActivity]:
    """What torch.profiler records on a device of this kind."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's log lines
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])


def kernel_table(recorded: profile, *, on_cuda: bool) -> str:
    """A table of the kernels that took the most time in a profile that has ended."""
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    table: str = recorded.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=90)
    return table


class StepProfiler:
    """Records the steps `first` to `first + count - 1` of a run on this rank, and writes them into `folder`.

    `steps_F-L_rank_R.json.gz` is a Chrome trace, for ui.perfetto.dev; `steps_F-L_rank_R.txt` is a table of the kernels
    that took the most time. The step before the first one warms the profiler up, if this start takes that step. A start
    that goes on from a later step than the one before the first records nothing.

    Args:
        first: global step to begin with, from 1; 0 records nothing.
        count: number of steps to record.
        step: steps that have been taken so far.
        tell: shows a line to the user.
    """

    def __init__(
        self, first: int, count: int, *, step: int, folder: Path, rank: int, on_cuda: bool, tell: Callable[[str], None]
    ) -> None:
        self._first, self._last = first, first + count - 1
        self._is_wanted = step < first
        self._folder, self._rank, self._on_cuda, self._tell = folder, rank, on_cuda, tell
        self._profile: profile | None = None

    @contextmanager
    def recorded(self, step: int) -> Iterator[None]:
        """Take each step inside. A step that fails leaves no profile."""
        if self._is_wanted and step in (self._first - 1, self._first):
            self._start(warmup=self._first - step)
        if self._profile is None:
            yield
            return
        try:
            with record_function(f"step {step}"):
                yield
        except BaseException:
            abandoned, self._profile = self._profile, None
            if not self._on_cuda:  # where it would wait for kernels that may never end, as of a peer that is gone
                abandoned.stop()
            raise
        if step < self._last:
            self._profile.step()

    def _start(self, warmup: int) -> None:
        active = self._last - self._first + 1
        # Without a schedule it records from its start on; one without a warm-up prints a warning.
        plan = schedule(wait=0, warmup=warmup, active=active, repeat=1) if warmup else None
        self._profile = profile(activities=activities(on_cuda=self._on_cuda), schedule=plan)
        self._profile.start()
        self._is_wanted = False

    def is_complete(self, step: int) -> bool:
        """Whether `step` was the last one to record, so that the profile can be written."""
        return self._profile is not None and step >= self._last

    def close(self, step: int) -> None:
        """Stop, and write what has been recorded up to `step`, if anything: a run may end before all steps were taken.

        Takes seconds for a large model, since every operation is written. Files that cannot be written are reported by
        a warning.
        """
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        recorded.stop()
        if step < self._first:
            return
        stem = f"steps_{self._first}-{min(step, self._last)}_rank_{self._rank}"
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"{stem}.json.gz"))
            table = kernel_table(recorded, on_cuda=self._on_cuda)
            (self._folder / f"{stem}.txt").write_text(f"{table}\n", encoding="utf-8")
        except OSError as error:
            logger.warning("rank %d: its profile cannot be written to %s (%s)", self._rank, self._folder, error)
        else:
            self._tell(f"profile: {self._folder / stem}.txt and .json.gz")
