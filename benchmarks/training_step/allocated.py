"""Bytes that torch allocates on one rank of a parallel layout; torch's fake process group stands in for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.training_step.work import PRECISIONS, most_above
from colonnade.model_config import ModelConfig
from colonnade.optim.optimizer import allocate_state, create_adamw, create_muon
from colonnade.optim.step import optimizer_step
from colonnade.parallel.mesh import init_parallel
from colonnade.tuning.cost_model import ParallelConfig
from model import TensorParallelModel


@dataclass(frozen=True)
class Allocated:
    """Bytes of a rank: its parameters, its moments, and the peak of a step above these two."""

    parameters: int
    moments: int
    step: int

    @property
    def total(self) -> int:
        return self.parameters + self.moments + self.step


def allocated(
    config: ModelConfig,
    parallel: ParallelConfig,
    micro_batch: int,
    block: int,
    accumulation: int = 2,
    device_type: str = "cpu",
) -> Allocated:
    """What the first rank allocates in its second step. Replaces the process group, if there is one.

    Collectives deliver nothing, so values are meaningless, but the bytes are those of a real rank.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=parallel.tp * parallel.dp)
    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    model, optimizer = _trained(config, parallel, device)
    chunks = torch.randint(
        0, config.vocab_size, (micro_batch * accumulation, block + 1), generator=torch.Generator().manual_seed(0)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step() -> None:
        optimizer_step(
            model,
            optimizer,
            scaler,
            chunks.to(device),
            accumulation=accumulation,
            targets=chunks.numel(),
            max_grad_norm=1.0,
            deterministic=parallel.deterministic,
        )

    step()  # allocates what is created once and stays
    most = most_above(step, device)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return Allocated(_bytes_of(model.parameters()), _bytes_of(moments), most)


def _trained(
    config: ModelConfig, parallel: ParallelConfig, device: torch.device
) -> tuple[TensorParallelModel, torch.optim.Optimizer]:
    layout = init_parallel(parallel.tp, device)
    dtype = PRECISIONS[parallel.precision]
    if parallel.data_parallel_shard != "none":
        layout = layout.sharded(parallel.replicas)
    model = TensorParallelModel(
        config,
        layout,
        compute_dtype=dtype,
        replicate_embeddings=parallel.replicate_embeddings,
        activation_checkpointing=parallel.activation_checkpointing,
        sequence_parallel=parallel.sequence_parallel,
        overlap_collectives=parallel.overlap_collectives,
        slices=parallel.tp if parallel.deterministic else None,
        shares_memory=False,  # the prediction is for accelerators, which have no such shared memory
    )
    if layout.shard_mesh is not None:
        lower = None if parallel.precision == "fp32" or parallel.deterministic else dtype
        model.share_out(mode=parallel.data_parallel_shard, fixed_order=parallel.deterministic, gather_dtype=lower)
    common: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    optimizer = create_adamw(model, **common) if parallel.optimizer == "adamw" else create_muon(model, **common)
    allocate_state(optimizer)
    optimizer.zero_grad()
    return model, optimizer


def _bytes_of(tensors: Any) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)
