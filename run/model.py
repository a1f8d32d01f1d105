"""What a run trains: model and optimizer, built from its settings, fresh or restored from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from colonnade.checkpoint.hugging_face import load_hugging_face
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.single_file import load_single_file
from colonnade.errors import RunError, UsageError
from colonnade.optim.optimizer import allocate_state, create_optimizer, fused_keeps_bits
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings
from colonnade.runtime.vote import one_line, vote
from colonnade.telemetry.fingerprint import FINGERPRINT_KEYS, fingerprint_of
from model import ModelConfig, TensorParallelModel
from run.state import restore_rng

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Origin:
    """What a run resumes from; all fields have their defaults for a fresh run.

    Attributes:
        path: the checkpoint; None for a fresh run.
        record: what its manifest says about the run; empty for a single file.
        global_batch: sequences per step; None to derive it from the settings.
        began_at: the step at which the run was last changed; None to take it from the record, unless the data have
            changed.
        libraries: library versions that the checkpoint was written with.
        actions: what this start changes, for its report.
        damaged: newer checkpoints that were skipped.
        owes_end: the run has taken its last step, but was interrupted before its end.
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
    owes_end: bool = False


def build_model(
    settings: RunSettings, config: ModelConfig, layout: ParallelLayout, precision: str
) -> TensorParallelModel:
    """Build a run's model, sharded as its settings say, with the initial weights of its seed. Collective."""
    mode = settings.data_parallel_shard
    if mode != "none":
        layout = layout.sharded(settings.data_parallel_replicate_size)
    model = TensorParallelModel(
        config,
        layout,
        seed=settings.seed,
        slices=settings.tensor_slices,
        replicate_embeddings=settings.replicate_embeddings,
        compute_dtype=DTYPES[precision],
        activation_checkpointing=settings.checkpointing,
        compiled=settings.compiles_on(layout.device.type),
        cuda_graphs=settings.cuda_graphs,
        float8=settings.float8,
        sequence_parallel=settings.sequence_parallel,
        overlap_collectives=settings.overlap_collectives,
        z_loss=settings.z_loss,
        shares_memory=not settings.plain_step,
        overlap_weight_gradients=not settings.plain_step,
    )
    if layout.shard_mesh is not None:
        # The deterministic mode gathers parameters and sums gradients in the parameters' dtype.
        lower = precision != "fp32" and not settings.deterministic
        model.share_out(
            mode=mode, fixed_order=settings.deterministic, gather_dtype=DTYPES[precision] if lower else None
        )
    return model


def build_optimizer(model: TensorParallelModel, settings: RunSettings) -> torch.optim.Optimizer:
    """Build a run's optimizer and allocate its state."""
    keeps_bits = fused_keeps_bits(model.parameters(), [count for _, count in model.pieces])
    optimizer = create_optimizer(model, settings, fused=not settings.deterministic or keeps_bits)
    allocate_state(optimizer)
    return optimizer


@dataclass(frozen=True)
class State:
    """What a run trains, as built or restored, and the number of optimizer steps taken so far."""

    model: TensorParallelModel
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    step: int


def build_state(
    settings: RunSettings, config: ModelConfig, layout: ParallelLayout, origin: Origin, *, compares: bool
) -> State:
    """Build and restore model, optimizer and loss scale. `compares`: check the tensors' recorded fingerprint."""
    torch.manual_seed(settings.seed)
    model = build_model(settings, config, layout, settings.precision)
    optimizer = build_optimizer(model, settings)
    scaler = GradScaler(layout.device.type, enabled=settings.precision == "fp16")
    step = _restore(origin, model, optimizer, scaler, settings.init_from)
    if compares:  # an audit does its own comparison, which names the tensor
        _require_fingerprint(origin, model, optimizer)
    return State(model, optimizer, scaler, step)


def _restore(
    origin: Origin,
    model: TensorParallelModel,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    init_from: str | None,
) -> int:
    """Load the origin's checkpoint, or --init-from for a fresh run; return the number of optimizer steps taken."""
    if origin.path is None:
        if init_from is not None:
            with vote():
                load_hugging_face(Path(init_from), model=model, vocabulary_size=model.config.vocab_size)
        return 0
    record, path = origin.record, origin.path
    if not record:
        with vote():
            step = load_single_file(path, model=model, vocabulary_size=model.config.vocab_size)
            if step is not None and step < 0:
                raise UsageError(f"{path} says it is at step {step}; a step is at least 0")
        return step or origin.step
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
    """Raise UsageError if the restored tensors do not have the fingerprint recorded in the manifest."""
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
