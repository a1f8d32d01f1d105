"""A run's inputs, resolved and checked before anything is built: device, model, sizes, identity with a stored run.

All functions here return what they resolved, or raise a `UsageError` that names the value, the limit and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from colonnade.checkpoint.discover import CheckpointInfo
from colonnade.checkpoint.run_record import run_record
from colonnade.config import complete_settings, load_preset
from colonnade.decoder.compilation import require_compiler
from colonnade.decoder.float8 import check_float8_sizes, require_float8
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.shard_limits import check_shards, shard_count
from colonnade.other_names import closest
from colonnade.parallel.determinism import arithmetic_of, differences, fix_arithmetic
from colonnade.parallel.mesh import ParallelLayout, local_world_size_from_environment
from colonnade.parallel.sharding import check_slices, default_slices
from colonnade.run_settings import RunSettings
from colonnade.tuning.cost_model import ParallelConfig, state_memory
from colonnade.tuning.memory import GIB
from data_processing import vocabulary_size
from run.batch_sizes import requested_global_batch
from run.data import require_vocabulary, run_tokenizer, weight_changes

FINGERPRINT_INTERVAL = 100


# ---------------------------------------------------------------------------------------------------- the inputs


def with_preset(given: Mapping[str, Any], layout: ParallelLayout, notes: list[str]) -> RunSettings:
    """Complete the given settings; if they name no model, use a preset that suits the device."""
    if all(given.get(name) is None for name in ("preset", "model_config", "init_from")):
        preset = "tiny" if layout.device.type == "cpu" else "argonne-2b"
        notes.append(f"no --preset or --model-config: using preset {preset}")
        given = {**given, "preset": preset}
    return complete_settings(given)


def resolve_device_settings(settings: RunSettings, layout: ParallelLayout, notes: list[str]) -> RunSettings:
    """Resolve what depends on the device: precision, compilation, CUDA graphs, float8. Raises UsageError."""
    on_cpu = layout.device.type == "cpu"
    settings = settings.replace(precision=resolve_precision(settings.precision, layout.device))
    if on_cpu and not settings.compile and not settings.disable_compile:
        notes.append("torch.compile is off on the CPU; --compile switches it on")
    if settings.compile and on_cpu:
        require_compiler()
    if settings.cuda_graphs and (on_cpu or not settings.compiles_on(layout.device.type)):
        missing = "there is no GPU" if on_cpu else "--disable-compile leaves none"
        raise UsageError(f"--cuda-graphs replays compiled segments on a GPU, and {missing}: leave it out")
    if settings.float8:
        require_float8(settings.precision, layout.device)
        if on_cpu:
            notes.append("--float8 is emulated on the CPU: the rounding of float8, and slower than without it")
    if settings.deterministic:
        fix_arithmetic(compiled=settings.compiles_on(layout.device.type))
    return settings


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `--precision` on this device: auto is bf16 on accelerators that support it, otherwise fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def arithmetic_of_run(settings: RunSettings, layout: ParallelLayout, micro_batch_size: Any) -> dict[str, Any]:
    """What a deterministic run's bits depend on, apart from the settings that are fixed for a run."""
    return arithmetic_of(
        layout.device,
        compiled=settings.compiles_on(layout.device.type),
        micro_batch_size=micro_batch_size,
        # These sum halves of a micro-batch, or shards of its tokens, separately.
        overlap_collectives=settings.overlap_collectives,
        sequence_parallel=settings.sequence_parallel,
    )


def resolve_model(settings: RunSettings) -> ModelConfig:
    """The architecture, with the vocabulary size from the tokenizer if it has none. Loads the tokenizer: call once."""
    entries = vocabulary_size(run_tokenizer(settings))
    config = named_model(settings, entries)
    require_vocabulary(settings, entries, config)
    return config


def named_model(settings: RunSettings, vocab_size: int | None) -> ModelConfig:
    """The architecture that --model-config, --init-from or --preset names.

    `vocab_size` is used if it does not specify one itself. Raises UsageError.
    """
    source = settings.model_config or settings.init_from
    if source is not None:
        flag = "--init-from" if settings.model_config is None else "--model-config"
        return ModelConfig.from_json(source, vocab_size=vocab_size, flag=flag)
    assert settings.preset is not None
    sizes = load_preset(settings.preset)[0]
    known = [field.name for field in fields(ModelConfig)]
    for key in sizes:
        if key not in known:
            near = closest(str(key), known)
            told = f"one of {', '.join(known)}" if near is None else f"the nearest known one is {near}"
            raise UsageError(f"preset {settings.preset}: unknown key {key!r}; {told}")
    return ModelConfig.from_dict(sizes, vocab_size=vocab_size)


