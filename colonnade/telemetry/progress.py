"""The run's progress on screen: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from colonnade.screen import surviving

if TYPE_CHECKING:
    import tqdm

# Without a terminal, the bar is printed as a separate line, at most this often.
PLAIN_INTERVAL_S = 30.0
# Number of characters printed of a sample's prompt and of its text.
SAMPLE_PROMPT, SAMPLE_TEXT = 30, 70

# How a row is shown: a key of the row, and how its value is formatted.
_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("epoch", lambda value: f"epoch {value:g}"),
    ("loss", lambda value: f"loss {value:.4f}"),
    ("perplexity", lambda value: f"ppl {_short(value)}"),
    ("validation_loss", lambda value: f"validation loss {value:.4f}"),
    ("validation_perplexity", lambda value: f"ppl {_short(value)}"),
    ("learning_rate", lambda value: f"lr {value:.2e}"),
    ("grad_norm", lambda value: f"grad norm {value:.3f}"),
    ("tokens_seen", lambda value: f"tokens {_short(value)}"),
    ("tokens_per_second", lambda value: f"{_short(value)} tok/s"),
    ("model_flops_utilization", lambda value: f"MFU {value:.1%}"),
    ("memory_gib", lambda value: f"{value:.2f} GiB"),
    ("data_wait_fraction", lambda value: f"data wait {value:.1%}"),
)


class ProgressReport:
    """Shows a run's steps as a bar on `bar_stream` and its rows and messages as lines on `line_stream`.

    Counts optimizer steps out of `total_steps`, starting at `initial_step`. On a terminal, lines scroll above the bar;
    elsewhere (a file, a pipe) nothing is redrawn: the bar is printed as a line, at most every 30 s and at the end. With
    `bar=False` there are only the lines. With `enabled=False`, for ranks other than 0, every method is a no-op.
    A stream that cannot be written is dropped, with one line on stderr.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial_step: int = 0,
        enabled: bool = True,
        bar: bool = True,
        line_stream: TextIO | None = None,
        bar_stream: TextIO | None = None,
    ) -> None:
        self._enabled, self._has_bar = enabled, bar
        self._total = total_steps
        self._initial = initial_step
        self._step = initial_step
        self._loss: float | None = None
        self._lines = line_stream if line_stream is not None else sys.stdout
        self._bar_stream = bar_stream if bar_stream is not None else sys.stderr
        self._started = self._shown = time.monotonic()
        self._shown_step: int | None = None
        self._bar: tqdm.tqdm[Any] | None = None
        if enabled and bar and self._bar_stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=initial_step,
                desc="training",
                unit="step",
                file=self._bar_stream,
                dynamic_ncols=True,
                # Average speed since the start: compilation, validation and saving make single steps vary.
                smoothing=0.0,
            )

    def update(self, step: int, loss: float | None = None) -> None:
        """Report that `step` is done. `loss` is passed when known, and stays beside the bar until the next one."""
        if not self._enabled:
            return
        if loss is not None:
            self._loss = loss
        advance, self._step = step - self._step, step
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            with surviving(self._bar_stream):
                self._bar.update(advance)
        elif self._has_bar and time.monotonic() - self._shown >= PLAIN_INTERVAL_S:
            self._show_plain()

    def write(self, row: Mapping[str, Any]) -> None:
        """Print one metrics row in readable form; keys that are not in `_COLUMNS` appear in the metrics file only."""
        # The details of a run's start have been printed already.
        if self._enabled and not row.get("started"):
            self.message(format_row(row, self._total))

    def message(self, text: str) -> None:
        """Print `text` on a separate line, above the bar."""
        if not self._enabled:
            return
        # Pipes are block-buffered; without a flush, which ends the block, readers of the log could be minutes behind.
        with surviving(self._lines):
            if self._bar is not None:
                self._bar.write(text, file=self._lines)
            else:
                print(text, file=self._lines)

    def close(self) -> None:
        """Draw the last state and release the screen. May be called twice."""
        if not self._enabled:
            return
        if self._bar is not None:
            with surviving(self._bar_stream):
                self._bar.close()
        elif self._has_bar and self._step > self._initial and self._shown_step != self._step:
            self._show_plain()
        self._enabled = False

    def _show_plain(self) -> None:
        from tqdm import tqdm

        line = tqdm.format_meter(
            self._step,
            self._total,
            elapsed=time.monotonic() - self._started,
            initial=self._initial,
            prefix="training",
            unit="step",
            ncols=100,
            postfix=None if self._loss is None else f"loss {self._loss:.4f}",
        )
        with surviving(self._bar_stream):
            print(line, file=self._bar_stream)
        self._shown, self._shown_step = time.monotonic(), self._step

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_row(row: Mapping[str, Any], total_steps: int | None = None) -> str:
    """One line for a metrics row: its step (out of `total_steps`), then each known value that is present.

    Values of None are left out. Values include their units; token counts are shortened (12.3k, 4.56M), and samples
    are truncated.
    """
    parts = [write(float(row[key])) for key, write in _COLUMNS if row.get(key) is not None]
    parts += [
        f"sample {_one_line(sample['prompt'], SAMPLE_PROMPT)!r} -> {_one_line(sample['text'], SAMPLE_TEXT)!r}"
        for sample in row.get("samples") or ()
    ]
    if row.get("step") is not None:
        width = len(str(total_steps)) if total_steps is not None else 0
        of_total = f"/{total_steps}" if total_steps is not None else ""
        parts.insert(0, f"step {row['step']:>{width}}{of_total}" if width else f"step {row['step']}")
    return " | ".join(parts)


def _one_line(text: str, length: int) -> str:
    """`text` truncated to at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _short(value: float) -> str:
    """`value` with three significant digits and a metric suffix: 950, 12.3k, 4.56M."""
    from tqdm import tqdm

    return tqdm.format_sizeof(value) if math.isfinite(value) else str(value)
