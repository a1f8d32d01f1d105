"""What `check_parity.py` compares: a run's settings, resolved as `training.py` resolves them, and its first blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colonnade.checkpoint.run_record import run_record
from colonnade.checkpoint.verify import verified
from colonnade.command_settings import ParitySettings
from colonnade.config import check_contradictions, override
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.idle_switches import idle_switches
from colonnade.parallel.determinism import check_micro_batches
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings
from colonnade.runtime.vote import on_first_rank, vote
from colonnade.tuning.batch_record import micro_batch_candidates
from colonnade.tuning.cost_model import ParallelConfig, state_memory
from colonnade.tuning.memory import GIB
from run.batch_sizes import check_shares, fixed_micro_batch, requested_global_batch
from run.data import open_stream, resolve_data, run_tokenizer, settle_backend, stream_notes
from run.folder import require_own_model
from run.inputs import (
    check_sizes,
    memory_here,
    model_of_record,
    resolve_device_settings,
    resolve_model,
    resolve_model_settings,
    with_preset,
)
from run.parity import EXACT, Numerics, Subject


def settle(parity: ParitySettings, given: Mapping[str, Any], layout: ParallelLayout, alone: ParallelLayout) -> Subject:
    """Resolve the run as `training.py` does, and read the blocks of its first steps. Collective."""
    notes: list[str] = []
    found, record = None, {}
    if parity.checkpoint_path is not None:
        found, _ = verified(Path(parity.checkpoint_path))
    with vote():
        if found is not None:
            record = run_record(found)
        if found is not None and record:
            own = {**record["settings"], "tensor_parallel_size": None}
            require_own_model(found.path, own, given)
            settings = check_contradictions(RunSettings(**override(own, given)))
        else:
            settings = with_preset(given, layout, notes)
    settings = resolve_device_settings(settings, layout, notes)
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(
        lambda: model_of_record(found.path, record) if found is not None and record else resolve_model(settings)
    )
    settings = resolve_model_settings(settings, config)
    with vote():
        check_sizes(settings, config, layout)
        kept = 0 if Numerics.of(settings) == EXACT else parity.steps + 1
        require_memory_for_both(config, settings.optimizer, layout, kept)
        micro_batch, global_batch = batch_of(settings, layout)
    blocks = on_first_rank(lambda: read_blocks(settings, config, alone, parity.steps, global_batch, notes))
    notes += idle_switches(settings, layout.tp, layout.dp, micro_batch)
    if layout.is_main:
        print("\n".join(notes))
    path = None if found is None else found.path
    return Subject(settings, config, path, bool(record), micro_batch, torch.from_numpy(blocks))


def batch_of(settings: RunSettings, layout: ParallelLayout) -> tuple[int, int]:
    """Sequences per micro-batch and per step. The micro-batch is 1 if the tuner would choose it."""
    fixed_micro_batch(settings, {})
    if settings.initial_batch_size == "auto":
        settings = settings.replace(initial_batch_size="1")
    micro_batch, global_batch = int(settings.initial_batch_size), requested_global_batch(settings, layout.dp)
    assert global_batch is not None
    check_shares(global_batch, layout.dp)
    if settings.deterministic:
        check_micro_batches(global_batch, micro_batch, layout.dp)
    # As in the tuner: the largest divisor of a rank's share of the step that is at most the given number.
    return micro_batch_candidates(global_batch // layout.dp, micro_batch)[-1], global_batch


def require_memory_for_both(config: ModelConfig, optimizer: str, layout: ParallelLayout, kept: int) -> None:
    """Check that the first rank can hold the whole model in addition to its shard.

    Args:
        kept: number of model-sized float32 copies that stay in host memory for the comparison with a second precision.

    Raises:
        UsageError: parameters, gradients and moments alone exceed the available memory.
    """
    ranks, memory = memory_here(layout.device)
    whole, share = (sum(state_memory(config, ParallelConfig(tp=tp, optimizer=optimizer))) for tp in (1, layout.tp))
    needed = whole + ranks * share
    if layout.device.type == "cpu":
        needed += 4 * config.num_parameters * kept
    if needed > memory:
        raise UsageError(
            f"a model of {config.num_parameters:,} parameters takes {needed / GIB:.1f} GiB where the first rank is, "
            f"whole and cut over tp {layout.tp}, and there are {memory / GIB:.1f} GiB; compare one of the same sizes "
            "with fewer layers (--model-config), or on a machine with more memory"
        )


def read_blocks(
    settings: RunSettings,
    config: ModelConfig,
    alone: ParallelLayout,
    steps: int,
    global_batch: int,
    notes: list[str],
) -> Any:
    """Read the blocks of the run's first steps, int32 [steps, sequences, T + 1]. Call it on the first rank."""
    tokenizer = run_tokenizer(settings)
    backend = settle_backend(settings, tokenizer, {}, notes)
    stream, chunks = open_stream(settings, tokenizer, backend, config, alone, None, allow_change=False)
    try:
        notes += stream_notes(stream, None)
        rows = [next(chunks).tokens for _ in range(steps * global_batch)]
    finally:
        stream.close()
    return np.stack(rows).reshape(steps, global_batch, -1)
