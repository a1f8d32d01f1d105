"""Putting a run together: the stream opened, the model and its optimizer built, the batch settled, the origin restored.

What the three ways in (`run_setup.py`) have in common.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from colonnade.checkpoint.discover import find_checkpoints
from colonnade.checkpoint.hugging_face import load_hugging_face
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.run_lock import RunLock
from colonnade.checkpoint.saver import CheckpointSaver
from colonnade.checkpoint.single_file import load_single_file
from colonnade.config import write_settings
from colonnade.data.feed import BatchFeed
from colonnade.data.position import DataPosition
from colonnade.errors import RunError, UsageError
from colonnade.optim.loss_window import LossWindow
from colonnade.optim.optimizer import allocate_state, create_adamw, fused_keeps_bits
from colonnade.optim.schedule import CosineSchedule
from colonnade.parallel.determinism import arithmetic_of, check_micro_batches
from colonnade.parallel.mesh import ParallelLayout
from colonnade.parallel.stopping import launchers
from colonnade.parallel.vote import on_first_rank, one_line, vote
from colonnade.run_settings import RunSettings
from colonnade.telemetry.code_version import code_version
from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, fingerprint_of
from colonnade.tuning.autotuner import TunedMicroBatch, agree_over_group, plan_search, tune_micro_batch
from colonnade.tuning.memory import trial_runner
from model import ModelConfig, TensorParallelModel
from run_data import open_stream, read_validation, run_tokenizer, settle_backend, stream_notes
from run_end import record_launch
from run_inputs import (
    check_shares,
    check_step_size,
    fixed_micro_batch,
    is_compiled,
    requested_global_batch,
    require_steps_left,
)
from run_measurements import device_peak_flops
from run_report import resume_report
from run_samples import read_sample_prompts
from run_state import Run, restore_rng

SETTINGS_NAME = "run.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Origin:
    """What a run goes on from; everything empty for a fresh one.

    Attributes:
        global_batch: None: from the settings.
        began_at: the step at which the run was last changed; None: as the record says.
        libraries: versions that the checkpoint was written with.
        actions: what this start changes, for its report.
        damaged: newer checkpoints that were passed over.
    """

    path: Path | None = None
    record: Mapping[str, Any] | None = None
    step: int = 0
    keep_optimizer: bool = False
    rewarmup_steps: int = 0
    global_batch: int | None = None
    began_at: int | None = None
    allow_data_change: bool = False
    libraries: Mapping[str, str] = field(default_factory=dict)
    actions: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


# --------------------------------------------------------------------------------------------------- putting together


def assemble(
    settings: RunSettings,
    config: ModelConfig,
    layout: ParallelLayout,
    notes: list[str],
    origin: Origin,
    lock: RunLock | None,
) -> Run:
    """Open the data, build model and optimizer, settle the batch, restore the origin.

    Args:
        lock: of the run's folder, which is made and locked here where it does not exist; None for a replay, which
            writes nothing.
    """
    record = origin.record or {}
    with vote():
        global_batch = origin.global_batch or requested_global_batch(settings, layout.dp)
        check_shares(global_batch, layout.dp)
        micro_batch = fixed_micro_batch(settings, record)
        if global_batch is None and micro_batch is not None:
            global_batch = micro_batch * settings.gradient_accumulation_steps * layout.dp
        if global_batch is not None and micro_batch is not None:
            check_micro_batches(global_batch, micro_batch, layout.dp)
    # Before the model, whose building and tuning take minutes where it is large.
    tokenizer = cache(lambda: run_tokenizer(settings))  # on ranks that read only, and there once
    backend = on_first_rank(lambda: settle_backend(settings, tokenizer(), record, notes))
    with vote():
        position = DataPosition.from_dict(record["data_position"]) if record else None
        stream, chunks = None, None
        if layout.tp_rank == 0:
            stream, chunks = open_stream(
                settings, tokenizer(), backend, config, layout, position, allow_change=origin.allow_data_change
            )
            if layout.is_main:
                notes += stream_notes(stream, position)
    validation = on_first_rank(lambda: read_validation(settings, tokenizer(), backend))
    sample_prompts = None
    if lock is not None and settings.sample_interval > 0:
        context = config.max_position_embeddings
        sample_prompts = on_first_rank(lambda: read_sample_prompts(settings, tokenizer(), context))
    torch.manual_seed(settings.seed)
    model = TensorParallelModel(
        config,
        layout,
        seed=settings.seed,
        slices=settings.tensor_slices,
        replicate_embeddings=settings.replicate_embeddings,
        compute_dtype=DTYPES[settings.precision],
        gradient_checkpointing=not settings.disable_gradient_checkpointing,
        compiled=is_compiled(settings, layout),
    )
    optimizer = create_adamw(
        model,
        learning_rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=not settings.deterministic or fused_keeps_bits(model.parameters(), [count for _, count in model.pieces]),
    )
    allocate_state(optimizer)
    scaler = GradScaler(layout.device.type, enabled=settings.precision == "fp16")
    step = _restore(origin, model, optimizer, scaler, settings.init_from)
    if lock is not None:  # an audit compares by itself, and names the tensor
        _require_fingerprint(origin, model, optimizer)
    with vote():
        require_steps_left(origin.path or Path(settings.checkpoint_dir), step, settings)
    saver = None
    if lock is not None:
        on_first_rank(lambda: _make_folder(lock, is_fresh=origin.path is None))
        saver = CheckpointSaver(
            lock.directory,
            asynchronous=settings.checkpoint_mode == "async",
            hashes=settings.checkpoint_hash,
            timeout=settings.startup_timeout,
        )
        with vote():
            saver.reserve(model, optimizer)  # before the tuner looks at how much memory there is
    batch, depends_on = _tune_batch(model, settings, layout, global_batch, micro_batch)
    size = batch.micro_batch_size
    if global_batch is None:
        global_batch = size * batch.gradient_accumulation_steps * layout.dp
        check_step_size(size, settings, layout.dp)
    arithmetic = None
    if settings.deterministic:
        arithmetic = arithmetic_of(layout.device, compiled=is_compiled(settings, layout), micro_batch_size=size)
    if settings.warmup_steps >= settings.total_steps:
        notes.append(
            f"--warmup-steps {settings.warmup_steps} take up all {settings.total_steps} steps: the learning rate never "
            "comes down"
        )
    if settings.spike_action == "skip" and settings.spike_sigma == 0:
        notes.append("--spike-action skip: no step is skipped for a spike while --spike-sigma is 0")
    _describe(notes, model, batch, global_batch, settings)
    run = Run(
        settings=settings,
        layout=layout,
        config=config,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        schedule=_schedule(settings, origin, step),
        feed=BatchFeed(
            chunks,
            layout,
            global_batch,
            settings.block_size or 0,
            first=stream.start.chunk if stream is not None else 0,
            apart=stream.apart if stream is not None else 1,
        ),
        stream=stream,
        validation=validation,
        batch=batch,
        batch_depends_on=depends_on,
        global_batch=global_batch,
        tokenizer_backend=backend,
        peak_flops=device_peak_flops(layout.device, settings.precision),
        losses=LossWindow(settings.spike_window, layout.device, record.get("loss_window") or ()),
        code=on_first_rank(code_version),
        arithmetic=arithmetic,
        began_at=record.get("began_at", 0) if origin.began_at is None else origin.began_at,
        step=step,
        tokens_seen=record.get("tokens_seen", 0),
        position=stream.start if stream is not None else None,
        loss=record.get("loss"),
        skipped_steps=record.get("skipped_steps") or 0,
        skipped_in_row=record.get("skipped_in_row") or 0,
        resumed_from=origin.path,
        damaged=origin.damaged,
        saver=saver,
        sample_prompts=sample_prompts,
        tokenizer=tokenizer() if layout.tp_rank == 0 else None,
        lock=lock,
        notes=notes,
    )
    if origin.path is not None:
        notes.append(resume_report(run, record, origin.libraries, origin.actions))
    if lock is not None:
        names = launchers()
        on_first_rank(lambda: _record_start(run, names))
    return run


def _make_folder(lock: RunLock, *, is_fresh: bool) -> None:
    """Make the run's folder and lock it, where it was not there when the run was started."""
    try:
        lock.take(create=True)
    except OSError as error:
        raise RunError(f"{lock.directory} cannot be made: {error.strerror or error}") from error
    if is_fresh and find_checkpoints(lock.directory):
        raise UsageError(f"--checkpoint-dir {lock.directory} was filled by another job meanwhile; start again")


