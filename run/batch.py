"""The micro-batch size of a run on these ranks: fixed by its settings, recorded earlier, or found by trials."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings
from colonnade.tuning.autotuner import TunedMicroBatch, agree_over_group, plan_search, tune_micro_batch
from colonnade.tuning.memory import trial_runner
from model import TensorParallelModel


def tune_batch(
    model: TensorParallelModel,
    settings: RunSettings,
    layout: ParallelLayout,
    global_batch: int | None,
    micro_batch: int | None,
) -> tuple[TunedMicroBatch, dict[str, Any]]:
    """The micro-batch for these ranks, and what it depends on. With `global_batch` None, the result determines it."""
    if micro_batch is not None and global_batch is not None:
        plan = plan_search(micro_batch, chunks_per_rank=global_batch // layout.dp)
        return TunedMicroBatch(micro_batch, global_batch // layout.dp // micro_batch, (), plan), {}
    initial = None if settings.initial_batch_size == "auto" else int(settings.initial_batch_size)
    if global_batch is None:
        plan = plan_search(initial, gradient_accumulation_steps=settings.gradient_accumulation_steps)
    else:
        plan = plan_search(initial, chunks_per_rank=global_batch // layout.dp)
    on_cuda, is_compiled = layout.device.type == "cuda", settings.compiles_on(layout.device.type)
    depends_on = {
        "device": torch.cuda.get_device_name(layout.device) if on_cuda else "cpu",
        "device_bytes": torch.cuda.mem_get_info(layout.device)[1] if on_cuda else None,
        "memory_limit_gib": settings.memory_limit_gib,
        "model": model.config.to_dict(),
        "block_size": settings.block_size,
        "tp": layout.tp,
        "dp": layout.dp,
        "precision": settings.precision,
        "compile": is_compiled,
        "gradient_checkpointing": settings.checkpointing == "full",
        "replicate_embeddings": settings.replicate_embeddings,
        "document_mask": settings.document_mask,
        "tensor_slices": settings.tensor_slices,
        "torch": torch.__version__,
    }
    # These keys are added only for non-default values, so that records from before the settings existed stay valid.
    if settings.optimizer != "adamw":
        depends_on["optimizer"] = settings.optimizer
    if settings.checkpointing == "selective":
        depends_on["activation_checkpointing"] = "selective"
    for name in ("sequence_parallel", "overlap_collectives", "float8", "cuda_graphs", "plain_step"):
        if getattr(settings, name):
            depends_on[name] = True
    if model.shards is not None:
        depends_on["data_parallel_shard"] = settings.data_parallel_shard
        depends_on["data_parallel_replicate_size"] = settings.data_parallel_replicate_size

    def probe(size: int) -> float:
        warm = on_cuda or is_compiled
        block, mask = settings.block_size or 0, settings.document_mask
        return _probe_seconds(model, size, block, warm=warm, document_mask=mask, plain=settings.plain_step)

    tuned = tune_micro_batch(
        plan,
        trial_runner(layout.device, probe, settings.memory_limit_gib, cuda_graphs=settings.cuda_graphs),
        agree_over_group(None, "cpu"),
        directory=Path(settings.checkpoint_dir),
        depends_on=depends_on,
        is_writer=layout.is_main,
    )
    return tuned, depends_on


def _probe_seconds(
    model: TensorParallelModel, size: int, block: int, *, warm: bool, document_mask: bool, plain: bool = False
) -> float:
    """Seconds of a forward and backward pass of this rank's share alone, at a micro-batch of `size`.

    With `document_mask`, each block is a single document, which is the largest and most expensive case.
    """
    device = model.layout.device
    tokens = torch.zeros((size, block), dtype=torch.int64, device=device)
    starts = torch.zeros_like(tokens, dtype=torch.bool) if document_mask else None
    begin, passes = 0.0, 2 if warm else 1
    try:
        with model.group.collectives_as_identity(), nullcontext() if plain else model.weights_kept():
            # In a step, accumulated gradients are in memory during all micro-batches but the first; here, during the
            # second pass.
            for number in range(passes):
                if model.shards is not None:
                    model.shards.begin_micro_batch(is_last=number + 1 == passes)
                begin = time.perf_counter()
                model(tokens, tokens, starts).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError):  # possibly out of memory, in which case the tuner continues
        if model.shards is not None:
            model.shards.forget_failure()
        raise
    finally:
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - begin
