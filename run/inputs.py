"""What a run is started with, settled and checked before anything is built: folder, model, data, sizes, batch.

Everything here either returns what it settled or raises a `UsageError` that names the value, the limit and what to do.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints, none_usable, survey
from colonnade.checkpoint.manifest import step_of_name
from colonnade.checkpoint.prune import collect_leftovers
from colonnade.checkpoint.run_lock import RunLock
from colonnade.checkpoint.run_record import run_record
from colonnade.checkpoint.verify import newest_verified
from colonnade.command_settings import ResumeSettings
from colonnade.config import complete_settings, load_preset
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.shard_limits import check_shards, shard_count
from colonnade.parallel.compilation import require_compiler
from colonnade.parallel.determinism import arithmetic_of, differences, fix_arithmetic
from colonnade.parallel.float8 import check_float8_sizes, require_float8
from colonnade.parallel.mesh import ParallelLayout, local_world_size_from_environment
from colonnade.parallel.sharding import check_slices, default_slices
from colonnade.run_settings import MAX_TOKENS_PER_STEP, RunSettings
from colonnade.tuning.batch_record import micro_batch_candidates
from colonnade.tuning.cost_model import Placement, state_memory
from colonnade.tuning.memory import GIB
from data_processing import vocabulary_size
from run.data import require_vocabulary, run_tokenizer, weight_changes
from run.end import step_of_launch

FINGERPRINT_INTERVAL = 100


# --------------------------------------------------------------------------------------------------- the run's folder


def newest_checkpoint(directory: Path, settings: RunSettings) -> tuple[CheckpointInfo | None, tuple[Path, ...]]:
    """The checkpoint that a run goes on from exactly, and the damaged ones that were passed over. Collective."""
    found, damaged = newest_verified(directory, compare_hashes=settings.checkpoint_hash)
    if found is not None and found.manifest is None:
        raise UsageError(
            f"{directory} holds the single file {found.path.name}, which has no run to go on with exactly; "
            f"use resume_pretrain_tensor.py --checkpoint-path {found.path}, or another --checkpoint-dir"
        )
    return found, tuple(item.path for item in damaged)


def clear_leftovers(lock: RunLock) -> bool:
    """Clear away what dead runs left in the lock's folder; whether a checkpoint came to light by it.

    Where the lock is not held a leftover may be a save that is under way, and stays.
    """
    if not lock.is_held:
        return False
    before = [info.path for info in find_checkpoints(lock.directory)]
    collect_leftovers(lock.directory)
    return [info.path for info in find_checkpoints(lock.directory)] != before


def attempt_of_launch(resume: ResumeSettings, checkpoint_dir: str | None, launched_by: list[str]) -> ResumeSettings:
    """`resume`, or what a second attempt of the same launch has to do: go on exactly with what the first one saved.

    torchrun's `--max-restarts` repeats the command, and with it the reset of the optimizer and the warm-up.
    """
    path = Path(resume.checkpoint_path)
    try:
        of_run = path.parent if path.is_file() or step_of_name(path.name) is not None else path
        directory = Path(checkpoint_dir or of_run)
        began = step_of_launch(directory, launched_by)
        saved = [] if began is None else [info.step for info in find_checkpoints(directory) if not info.is_single_file]
    except OSError:  # the search for the checkpoint will say what is wrong with the path
        return resume
    if began is None or not saved or (saved[0] or 0) <= began:
        return resume
    return replace(resume, checkpoint_path=str(directory), keep_optimizer=True)


def require_writable(directory: Path) -> None:
    """Refuse a folder that could not take the first checkpoint, hours from now. Creates nothing."""
    existing = directory.absolute()
    try:
        while not _is_there(existing):
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"--checkpoint-dir {directory} cannot be written ({error.strerror}); give a folder that can"
        ) from error


def _is_there(path: Path) -> bool:
    """Whether `path` names something, be it a link to nothing. Raises OSError where it cannot be a name."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def require_own_model(path: Path, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """A checkpoint has its architecture and its weights: refuse to be told others, rather than ignore it."""
    for name in ("preset", "model_config", "init_from", "seed"):
        value = given.get(name)
        if value is not None and value != own.get(name):
            what = "weights" if name == "seed" else "an architecture"
            raise UsageError(f"{name} {value}: {path} has {what} of its own ({name} {own.get(name)}); leave it out")


def require_no_other_run(found: CheckpointInfo, directory: Path, damaged: Collection[Path]) -> None:
    """Refuse a folder whose newest checkpoint would not be this run's: the next start there would take that one."""
    complete, incomplete = survey(directory)
    there = next((info for info in complete if info.path not in damaged), None)
    if there is None:
        refusal = none_usable(directory, incomplete)
        if refusal is not None:
            raise UsageError(refusal)
        return
    if there.path.resolve() == found.path.resolve():
        return
    if directory.resolve() != found.path.parent.resolve() or (there.step or 0) > (found.step or 0):
        raise UsageError(
            f"--checkpoint-dir {directory} holds {there.path.name}, which does not come from {found.path}; "
            "go on from that one, move it away, or give another --checkpoint-dir"
        )


