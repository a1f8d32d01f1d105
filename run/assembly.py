"""Assembling a run: open the stream, build model and optimizer, restore the checkpoint, determine the micro-batch.

This is what the three entry points in `run/start.py` have in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.retention import Retention
from colonnade.checkpoint.run_lock import RunLock
from colonnade.checkpoint.saver import CheckpointSaver
from colonnade.config import write_settings
from colonnade.data.feed import BatchFeed
from colonnade.data.position import DataPosition
from colonnade.errors import RunError, UsageError
from colonnade.optim.idle_switches import idle_settings, idle_switches
from colonnade.optim.loss_window import LossWindow
from colonnade.optim.schedule import Schedule, schedule_of
from colonnade.parallel.determinism import check_micro_batches
from colonnade.parallel.mesh import ParallelLayout, connect_devices
from colonnade.run_settings import RunSettings
from colonnade.runtime.stopping import launchers
from colonnade.runtime.vote import on_first_rank, vote
from colonnade.telemetry.code_version import code_version
from colonnade.tuning.autotuner import TunedMicroBatch
from data_processing import Backend, TokenChunk, TokenStream
from model import ModelConfig, TensorParallelModel
from run.batch import tune_batch
from run.batch_sizes import check_shares, check_step_size, fixed_micro_batch, requested_global_batch
from run.data import open_stream, read_validation, run_tokenizer, settle_backend, stream_notes
from run.end import record_launch
from run.folder import SETTINGS_NAME, require_steps_left
from run.inputs import arithmetic_of_run
from run.measurements import device_peak_flops
from run.model import Origin, State, build_state
from run.report import resume_report
from run.samples import SamplePrompts, read_sample_prompts
from run.state import Run, Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# --------------------------------------------------------------------------------------------------------- assembling


def assemble(
    settings: RunSettings,
    config: ModelConfig,
    layout: ParallelLayout,
    notes: list[str],
    origin: Origin,
    lock: RunLock | None,
) -> Run:
    """Open the data, build model and optimizer, restore them from the origin, and determine the batch. Collective.

    Args:
        lock: lock of the run's folder; a folder that does not exist is created and locked here. None for a replay,
            which writes nothing.
    """
    record = origin.record or {}
    global_batch, micro_batch = _asked_batch(settings, layout, origin)
    # Before the model, because building and tuning a large one takes minutes.
    data = _open_data(settings, config, layout, notes, origin, with_samples=lock is not None)
    state = build_state(settings, config, layout, origin, compares=lock is not None)
    with vote():
        if not origin.owes_end:
            require_steps_left(origin.path or Path(settings.checkpoint_dir), state.step, settings)
    # Before the tuner measures how much memory is available.
    saver = None if lock is None else _reserved_saver(settings, lock, origin, state)
    connect_devices(state.model.layout)
    batch, depends_on = tune_batch(state.model, settings, layout, global_batch, micro_batch)
    size = batch.micro_batch_size
    if global_batch is None:
        global_batch = size * batch.gradient_accumulation_steps * layout.dp
        check_step_size(size, settings, layout.dp)
    notes += _warnings(settings, layout, size) + _warnings_of_rewarmup(settings, origin, state.step)
    _describe(notes, state.model, batch, global_batch, settings)
    stream = data.stream
    run = Run(
        settings=settings,
        layout=layout,
        config=config,
        model=state.model,
        optimizer=state.optimizer,
        scaler=state.scaler,
        schedule=_schedule(settings, origin, state.step),
        feed=data.feed(layout, global_batch, settings.block_size or 0),
        stream=stream,
        validation=data.validation,
        batch=batch,
        retention=Retention(
            Path(settings.checkpoint_dir),
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            damaged=origin.damaged,
            resumed_from=origin.path,
        ),
        batch_depends_on=depends_on,
        global_batch=global_batch,
        tokenizer_backend=data.backend,
        peak_flops=device_peak_flops(layout.device, settings.precision),
        losses=LossWindow(settings.spike_window, layout.device, record.get("loss_window") or ()),
        code=on_first_rank(code_version),
        arithmetic=arithmetic_of_run(settings, layout, size) if settings.deterministic else None,
        began_at=on_first_rank(lambda: _began_at(origin, stream)),
        step=state.step,
        tokens_seen=record.get("tokens_seen", 0),
        position=stream.start if stream is not None else None,
        loss=record.get("loss"),
        skipped_steps=record.get("skipped_steps") or 0,
        skipped_in_row=record.get("skipped_in_row") or 0,
        resumed_from=origin.path,
        saver=saver,
        sample_prompts=data.sample_prompts,
        tokenizer=data.tokenizer,
        lock=lock,
        notes=notes,
    )
    if origin.path is not None:
        notes.append(resume_report(run, record, origin.libraries, origin.actions))
    if lock is not None:
        names = launchers()
        on_first_rank(lambda: _record_start(run, names))
    return run


def _asked_batch(settings: RunSettings, layout: ParallelLayout, origin: Origin) -> tuple[int | None, int | None]:
    """Sequences per step and per micro-batch, each None if only the tuner can determine it."""
    with vote():
        global_batch = origin.global_batch or requested_global_batch(settings, layout.dp)
        check_shares(global_batch, layout.dp)
        micro_batch = fixed_micro_batch(settings, origin.record or {})
        if global_batch is None and micro_batch is not None:
            global_batch = micro_batch * settings.gradient_accumulation_steps * layout.dp
        if global_batch is not None and micro_batch is not None:
            check_micro_batches(global_batch, micro_batch, layout.dp)
    return global_batch, micro_batch


@dataclass(frozen=True)
class _Data:
    """A run's opened inputs. Stream, chunks and tokenizer are None on ranks that do not read."""

    backend: Backend
    stream: TokenStream | None
    chunks: Iterator[TokenChunk] | None
    validation: Validation | None
    sample_prompts: SamplePrompts | None
    tokenizer: PreTrainedTokenizerBase | None

    def feed(self, layout: ParallelLayout, global_batch: int, block_size: int) -> BatchFeed:
        """The feed that gives each rank its share of a step's blocks."""
        first, apart = (0, 1) if self.stream is None else (self.stream.start.chunk, self.stream.apart)
        return BatchFeed(self.chunks, layout, global_batch, block_size, first=first, apart=apart)


