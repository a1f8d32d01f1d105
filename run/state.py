"""The state of a run between two steps, and what of it goes into a checkpoint."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from colonnade.checkpoint.retention import Retention
from colonnade.checkpoint.run_lock import RunLock
from colonnade.checkpoint.saver import CheckpointSaver
from colonnade.checkpoint.uploads import CheckpointUploads
from colonnade.data.feed import BatchFeed
from colonnade.data.position import DataPosition
from colonnade.data.tokenizer_backend import Backend
from colonnade.optim.loss_window import LossWindow
from colonnade.optim.schedule import Schedule
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings
from colonnade.telemetry.data_ledger import write_data_ledger
from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, Fingerprint
from colonnade.tuning.autotuner import TunedMicroBatch
from data_processing import TokenStream
from model import ModelConfig, TensorParallelModel
from run.samples import SamplePrompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEDGER_NAME, HANGS_NAME = "data_ledger.json", "hangs"


@dataclass
class Validation:
    """The held-out blocks, the same on every rank.

    Attributes:
        tokens: [chunks, block_size + 1] int32 on the CPU, in the wire format (`colonnade/data/blocks.py`).
        unigram_entropy: entropy of the targets' frequencies in nats per token: the best loss possible without context.
    """

    tokens: Tensor
    unigram_entropy: float


@dataclass
class Run:
    """The state of a run between two steps.

    Attributes:
        settings: resolved settings, in the form that `--config` reads.
        batch: micro-batch size and accumulation, which depend on the number of ranks; `global_batch`, the number of
            chunks per step, does not.
        retention: which checkpoints of the folder must be kept.
        batch_depends_on: what the micro-batch depends on, the key of its record.
        stream: the chunk stream; None on ranks that do not read.
        tokenizer_backend: the library that tokenizes, as determined on the first rank.
        arithmetic: what the bits depend on besides the settings, in the deterministic mode; otherwise None.
        began_at: the step at which the run was resumed with changed settings; 0 if it never was.
        step: optimizer steps taken.
        tokens_seen: tokens trained on, over all ranks.
        position: the data position after `step`, as far as this rank's reader knows it (`whole_position`); None on
            ranks that do not read.
        loss: mean loss of the last step that was logged or saved.
        losses: losses of the last steps that were not skipped, on the device.
        skipped_steps: number of skipped steps since the run began, as far as they have been examined (`StepGuard`).
        skipped_in_row: number of skipped steps since the last step that was taken.
        code: version of the program, as the manifest records it.
        validation_loss: loss of the last validation.
        resumed_from: the checkpoint that this start resumed from.
        saver: writes checkpoints; None for a replay, which writes nothing.
        sample_prompts: prompts for samples of the model's text; None if no samples are taken.
        tokenizer: the tokenizer; None on ranks that do not read.
        uploads: uploads checkpoints, on the first rank, if requested.
        lock: lock of the run's folder, held on the first rank; None for a replay.
        gathered: cache of `whole_position`: this reader's position, and the position over all readers merged from it.
    """

    settings: RunSettings
    layout: ParallelLayout
    config: ModelConfig
    model: TensorParallelModel
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    schedule: Schedule
    feed: BatchFeed
    stream: TokenStream | None
    validation: Validation | None
    batch: TunedMicroBatch
    retention: Retention
    batch_depends_on: Mapping[str, Any]
    global_batch: int
    tokenizer_backend: Backend
    peak_flops: float | None
    losses: LossWindow
    code: Mapping[str, str | None]
    arithmetic: Mapping[str, Any] | None = None
    began_at: int = 0
    step: int = 0
    tokens_seen: int = 0
    position: DataPosition | None = None
    loss: float | None = None
    skipped_steps: int = 0
    skipped_in_row: int = 0
    validation_loss: float | None = None
    resumed_from: Path | None = None
    saver: CheckpointSaver | None = None
    sample_prompts: SamplePrompts | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    uploads: CheckpointUploads | None = None
    lock: RunLock | None = None
    gathered: tuple[DataPosition, DataPosition] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return Path(self.settings.checkpoint_dir)

    @property
    def block_size(self) -> int:
        assert self.settings.block_size is not None  # resolved before a run is made
        return self.settings.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.block_size


# ------------------------------------------------------------------------------------------------------ checkpoints


def save(run: Run, fingerprint: Fingerprint | None) -> None:
    """Save the run, with its fingerprint in the deterministic mode, then prune the oldest checkpoints. Collective.

    Saves asynchronously unless the settings say otherwise; the save is complete once `run.saver.wait()` returns.

    Raises:
        RunError: on all ranks, if this or the previous save failed on any rank; older checkpoints are intact.
    """
    assert run.saver is not None
    directory, uploads = run.directory, run.uploads
    position = whole_position(run)
    manifest = manifest_of(run, position, fingerprint if run.settings.deterministic else None)

    def after_commit(path: Path) -> None:
        run.retention.committed(path)
        if uploads is not None:
            uploads.add(path)
        # First of all that may need space: on a full disk, only this frees any.
        prune(run)
        if position is not None:
            write_data_ledger(directory / LEDGER_NAME, position)

    run.saver.save(run.step, model=run.model, optimizer=run.optimizer, manifest=manifest, after_commit=after_commit)


def prune(run: Run) -> None:
    """Remove the oldest checkpoints of the run, except those still to be uploaded. Call it on one rank."""
    run.retention.prune(() if run.uploads is None else run.uploads.pending)


def whole_position(run: Run) -> DataPosition | None:
    """The data position over all readers; None on ranks that do not read. Collective over the readers."""
    if run.position is None or run.stream is None or run.stream.apart == 1:
        return run.position
    if run.gathered is None or run.gathered[0] is not run.position:
        merged = merged_position(run, run.position)
        assert merged is not None
        run.gathered = (run.position, merged)
    return run.gathered[1]


def merged_position(run: Run, position: DataPosition | None) -> DataPosition | None:
    """`whole_position` for any position of this rank's reader."""
    if position is None or run.stream is None or run.stream.apart == 1:
        return position
    parts: list[Any] = [None] * run.layout.dp
    dist.all_gather_object(parts, position, group=run.layout.dp_group)
    return DataPosition.merged(parts, run.stream.start.chunk)