def require_steps_left(path: Path, step: int, settings: RunSettings) -> None:
    if step >= settings.total_steps:
        raise UsageError(
            f"--total-steps {settings.total_steps} leaves nothing to do: {path} is at step {step}; give more than that"
        )


# ---------------------------------------------------------------------------------------------------- the inputs


def with_preset(given: Mapping[str, Any], layout: ParallelLayout, notes: list[str]) -> RunSettings:
    """The settings given, with a model that suits the device for those who named none."""
    if all(given.get(name) is None for name in ("preset", "model_config", "init_from")):
        preset = "tiny" if layout.device.type == "cpu" else "argonne-2b"
        notes.append(f"no --preset or --model-config: using preset {preset}")
        given = {**given, "preset": preset}
    return complete_settings(given)


def resolve_device_settings(settings: RunSettings, layout: ParallelLayout, notes: list[str]) -> RunSettings:
    """Settle what depends on the device: precision and compilation."""
    on_cpu = layout.device.type == "cpu"
    settings = settings.replace(precision=resolve_precision(settings.precision, layout.device))
    if on_cpu and not settings.compile and not settings.disable_compile:
        notes.append("torch.compile is off on the CPU; --compile switches it on")
    if settings.compile and on_cpu:
        require_compiler()
    if settings.cuda_graphs and (on_cpu or not is_compiled(settings, layout)):
        missing = "there is no GPU" if on_cpu else "--disable-compile leaves none"
        raise UsageError(f"--cuda-graphs replays compiled segments on a GPU, and {missing}: leave it out")
    if settings.float8:
        require_float8(settings.precision, layout.device)
        if on_cpu:
            notes.append("--float8 is emulated on the CPU: the rounding of float8, and slower than without it")
    if settings.deterministic:
        fix_arithmetic(compiled=is_compiled(settings, layout))
    return settings


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `--precision` means on this device: auto is bf16 on accelerators that have it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type != "cpu" and torch.cuda.is_bf16_supported() else "fp32"


def is_compiled(settings: RunSettings, layout: ParallelLayout) -> bool:
    off = settings.disable_compile or settings.plain_step
    return settings.compile or (layout.device.type != "cpu" and not off)


def arithmetic_of_run(settings: RunSettings, layout: ParallelLayout, micro_batch_size: Any) -> dict[str, Any]:
    """What a deterministic run's bits depend on besides the settings that are fixed for it."""
    return arithmetic_of(
        layout.device,
        compiled=is_compiled(settings, layout),
        micro_batch_size=micro_batch_size,
        # Halves of a micro-batch, and shares of its tokens, are summed by themselves.
        overlap_collectives=settings.overlap_collectives,
        sequence_parallel=settings.sequence_parallel,
    )


