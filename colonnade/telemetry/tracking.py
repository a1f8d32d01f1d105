"""Opens the sinks that a run's settings ask for."""

from __future__ import annotations

import os
import queue
from importlib.util import find_spec
from pathlib import Path

from colonnade.checkpoint.remote_artifacts import require_client, upload_checkpoint
from colonnade.checkpoint.retention import Retention
from colonnade.checkpoint.uploads import CheckpointUploads, StoreClosed
from colonnade.errors import UsageError
from colonnade.run_settings import RunSettings
from colonnade.setting_values import useless_alone, without_credentials
from colonnade.telemetry.csv_table import CsvTable
from colonnade.telemetry.metrics import read_metrics
from colonnade.telemetry.pictures import Pictures
from colonnade.telemetry.progress import ProgressReport
from colonnade.telemetry.report import METRICS_NAME
from colonnade.telemetry.sinks import JsonLines, Lines, Sink, Tracker
from colonnade.telemetry.tensorboard import TensorBoard
from colonnade.telemetry.weights_and_biases import WeightsAndBiases

# Modes of the client in which nothing leaves the machine; it would only copy the whole checkpoint for a later upload.
_WITHOUT_STORE = ("offline", "disabled", "dryrun")
_NEEDED = (
    ("wandb_entity", "wandb_project"),
    ("wandb_run_name", "wandb_project"),
    ("wandb_checkpoints", "wandb_project"),
    ("drop_uploaded_checkpoints", "wandb_checkpoints"),
)
CSV_NAME, TENSORBOARD_NAME = "metrics.csv", "tensorboard"
WANDB_NAME = "wandb"
"""Folder that the client makes by itself."""


def require_sinks(settings: RunSettings) -> None:
    """Raises UsageError if tracking settings have no effect or contradict others, or if they need a missing package.

    Also if the folder holds a `metrics.jsonl` that cannot be read: found here, before anything is built.
    """
    for needs, needed in _NEEDED:
        if getattr(settings, needs) and not getattr(settings, needed):
            raise useless_alone(needs, needed)
    if settings.deterministic and not settings.jsonl:
        raise UsageError("--deterministic and --no-jsonl: an audit compares with metrics.jsonl; leave out one of them")
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install 'colonnade[tensorboard]'"
        )
    if settings.wandb_project is not None:
        require_client("--wandb-project")
    record = Path(settings.checkpoint_dir) / METRICS_NAME
    if settings.jsonl and record.exists():
        read_metrics(record)


def open_tracker(
    settings: RunSettings,
    step: int,
    progress: ProgressReport,
    *,
    retention: Retention,
    unigram_entropy: float | None,
) -> tuple[Tracker, CheckpointUploads | None]:
    """Open a run's sinks, and its checkpoint uploads if the settings ask for them; on the rank that writes.

    Args:
        settings: the run's settings.
        step: the step the run is at.
        progress: the screen.
        retention: knows which of the run's checkpoints must stay.
        unigram_entropy: as for `plot_loss`.

    Raises:
        RunError, UsageError: `metrics.jsonl` cannot be written, or cannot be read as rows.
    """
    directory = Path(settings.checkpoint_dir)
    lines: Lines = queue.SimpleQueue()
    others: list[Sink] = []
    uploads = None
    if settings.csv:
        others.append(CsvTable(directory / CSV_NAME))
    if settings.tensorboard:
        others.append(TensorBoard(directory / TENSORBOARD_NAME))
    if settings.jsonl:
        others.append(Pictures(directory, unigram_entropy))
    if settings.wandb_project is not None:
        tracked = WeightsAndBiases(
            directory,
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            run_name=settings.wandb_run_name,
            config={
                name: without_credentials(value) if isinstance(value, str) else value
                for name, value in settings.to_dict().items()
            },
            say=lines.put,
        )
        others.append(tracked)
        mode = os.environ.get("WANDB_MODE", "online")
        if settings.wandb_checkpoints and mode in _WITHOUT_STORE:
            lines.put(f"warning: checkpoints are not uploaded: WANDB_MODE is {mode}")
        elif settings.wandb_checkpoints:
            uploads = CheckpointUploads(
                retention,
                lambda path: _upload(tracked, path),
                store={"project": settings.wandb_project, "entity": settings.wandb_entity},
                say=lines.put,
                drop=settings.drop_uploaded_checkpoints,
            )
            uploads.resend(step)
    record = JsonLines(directory / METRICS_NAME) if settings.jsonl else None
    tracker = Tracker(step, progress, record, must_record=settings.deterministic, others=others, lines=lines)
    return tracker, uploads


def _upload(tracked: WeightsAndBiases, path: Path) -> str:
    try:
        run = tracked.ready.result()
    except (Exception, SystemExit) as error:
        raise StoreClosed(f"{tracked.name} is off") from error
    if run.offline or run.disabled:
        raise StoreClosed(f"{tracked.name} is {'disabled' if run.disabled else 'offline'}")
    return upload_checkpoint(run, path)