def close_data(run: Run) -> None:
    """Stop reading: first the reader's waits and tries, then the thread that reads ahead, then the files.

    A read that takes longer than the thread is waited for is left to it.
    """
    if run.stream is not None:
        run.stream.stop()
    run.feed.close()
    if run.stream is not None:
        run.stream.close()


def manifest_of(run: Run, position: DataPosition | None, fingerprint: Fingerprint | None = None) -> dict[str, Any]:
    """All state of a run that is not a tensor, as JSON values."""
    layout = run.layout
    fingerprints = dict.fromkeys(FINGERPRINT_KEYS) if fingerprint is None else fingerprint.columns()
    return {
        "loss": run.loss if run.loss is not None and math.isfinite(run.loss) else None,
        "loss_window": run.losses.values(),
        "skipped_steps": run.skipped_steps,
        "skipped_in_row": run.skipped_in_row,
        "tokens_seen": run.tokens_seen,
        "data_position": position.to_dict() if position is not None else None,
        "schedule": run.schedule.to_dict(),
        "scaler": run.scaler.state_dict() or None,
        "rng": rng_state(layout.device),
        "world_size": dist.get_world_size(),
        "tp": layout.tp,
        "dp": layout.dp,
        "micro_batch_size": run.batch.micro_batch_size,
        "gradient_accumulation_steps": run.batch.gradient_accumulation_steps,
        "global_batch": run.global_batch,
        "arithmetic": run.arithmetic,
        **fingerprints,
        "began_at": run.began_at,
        "code": dict(run.code),
        "tokenizer_backend": run.tokenizer_backend.label,
        "model_config": run.config.to_dict(),
        "settings": run.settings.to_dict(),
    }


def rng_state(device: torch.device) -> dict[str, str]:
    """torch's generator states as text. No step uses them at present; dropout would."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def restore_rng(states: Mapping[str, str], device: torch.device) -> None:
    """Restore the generators from `rng_state`; one that the checkpoint does not contain is left unchanged."""
    setters: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state}
    if device.type == "cuda":
        setters["cuda"] = lambda state: torch.cuda.set_rng_state(state, device)
    for kind, setter in setters.items():
        if kind in states:
            setter(torch.frombuffer(bytearray(base64.b64decode(states[kind])), dtype=torch.uint8))