def resolve_model(settings: RunSettings) -> ModelConfig:
    """The architecture, its vocabulary from the tokenizer where it names none. Loads the tokenizer: call it once."""
    entries = vocabulary_size(run_tokenizer(settings))
    config = named_model(settings, entries)
    require_vocabulary(settings, entries, config)
    return config


def named_model(settings: RunSettings, vocab_size: int | None) -> ModelConfig:
    """The architecture that --model-config, --init-from or --preset names.

    `vocab_size` is used where it names none itself.
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
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UsageError(f"preset {settings.preset}: unknown key {key!r}; the nearest known one is {near!r}")
    return ModelConfig.from_dict(sizes, vocab_size=vocab_size)


def model_of_record(path: Path, record: Mapping[str, Any]) -> ModelConfig:
    """The architecture a checkpoint was written with."""
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
    """Refuse what cannot be cut or does not fit the model, before anything is built."""
    assert settings.block_size is not None
    if settings.block_size > config.max_position_embeddings:
        raise UsageError(
            f"--block-size {settings.block_size} is above the model's context of {config.max_position_embeddings}; "
            "give at most that"
        )
    check_slices(config, layout.tp, settings.tensor_slices)
    check_shards(settings, config, layout)
    if settings.float8:
        slices = settings.tensor_slices or layout.tp
        check_float8_sizes(
            {
                "the hidden size": config.hidden_size,
                "the width of the heads": config.num_attention_heads * config.head_dim // slices,
                "the width of queries, keys and values": config.head_dim
                * (config.num_attention_heads // slices + 2 * max(1, config.num_key_value_heads // slices)),
                "the feed-forward": config.intermediate_size // slices,
                "the block size": settings.block_size,
            },
            slices,
        )
    _require_memory(settings, config, layout)


def _require_memory(settings: RunSettings, config: ModelConfig, layout: ParallelLayout) -> None:
    """Refuse a model whose parameters, gradients and optimizer state exceed all the memory there is."""
    if layout.device.type == "cuda":
        ranks, memory = 1, torch.cuda.mem_get_info(layout.device)[1]
    else:
        import psutil

        ranks, memory = local_world_size_from_environment(), psutil.virtual_memory().total
    placement = Placement(
        tp=layout.tp, optimizer=settings.optimizer, replicate_embeddings=settings.replicate_embeddings
    )
    state = state_memory(config, placement)  # parameters first
    shards = shard_count(settings, layout.dp)
    # Before they are shared out a rank holds the parameters of its tensor-parallel part.
    needed = max(sum(state) // shards, state[0]) * ranks
    if needed > memory:
        shared = f", {shards} shards" if shards > 1 else ""
        shared += f" on the {ranks} ranks of a node" if ranks > 1 else ""
        raise UsageError(
            f"parameters, gradients and optimizer state of a model of {config.num_parameters:,} parameters take "
            f"{needed // GIB:,} GiB at tp {layout.tp}{shared}, and there are {memory // GIB:,} GiB; use a smaller "
            "model, more tensor-parallel ranks or --data-parallel-shard"
        )


# --------------------------------------------------------------------------------------------- is it the same run


def require_same_run(
    found: CheckpointInfo, settings: RunSettings, config: ModelConfig, layout: ParallelLayout
) -> Mapping[str, Any]:
    """The record of the run in the folder. Refuse to go on with it under other settings, naming each that differs."""
    record = run_record(found)
    stored = RunSettings(**record["settings"])
    old, new = stored.identity(), settings.identity()
    changed = [
        f"{name} {getattr(stored, name)} -> {getattr(settings, name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
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
            f"{settings.checkpoint_dir} holds a run with other settings: {'; '.join(changed)}. Give the run's own, "
            "another --checkpoint-dir, or change them with resume_pretrain_tensor.py"
        )
    return record


def arithmetic_changes(record: Mapping[str, Any], settings: RunSettings, layout: ParallelLayout) -> list[str]:
    """What a deterministic run's bits depend on besides its settings, where it is not as its checkpoint says."""
    if not settings.deterministic or not record["arithmetic"]:
        return []
    asked = settings.initial_batch_size
    size = record["arithmetic"].get("micro_batch_size") if asked == "auto" else int(asked)
    return differences(record["arithmetic"], arithmetic_of_run(settings, layout, size))