def _open_data(
    settings: RunSettings,
    config: ModelConfig,
    layout: ParallelLayout,
    notes: list[str],
    origin: Origin,
    *,
    with_samples: bool,
) -> _Data:
    record = origin.record or {}
    tokenizer = cache(lambda: run_tokenizer(settings))  # loaded only on ranks that read, and only once there
    backend = on_first_rank(lambda: settle_backend(settings, tokenizer(), record, notes))
    stream, chunks = None, None
    with vote():
        position = DataPosition.from_dict(record["data_position"]) if record else None
        if layout.tp_rank == 0:
            stream, chunks = open_stream(
                settings, tokenizer(), backend, config, layout, position, allow_change=origin.allow_data_change
            )
            if layout.is_main:
                notes += stream_notes(stream, position)
    validation = on_first_rank(lambda: read_validation(settings, tokenizer(), backend))
    prompts = None
    if with_samples and settings.sample_interval > 0:
        context = config.max_position_embeddings
        prompts = on_first_rank(lambda: read_sample_prompts(settings, tokenizer(), context))
    return _Data(backend, stream, chunks, validation, prompts, tokenizer() if layout.tp_rank == 0 else None)


def _reserved_saver(settings: RunSettings, lock: RunLock, origin: Origin, state: State) -> CheckpointSaver:
    """Create the run's folder, and the saver that writes checkpoints into it, with its memory reserved."""
    on_first_rank(lambda: _make_folder(lock, is_fresh=origin.path is None))
    saver = CheckpointSaver(
        lock.directory,
        asynchronous=settings.checkpoint_mode == "async",
        hashes=settings.checkpoint_hash,
        timeout=settings.startup_timeout,
    )
    with vote():
        saver.reserve(state.model, state.optimizer)
    return saver