def model_of_record(path: Path, record: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a checkpoint was written with. Raises UsageError."""
    try:
        return ModelConfig.from_dict(record["model_config"])
    except UsageError as error:
        raise UsageError(f"{path} is damaged ({error}); use another checkpoint") from error


def resolve_model_settings(settings: RunSettings, config: ModelConfig) -> RunSettings:
    minimum = settings.min_learning_rate
    if minimum is None and settings.schedule != "constant":
        minimum = settings.learning_rate / 10
    if settings.deterministic:
        interval = settings.fingerprint_interval
        settings = settings.replace(
            tensor_slices=settings.tensor_slices or default_slices(config),
            fingerprint_interval=FINGERPRINT_INTERVAL if interval is None else interval,
        )
    return settings.replace(
        block_size=settings.block_size or config.max_position_embeddings,
        min_learning_rate=minimum,
    )


def check_sizes(settings: RunSettings, config: ModelConfig, layout: ParallelLayout) -> None:
    """Raise UsageError for sizes that cannot be sharded or do not fit model or memory, before anything is built."""
    assert settings.block_size is not None
    if settings.block_size > config.max_position_embeddings:
        raise UsageError(
            f"--block-size {settings.block_size} is above the model's context of {config.max_position_embeddings}; "
            "give at most that"
        )
    check_slices(config, layout.tp, settings.tensor_slices)
    check_shards(settings, config, layout)
    if settings.float8:
        slices = settings.tensor_slices
        check_float8_sizes(config, settings.block_size, slices or layout.tp, fixed_slices=slices is not None)
    _require_memory(settings, config, layout)


def memory_here(device: torch.device) -> tuple[int, int]:
    """The number of ranks that share this rank's memory, and its total bytes: of the GPU, or of the machine."""
    if device.type == "cuda":
        return 1, torch.cuda.mem_get_info(device)[1]
    import psutil

    return local_world_size_from_environment(), psutil.virtual_memory().total


def _require_memory(settings: RunSettings, config: ModelConfig, layout: ParallelLayout) -> None:
    """Raise UsageError if parameters, gradients and optimizer state exceed the total memory."""
    ranks, memory = memory_here(layout.device)
    parallel = ParallelConfig(
        tp=layout.tp, optimizer=settings.optimizer, replicate_embeddings=settings.replicate_embeddings
    )
    state = state_memory(config, parallel)  # parameters first
    shards = shard_count(settings, layout.dp)
    # Before data-parallel sharding, a rank holds all parameters of its tensor-parallel shard.
    needed = max(sum(state) // shards, state[0]) * ranks
    limit, allowed = settings.memory_limit_gib, f"there are {_gib(memory)}"
    # A deterministic run's micro-batch is not tuned, which is what the limit is for.
    if limit is not None and not settings.deterministic and limit * GIB * ranks < memory:
        memory = int(limit * GIB * ranks)
        allowed = f"--memory-limit-gib {limit:g} allows {_gib(memory)}"
    if needed > memory:
        shared = f", {shards} shards" if shards > 1 else ""
        shared += f" on the {ranks} ranks of a node" if ranks > 1 else ""
        raise UsageError(
            f"parameters, gradients and optimizer state of a model of {config.num_parameters:,} parameters take "
            f"{_gib(needed)} at tp {layout.tp}{shared}, and {allowed}; use a smaller model, more tensor-parallel ranks "
            "or --data-parallel-shard"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:,.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.2g} GiB"


# --------------------------------------------------------------------------------------- identity with a stored run


def require_same_run(
    found: CheckpointInfo, settings: RunSettings, config: ModelConfig, layout: ParallelLayout
) -> Mapping[str, Any]:
    """Return the record of the folder's run; raise UsageError, naming each difference, if the settings differ."""
    record = run_record(found)
    stored = RunSettings(**record["settings"])
    old, new = stored.identity(), settings.identity()
    changed = [
        f"{name} {getattr(stored, name)} -> {getattr(settings, name)}"
        for name in {**old, **new}
        # One that says nothing under the other settings is in one of the two only, whatever its value.
        if old.get(name) != new.get(name) and getattr(stored, name) != getattr(settings, name)
    ]
    own = model_of_record(found.path, record).to_dict()
    changed += [f"{name} {own[name]} -> {value}" for name, value in config.to_dict().items() if value != own[name]]
    batch = ("initial_batch_size", "gradient_accumulation_steps", "tokens_per_step")
    if any(getattr(stored, name) != getattr(settings, name) for name in batch):
        asked = requested_global_batch(settings, layout.dp)
        if asked not in (None, record["global_batch"]):
            changed.append(f"sequences a step {record['global_batch']} -> {asked}")
    changed += arithmetic_changes(record, settings, layout)
    changed += weight_changes(record, settings)
    if changed:
        raise UsageError(
            f"{settings.checkpoint_dir} holds a run with other settings: {'; '.join(changed)}. Give the run's own "
            "(those of the folder where only --checkpoint-dir is given), another --checkpoint-dir, or change them with "
            "resume_pretrain_tensor.py"
        )
    return record


def arithmetic_changes(record: Mapping[str, Any], settings: RunSettings, layout: ParallelLayout) -> list[str]:
    """Changes, since the checkpoint, in what a deterministic run's bits depend on besides its settings."""
    if not settings.deterministic or not record["arithmetic"]:
        return []
    asked = settings.initial_batch_size
    size = record["arithmetic"].get("micro_batch_size") if asked == "auto" else int(asked)
    return differences(record["arithmetic"], arithmetic_of_run(settings, layout, size))