# ------------------------------------------------------------------------------------------------------ the batch


def requested_global_batch(settings: RunSettings, dp: int) -> int | None:
    """Sequences an optimizer step that the settings ask for; None where the tuner is to find out.

    Raises:
        UsageError: --tokens-per-step is no whole number of sequences, or the step is too large.
    """
    block = settings.block_size
    assert block is not None
    if settings.tokens_per_step is not None:
        chunks, rest = divmod(settings.tokens_per_step, block)
        if rest:
            near = [count * block for count in (chunks, chunks + 1) if count]
            raise UsageError(
                f"--tokens-per-step {settings.tokens_per_step} is no multiple of --block-size {block}; "
                f"nearest: {' or '.join(map(str, near))}"
            )
        return chunks
    if settings.initial_batch_size == "auto":
        check_step_size(1, settings, dp)
        return None
    micro_batch = int(settings.initial_batch_size)
    check_step_size(micro_batch, settings, dp)
    return micro_batch * settings.gradient_accumulation_steps * dp


def check_step_size(micro_batch: int, settings: RunSettings, dp: int) -> None:
    """Refuse a product of sizes that no step can be: one of them has a digit too many."""
    tokens = micro_batch * settings.gradient_accumulation_steps * dp * (settings.block_size or 0)
    if tokens > MAX_TOKENS_PER_STEP:
        raise UsageError(
            f"micro-batch {micro_batch} x --gradient-accumulation-steps {settings.gradient_accumulation_steps} x {dp} "
            f"data-parallel ranks of {settings.block_size} tokens are {tokens:,} tokens a step; at most "
            f"{MAX_TOKENS_PER_STEP:,} can be: lower one of them"
        )


def batch_of_resumed(
    record: Mapping[str, Any], settings: RunSettings, given: Mapping[str, Any], layout: ParallelLayout
) -> int | None:
    """Sequences an optimizer step of a resumed run: its own, unless another accumulation or number of tokens is given.

    A micro-batch alone does not change it, nor does a file that gives the run's own settings back.
    """
    names = ("initial_batch_size", "gradient_accumulation_steps", "tokens_per_step")
    if record:
        own = RunSettings(**record["settings"])
        changed = any(getattr(settings, name) != getattr(own, name) for name in names)
        if not (changed and given.keys() & set(names[1:])):
            return int(record["global_batch"])
    return requested_global_batch(settings, layout.dp)


def fixed_micro_batch(settings: RunSettings, record: Mapping[str, Any]) -> int | None:
    """The micro-batch of a deterministic run, which nothing may lower: as given, else the checkpoint's.

    None where the mode is off.

    Raises:
        UsageError: neither says: the tuner's answer would depend on the ranks and on timing, and the bits on that.
    """
    if not settings.deterministic:
        return None
    if settings.initial_batch_size != "auto":
        return int(settings.initial_batch_size)
    size = (record.get("arithmetic") or record).get("micro_batch_size")
    if type(size) is not int or size < 1:
        raise UsageError(
            "--deterministic fixes the micro-batch, which --initial-batch-size auto would choose by the ranks at hand: "
            "give --initial-batch-size N, a number that fits at every rank count you mean to use"
        )
    return size


def check_shares(global_batch: int | None, dp: int) -> None:
    """Refuse a number of data-parallel ranks that cannot share out a step."""
    if global_batch is not None and global_batch % dp:
        sizes = [size for size in micro_batch_candidates(global_batch) if size <= 2 * dp]
        raise UsageError(
            f"{dp} data-parallel ranks cannot share out the {global_batch} sequences of a step; "
            f"data-parallel sizes that can: {', '.join(map(str, sizes))}"
        )