def _warnings(settings: RunSettings, layout: ParallelLayout, micro_batch: int) -> list[str]:
    """Warnings about settings that are valid but perhaps unintended."""
    found = idle_switches(settings, layout.tp, layout.dp, micro_batch) + idle_settings(settings)
    if settings.warmup_steps >= settings.total_steps:
        found.append(
            f"--warmup-steps {settings.warmup_steps} take up all {settings.total_steps} steps: the learning rate never "
            "comes down"
        )
    if settings.profile_start > settings.total_steps:
        found.append(
            f"--profile-start {settings.profile_start} is after the last of {settings.total_steps} steps: nothing is "
            "profiled"
        )
    if settings.spike_action == "skip" and settings.spike_sigma == 0:
        found.append("--spike-action skip: no step is skipped for a spike while --spike-sigma is 0")
    return found


def _warnings_of_rewarmup(settings: RunSettings, origin: Origin, step: int) -> list[str]:
    left = settings.total_steps - step
    if origin.rewarmup_steps <= left:
        return []
    return [
        f"--rewarmup-steps {origin.rewarmup_steps} are more than the {left} that are left: the learning rate does not "
        "come back to the schedule's"
    ]


def _make_folder(lock: RunLock, *, is_fresh: bool) -> None:
    """Create and lock the run's folder, if it did not exist when the run was started."""
    try:
        lock.take(create=True)
    except OSError as error:
        raise RunError(f"{lock.directory} cannot be made: {error.strerror or error}") from error
    if is_fresh and find_checkpoints(lock.directory):
        raise UsageError(f"--checkpoint-dir {lock.directory} was filled by another job meanwhile; start again")


def _record_start(run: Run, launched_by: list[str]) -> None:
    """Record the settings and the launcher of this start in the run's folder."""
    try:
        write_settings(run.settings, run.directory / SETTINGS_NAME)
        record_launch(run.directory, launched_by, run.step)
    except OSError as error:
        raise RunError(f"{run.directory}: the start cannot be recorded: {error.strerror or error}") from error


def _schedule(settings: RunSettings, origin: Origin, step: int) -> Schedule:
    """The run's schedule. If the optimizer is kept, a second warm-up in progress in the checkpoint continues."""
    if origin.keep_optimizer and origin.record:
        stored = origin.record["schedule"]
        return schedule_of(settings, stored["rewarmup_start"], stored["rewarmup_steps"])
    return schedule_of(settings, step, origin.rewarmup_steps)


def _began_at(origin: Origin, stream: TokenStream | None) -> int:
    """The step at which the run was last changed. That its data may change does not mean that they have."""
    if origin.began_at is not None:
        return origin.began_at
    if not origin.record:
        return 0
    if stream is not None and DataPosition.from_dict(origin.record["data_position"]).head != stream.start.head:
        return origin.step
    return int(origin.record["began_at"])


def _describe(
    notes: list[str], model: TensorParallelModel, batch: TunedMicroBatch, global_batch: int, settings: RunSettings
) -> None:
    layout, shards = model.layout, model.shards
    notes.append(
        f"{model.num_parameters():,} parameters ({model.num_parameters(embeddings=False):,} without embeddings), "
        f"{settings.precision}{' with float8' if settings.float8 else ''}, tp {layout.tp} x dp {layout.dp} on "
        f"{layout.device.type}, {model.group.slices} tensor slice{'s' if model.group.slices > 1 else ''}"
        f"{', sequence parallel' if settings.sequence_parallel else ''}"
        f"{', collectives overlapped' if settings.overlap_collectives else ''}"
    )
    if shards is not None:
        replicas = f", in {shards.replicas} replicas" if shards.replicas > 1 else ""
        notes.append(f"{settings.data_parallel_shard}: parameters cut into {shards.size} over dp{replicas}")
    tuned = f"; tuned in {len(batch.trials)} trials" if len(batch.trials) > 1 else ""
    notes.append(
        f"{global_batch} sequences of {settings.block_size} tokens a step: micro-batch {batch.micro_batch_size} x "
        f"accumulation {batch.gradient_accumulation_steps} x dp {layout.dp}{tuned}"
    )
