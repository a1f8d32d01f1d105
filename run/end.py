"""The end of a run, and the record of its start: the printed summary, and the files left in its folder.

COMPLETE.json    the run took its last step
STOPPED.json     the run was asked to stop, and can be resumed
.launch.json     which launch started the run, to distinguish a restarted attempt of a launch from its first attempt
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from colonnade.checkpoint.manifest import checkpoint_name
from colonnade.errors import LocalRunError
from colonnade.files import replace_file
from colonnade.telemetry.data_ledger import data_summary
from colonnade.telemetry.metrics import perplexity_of
from colonnade.telemetry.pictures import PLOT_NAME
from colonnade.telemetry.report import METRICS_NAME, REPORT_NAME
from colonnade.telemetry.sinks import Tracker
from colonnade.telemetry.tracking import CSV_NAME, TENSORBOARD_NAME, WANDB_NAME
from run.state import LEDGER_NAME, Run, close_data, prune, whole_position

LAUNCH_NAME, STOPPED_NAME, COMPLETE_NAME = ".launch.json", "STOPPED.json", "COMPLETE.json"
# Seconds that the end of a run waits for its sinks and for checkpoint uploads. Less for uploads if the run was asked to
# stop, because it will soon be killed.
CLOSE_SECONDS, UPLOAD_SECONDS, UPLOAD_SECONDS_STOPPED = 30.0, 300.0, 20.0


def finish(run: Run, saved_step: int, tracker: Tracker, stop_reason: str | None, say: Callable[[str], None]) -> None:
    """Close feed, stream, uploads and sinks (which draw the pictures); report and record the end. Collective."""
    position = whole_position(run)
    close_data(run)
    if not run.layout.is_main:
        return
    record_end(run, stop_reason, saved_step)
    _close_tracking(run, saved_step, tracker, stop_reason)
    lines = [f"finished at step {run.step} after {run.tokens_seen:,} tokens"]
    if stop_reason is not None:
        lines = [f"stopped after step {run.step} of {run.settings.total_steps} ({stop_reason}); it goes on from there"]
    if position is not None:
        lines += [f"  data        {line}" for line in data_summary(position)]
    if run.validation is not None and run.validation_loss is not None:
        lines.append(
            f"  held out    {_with_perplexity(run.validation_loss)}; "
            f"knowing the token frequencies alone: {_with_perplexity(run.validation.unigram_entropy)}"
        )
    if saved_step >= 0:
        lines.append(f"  checkpoint  {run.directory / checkpoint_name(saved_step)}")
    for is_on, name in (
        (run.settings.jsonl, METRICS_NAME),
        (run.settings.csv, CSV_NAME),
        (run.settings.tensorboard, TENSORBOARD_NAME),
        (run.settings.wandb_project is not None, WANDB_NAME),
    ):
        if is_on and (run.directory / name).exists():
            lines.append(f"  metrics     {run.directory / name}")
    if saved_step >= 0:
        lines.append(f"  data ledger {run.directory / LEDGER_NAME}")
    for what, name in (("plot", PLOT_NAME), ("report", REPORT_NAME)):
        if run.settings.jsonl and (run.directory / name).exists():
            lines.append(f"  {what:<11} {run.directory / name}")
    say("\n".join(lines))


def _close_tracking(run: Run, saved_step: int, tracker: Tracker, stop_reason: str | None) -> None:
    """Close uploads and sinks within a time limit, since the other ranks are waiting in the last collective."""
    patience = run.settings.step_timeout / 2 or float("inf")
    if run.uploads is not None:
        seconds = UPLOAD_SECONDS if stop_reason is None else UPLOAD_SECONDS_STOPPED
        run.uploads.close(min(seconds, patience / 2), tell=tracker.tell)
        if saved_step >= 0:
            # Checkpoints that were kept only until their upload can now be deleted.
            prune(run)
    tracker.close(min(CLOSE_SECONDS, patience / 2))


def _with_perplexity(loss: float) -> str:
    return f"loss {loss:.4f} (perplexity {perplexity_of(loss):.1f})"


def record_end(run: Run, reason: str | None, saved_step: int) -> None:
    """Record how the run ended in its folder: COMPLETE.json, or STOPPED.json with the reason. Call it on one rank.

    A run that failed or is still running has neither file. Raises LocalRunError.
    """
    content = {
        "step": run.step,
        "total_steps": run.settings.total_steps,
        "tokens_seen": run.tokens_seen,
        "loss": run.loss if run.loss is not None and math.isfinite(run.loss) else None,
        "validation_loss": run.validation_loss,
        "checkpoint": checkpoint_name(saved_step) if saved_step >= 0 else None,
        "ended_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if reason is not None:
        content = {"reason": reason, **content}
    path = run.directory / (COMPLETE_NAME if reason is None else STOPPED_NAME)
    try:
        replace_file(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise LocalRunError(f"{path} cannot be written: {error.strerror or error}; the checkpoint is whole") from error


def record_launch(directory: Path, launched_by: list[str], step: int) -> None:
    """Record who launched these ranks, and from which step. Raises OSError.

    A later attempt of the same launch keeps the record of the first attempt, and its step.
    """
    if step_of_launch(directory, launched_by) is None:
        replace_file(directory / LAUNCH_NAME, json.dumps({"launched_by": launched_by, "step": step}) + "\n")


def step_of_launch(directory: Path, launched_by: list[str]) -> int | None:
    """The step at which the first attempt of this launch began in the folder; None if this is the first."""
    try:
        record = json.loads((directory / LAUNCH_NAME).read_text(encoding="utf-8"))
        is_same = not set(record["launched_by"]).isdisjoint(launched_by)
        return int(record["step"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError):  # no readable record: this is the first attempt
        return None


def is_complete(directory: Path) -> bool:
    """Whether the run in the folder has ended after its last step: with its last validation, samples and summary."""
    return (directory / COMPLETE_NAME).exists()


def forget_end(directory: Path) -> None:
    """Delete COMPLETE.json and STOPPED.json, since the run has been resumed. Raises LocalRunError."""
    try:
        for name in (STOPPED_NAME, COMPLETE_NAME):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise LocalRunError(f"{directory}: {error.strerror or error}; the last checkpoint stands") from error
