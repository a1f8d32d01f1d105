"""Everything that is decided before step one: ranks, inputs, the model, the batch, and the state to start from.

`start_run` serves `training.py`: a fresh run, or exactly where its newest checkpoint stands. `resume_run` serves
`resume_pretrain_tensor.py`: a checkpoint, with settings changed. `replay_run` serves `audit_run.py`: a deterministic
run as it once stood. All end in a `training_utils.Run`.

Bad input is found before the first step, and where it can be before anything is built (`run_inputs.py`). Each check
runs on one rank or on all, and its outcome is shared (`colonnade.parallel.vote`), so that all ranks leave together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.prune import collect_leftovers
from colonnade.checkpoint.run_record import run_record
from colonnade.checkpoint.single_file import load_single_file
from colonnade.config import (
    ResumeSettings,
    RunSettings,
    check_contradictions,
    override,
    write_settings,
)
from colonnade.data.feed import BatchFeed
from colonnade.data.position import DataPosition
from colonnade.errors import RunError, UsageError
from colonnade.optim.optimizer import allocate_state, create_adamw, fused_keeps_bits
from colonnade.optim.schedule import CosineSchedule
from colonnade.parallel.determinism import arithmetic_of, check_micro_batches, halving_sizes
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from colonnade.parallel.vote import on_first_rank, one_line, vote
from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, fingerprint_of
from colonnade.tuning.autotuner import TunedMicroBatch, agree_over_group, plan_search, tune_micro_batch
from colonnade.tuning.memory import trial_runner
from model import ModelConfig, TensorParallelModel
from run_data import open_stream, read_validation, resolve_data, settle_backend, stream_notes, weight_changes
from run_inputs import (
    arithmetic_changes,
    batch_of_resumed,
    check_shares,
    check_sizes,
    check_step_size,
    describe_changes,
    find_checkpoint,
    fixed_micro_batch,
    is_compiled,
    model_of_record,
    newest_checkpoint,
    requested_global_batch,
    require_no_other_run,
    require_own_model,
    require_same_run,
    require_steps_left,
    resolve_device_settings,
    resolve_model,
    resolve_model_settings,
    with_preset,
)
from training_utils import Run, device_peak_flops, restore_rng

SETTINGS_NAME = "run.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------ the two ways in


def start_run(given: Mapping[str, Any]) -> Run | None:
    """A fresh run, or the one in the checkpoint folder exactly where its newest checkpoint stands.

    Args:
        given: settings by name, as `parse_training` returns them.

    Returns:
        None where the folder's run is finished: one line has said so, and nothing is read or written.

    Raises:
        UsageError: input that cannot work, or the folder holds a run with other settings.
    """
    layout = init_parallel(given.get("tensor_parallel_size"))
    notes: list[str] = []
    settings = resolve_device_settings(with_preset(given, layout, notes), layout, notes)
    directory = Path(settings.checkpoint_dir)
    found = on_first_rank(lambda: newest_checkpoint(directory))
    if found is None:
        fixed_micro_batch(settings, {})
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: resolve_model(settings))
    settings = resolve_model_settings(settings, config)

    def check() -> Mapping[str, Any]:
        with vote():
            check_sizes(settings, config, layout)
            return {} if found is None else require_same_run(found, settings, config, layout)

    record = check()
    # Not before the run is known to be this one: in another's folder a leftover may be a save that is under way.
    if on_first_rank(lambda: bool(collect_leftovers(directory))):
        found = on_first_rank(lambda: newest_checkpoint(directory))
        record = check()
    if found is None:
        return _assemble(settings, config, layout, notes, _Origin())
    step = found.step or 0
    if step >= settings.total_steps:
        _say_finished(found, settings, layout)
        return None
    notes.append(f"going on from {found.path} (step {step}), exactly as it stopped")
    origin = _Origin(found.path, record, step, keep_optimizer=True, global_batch=record["global_batch"])
    return _assemble(settings, config, layout, notes, origin)


def resume_run(resume: ResumeSettings, given: Mapping[str, Any]) -> Run | None:
    """The run of a checkpoint, its settings overridden by those given.

    Returns:
        None where the run is finished and was to go on exactly: one line has said so.

    Raises:
        UsageError: no usable checkpoint, or settings that cannot work with it.
    """
    layout = init_parallel(given.get("tensor_parallel_size"))
    found = on_first_rank(lambda: find_checkpoint(Path(resume.checkpoint_path)))
    notes: list[str] = []
    with vote():
        record = run_record(found)
        if not record and resume.keep_optimizer:
            raise UsageError(f"--keep-optimizer: {found.path} holds no optimizer state; leave the flag out")
        own = {**record.get("settings", {}), "checkpoint_dir": str(found.path.parent)}
        own["tensor_parallel_size"] = None  # as many ranks as this launch has, unless it says otherwise
        if record:
            require_own_model(found.path, own, given)
            settings = check_contradictions(RunSettings(**override(own, given)))
        else:
            settings = with_preset(override(own, given), layout, notes)
    settings = resolve_device_settings(settings, layout, notes)
    if found.step == settings.total_steps and resume.keep_optimizer:
        _say_finished(found, settings, layout)
        return None
    with vote():
        require_steps_left(found.path, found.step or 0, settings)
    on_first_rank(lambda: require_no_other_run(found, Path(settings.checkpoint_dir)))
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: model_of_record(found.path, record) if record else resolve_model(settings))
    settings = resolve_model_settings(settings, config)
    with vote():
        check_sizes(settings, config, layout)
        global_batch = batch_of_resumed(record, settings, given, layout)
    notes.append(f"resuming from {found.path}" + (f" (step {found.step})" if found.step is not None else ""))
    changes = describe_changes(record, settings, layout, global_batch)
    if not resume.keep_optimizer:
        changes.append(f"optimizer state reset; learning rate warmed up again over {resume.rewarmup_steps} steps")
    if not record:
        changes.append("weights only: the data starts from its beginning")
    notes.append("changed since the checkpoint: " + ("; ".join(changes) if changes else "nothing"))
    exact = (
        resume.keep_optimizer
        and settings.identity() == RunSettings(**record["settings"]).identity()
        and global_batch == record["global_batch"]
        and not arithmetic_changes(record, settings, layout)
        and not weight_changes(record, settings)
        and not resume.allow_data_change
    )
    origin = _Origin(
        found.path,
        record,
        found.step or 0,
        keep_optimizer=resume.keep_optimizer,
        rewarmup_steps=resume.rewarmup_steps,
        global_batch=global_batch,
        began_at=None if exact else found.step or 0,
        allow_data_change=resume.allow_data_change,
    )
    return _assemble(settings, config, layout, notes, origin)


def replay_run(
    layout: ParallelLayout,
    directory: Path,
    first: int,
    last: int,
    *,
    data_glob: str | None = None,
    tokenizer_path: str | None = None,
) -> Run:
    """The deterministic run of a folder as it stood at its newest checkpoint up to step `first`, or at its beginning.

    Nothing is written. The settings are those under which the steps up to `last` were trained, as the next checkpoint
    says; `data_glob` and `tokenizer_path` say where the run's data are now, if they have moved. What was restored is
    not compared with its fingerprint.

    Raises:
        UsageError: the run is not deterministic, was changed in this stretch, needs another machine or other ranks, or
            has no complete checkpoint; or the data are not those it was trained on.
    """
    start, told_by = on_first_rank(lambda: _checkpoints_around(directory, first, last))
    begin = 0 if start is None else start.step or 0
    notes: list[str] = []
    with vote():
        own = run_record(start) if start is not None else {}
        record = run_record(told_by)
        settings = RunSettings(**record["settings"]).replace(
            tensor_parallel_size=layout.tp, checkpoint_dir=str(directory), validation_glob=None
        )
        moved = {"data_glob": data_glob, "tokenizer_path": tokenizer_path}
        settings = settings.replace(**{name: value for name, value in moved.items() if value is not None})
        if not settings.deterministic:
            raise UsageError(f"--run {directory} was not trained with --deterministic: its bits depend on its ranks")
        _require_workable_ranks(record, settings, layout)
        changed = arithmetic_changes(record, settings, layout) + weight_changes(record, settings)
        if changed:
            raise UsageError(
                f"--run {directory} cannot be audited here, where other bits are right: {'; '.join(changed)}"
            )
        if begin <= record["began_at"] and record["began_at"] > 0:
            raise UsageError(
                f"--run {directory} was changed with resume_pretrain_tensor.py at step {record['began_at']}: audit it "
                "up to that step, or from a later checkpoint on"
            )
    settings = resolve_device_settings(settings, layout, notes)
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: model_of_record(told_by.path, record))
    with vote():
        check_sizes(settings, config, layout)
    path = None if start is None else start.path
    # Other data are refused here, in an audit's own words, and from the beginning too, where there is no position.
    origin = _Origin(path, own, begin, keep_optimizer=True, global_batch=record["global_batch"], allow_data_change=True)
    run = _assemble(settings, config, layout, notes, origin, is_replay=True)
    with vote():
        if run.stream is not None:
            differences = DataPosition.from_dict(record["data_position"]).head.differences(run.stream.start.head)
            if differences:
                raise UsageError(f"--data-glob or --tokenizer-path: not the run's data: {'; '.join(differences)}")
    return run


def _require_workable_ranks(record: Mapping[str, Any], settings: RunSettings, layout: ParallelLayout) -> None:
    tensor_sizes = halving_sizes(settings.tensor_slices or 1)
    data_sizes = halving_sizes(record["global_batch"] // (fixed_micro_batch(settings, record) or 1))
    if layout.tp not in tensor_sizes or layout.dp not in data_sizes:
        counts = sorted({tensor * data for tensor in tensor_sizes for data in data_sizes})
        raise UsageError(
            f"{layout.tp} tensor-parallel x {layout.dp} data-parallel ranks cannot take this run's steps; numbers of "
            f"ranks that can: {', '.join(map(str, counts))}, with --tensor-parallel-size one of "
            f"{', '.join(map(str, tensor_sizes))} and {', '.join(map(str, data_sizes))} times as many ranks"
        )


def _checkpoints_around(directory: Path, first: int, last: int | None) -> tuple[CheckpointInfo | None, CheckpointInfo]:
    """The newest checkpoint of a run up to step `first`, and the first from `last` on (else the newest)."""
    found = [info for info in find_checkpoints(directory) if info.manifest is not None]
    if not found:
        raise UsageError(f"--run {directory} holds no complete checkpoint; give a run's folder")
    start = next((info for info in found if (info.step or 0) <= first), None)
    later = [info for info in found if last is not None and (info.step or 0) >= last]
    return start, later[-1] if later else found[0]


@dataclass(frozen=True)
class _Origin:
    """What a run goes on from; everything empty for a fresh one.

    Attributes:
        global_batch: None: from the settings.
        began_at: the step at which the run was last changed; None: as the record says.
    """

    path: Path | None = None
    record: Mapping[str, Any] | None = None
    step: int = 0
    keep_optimizer: bool = False
    rewarmup_steps: int = 0
    global_batch: int | None = None
    began_at: int | None = None
    allow_data_change: bool = False


def _say_finished(found: CheckpointInfo, settings: RunSettings, layout: ParallelLayout) -> None:
    if layout.is_main:
        print(
            f"{found.path} is at the last of {settings.total_steps} steps: the run is finished, nothing was changed; "
            f"resume_pretrain_tensor.py --checkpoint-path {found.path.parent} --total-steps N trains it for longer"
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


# --------------------------------------------------------------------------------------------------- putting together


def _assemble(
    settings: RunSettings,
    config: ModelConfig,
    layout: ParallelLayout,
    notes: list[str],
    origin: _Origin,
    *,
    is_replay: bool = False,
) -> Run:
    """Open the data, build model and optimizer, settle the batch, restore the origin. A replay writes nothing."""
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
    backend = on_first_rank(lambda: settle_backend(settings, record, notes))
    with vote():
        position = DataPosition.from_dict(record["data_position"]) if record else None
        stream, chunks = None, None
        if layout.tp_rank == 0:
            stream, chunks = open_stream(
                settings, backend, config, layout, position, allow_change=origin.allow_data_change
            )
            if layout.is_main:
                notes += stream_notes(stream, position)
    validation = on_first_rank(lambda: read_validation(settings, backend))
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
    step = _restore(origin, model, optimizer, scaler)
    if not is_replay:  # an audit compares by itself, and names the tensor
        _require_fingerprint(origin, model, optimizer)
    with vote():
        require_steps_left(origin.path or Path(settings.checkpoint_dir), step, settings)
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
        arithmetic=arithmetic,
        began_at=record.get("began_at", 0) if origin.began_at is None else origin.began_at,
        step=step,
        tokens_seen=record.get("tokens_seen", 0),
        position=stream.start if stream is not None else None,
        loss=record.get("loss"),
        resumed_from=origin.path,
        notes=notes,
    )
    if not is_replay:
        on_first_rank(lambda: _record_settings(run))
    return run


def _record_settings(run: Run) -> None:
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
        write_settings(run.settings, run.directory / SETTINGS_NAME)
    except OSError as error:
        raise RunError(f"{run.directory / SETTINGS_NAME} cannot be written: {error.strerror or error}") from error


def _restore(origin: _Origin, model: TensorParallelModel, optimizer: torch.optim.Optimizer, scaler: GradScaler) -> int:
    """Load what the origin holds; returns the optimizer steps taken so far."""
    if origin.path is None:
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


def _require_fingerprint(origin: _Origin, model: TensorParallelModel, optimizer: torch.optim.Optimizer) -> None:
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


def _schedule(settings: RunSettings, origin: _Origin, step: int) -> CosineSchedule:
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