def _record_start(run: Run, launched_by: list[str]) -> None:
    """Write what this start is into the run's folder."""
    try:
        write_settings(run.settings, run.directory / SETTINGS_NAME)
        record_launch(run.directory, launched_by, run.step)
    except OSError as error:
        raise RunError(f"{run.directory}: the start cannot be recorded: {error.strerror or error}") from error


def _restore(
    origin: Origin,
    model: TensorParallelModel,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    init_from: str | None,
) -> int:
    """Load what the origin holds, or a fresh run's first weights; returns the optimizer steps taken so far."""
    if origin.path is None:
        if init_from is not None:
            with vote():
                load_hugging_face(Path(init_from), model=model, vocabulary_size=model.config.vocab_size)
        return 0
    record, path = origin.record, origin.path
    if not record:
        with vote():
            info = load_single_file(path, model=model, vocabulary_size=model.config.vocab_size)
            if info.step is not None and info.step < 0:
                raise UsageError(f"{path} says it is at step {info.step}; a step is at least 0")
        return info.step or origin.step
    try:
        load_model_and_optimizer(path, model=model, optimizer=optimizer if origin.keep_optimizer else None)
    except RunError as error:  # on all ranks
        raise UsageError(f"{error}; use another checkpoint") from error
    with vote():
        try:
            if origin.keep_optimizer and record.get("scaler") and scaler.is_enabled():
                scaler.load_state_dict(record["scaler"])
            restore_rng(record["rng"], model.layout.device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{path}: its loss scale or random state is damaged ({one_line(error)})") from error
    return origin.step


def _require_fingerprint(origin: Origin, model: TensorParallelModel, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a checkpoint whose tensors, as they were restored, are not those its manifest tells of."""
    record = origin.record or {}
    if record.get("fingerprint") is None:
        return
    found = fingerprint_of(model, optimizer if origin.keep_optimizer else None)
    found.require_equal_copies(origin.step)
    for key, what in zip(FINGERPRINT_KEYS, ("parameters", "optimizer's moments"), strict=True):
        if key == "moments_fingerprint" and not origin.keep_optimizer:
            continue
        if record[key] not in (None, found.columns()[key]):
            raise UsageError(
                f"{origin.path} is damaged: its {what} do not have the fingerprint that its manifest records; use "
                "another checkpoint (move this one away: the newest is taken)"
            )


def _schedule(settings: RunSettings, origin: Origin, step: int) -> CosineSchedule:
    """The run's schedule. A second warm-up under way in the checkpoint goes on where the optimizer is kept."""
    rewarmup_start, rewarmup_steps = step, origin.rewarmup_steps
    if origin.keep_optimizer and origin.record:
        stored = origin.record["schedule"]
        rewarmup_start, rewarmup_steps = stored["rewarmup_start"], stored["rewarmup_steps"]
    assert settings.min_learning_rate is not None
    return CosineSchedule(
        peak=settings.learning_rate,
        minimum=settings.min_learning_rate,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.total_steps,
        rewarmup_start=rewarmup_start,
        rewarmup_steps=rewarmup_steps,
    )


def _describe(
    notes: list[str], model: TensorParallelModel, batch: TunedMicroBatch, global_batch: int, settings: RunSettings
) -> None:
    layout = model.layout
    notes.append(
        f"{model.num_parameters():,} parameters ({model.num_parameters(embeddings=False):,} without embeddings), "
        f"{settings.precision}, tp {layout.tp} x dp {layout.dp} on {layout.device.type}, "
        f"{model.group.slices} tensor slice{'s' if model.group.slices > 1 else ''}"
    )
    tuned = f"; tuned in {len(batch.trials)} trials" if len(batch.trials) > 1 else ""
    notes.append(
        f"{global_batch} sequences of {settings.block_size} tokens a step: micro-batch {batch.micro_batch_size} x "
        f"accumulation {batch.gradient_accumulation_steps} x dp {layout.dp}{tuned}"
    )


# ------------------------------------------------------------------------------------------------------ the batch


def _tune_batch(
    model: TensorParallelModel,
    settings: RunSettings,
    layout: ParallelLayout,
    global_batch: int | None,
    micro_batch: int | None,
) -> tuple[TunedMicroBatch, dict[str, Any]]:
    """The micro-batch for these ranks, and what it depends on. `global_batch` None: it follows from the answer."""
    if micro_batch is not None and global_batch is not None:
        plan = plan_search(micro_batch, chunks_per_rank=global_batch // layout.dp)
        return TunedMicroBatch(micro_batch, global_batch // layout.dp // micro_batch, (), plan), {}
    initial = None if settings.initial_batch_size == "auto" else int(settings.initial_batch_size)
    if global_batch is None:
        plan = plan_search(initial, gradient_accumulation_steps=settings.gradient_accumulation_steps)
    else:
        plan = plan_search(initial, chunks_per_rank=global_batch // layout.dp)
    on_cuda = layout.device.type == "cuda"
    depends_on = {
        "device": torch.cuda.get_device_name(layout.device) if on_cuda else "cpu",
        "device_bytes": torch.cuda.mem_get_info(layout.device)[1] if on_cuda else None,
        "memory_limit_gib": settings.memory_limit_gib,
        "model": model.config.to_dict(),
        "block_size": settings.block_size,
        "tp": layout.tp,
        "dp": layout.dp,
        "precision": settings.precision,
        "compile": is_compiled(settings, layout),
        "gradient_checkpointing": not settings.disable_gradient_checkpointing,
        "replicate_embeddings": settings.replicate_embeddings,
        "document_mask": settings.document_mask,
        "tensor_slices": settings.tensor_slices,
        "torch": torch.__version__,
    }

    def probe(size: int) -> float:
        warm = on_cuda or is_compiled(settings, layout)
        return _probe_seconds(model, size, settings.block_size or 0, warm=warm, document_mask=settings.document_mask)

    tuned = tune_micro_batch(
        plan,
        trial_runner(layout.device, probe, settings.memory_limit_gib),
        agree_over_group(None, "cpu"),
        directory=Path(settings.checkpoint_dir),
        depends_on=depends_on,
        is_writer=layout.is_main,
    )
    return tuned, depends_on


def _probe_seconds(model: TensorParallelModel, size: int, block: int, *, warm: bool, document_mask: bool) -> float:
    """Time of a forward and backward pass of this rank's share alone, at a micro-batch of `size`.

    With `document_mask` each block is one document: there is no larger one, and none costs more.
    """
    device = model.layout.device
    tokens = torch.zeros((size, block), dtype=torch.int64, device=device)
    starts = torch.zeros_like(tokens, dtype=torch.bool) if document_mask else None
    begin = 0.0
    with model.group.collectives_as_identity():
        # Accumulated gradients are in memory during every micro-batch but the first, so they are in the second pass.
        for _ in range(2 if warm else 1):
            begin = time.perf_counter()
            model(tokens, tokens, starts).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - begin
