"""Measurements of a run: the metrics of a step, the held-out loss, memory use and the device's peak FLOP/s."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from colonnade.data.blocks import PADDING, counted_targets, unpack_blocks
from colonnade.optim.step import StepOutcome
from colonnade.telemetry.code_version import describe_code
from colonnade.telemetry.data_ledger import data_metrics
from colonnade.telemetry.fingerprint import float32_bits
from colonnade.telemetry.metrics import perplexity_of
from colonnade.tuning.flops import peak_flops, training_flops_per_token
from colonnade.tuning.memory import GIB
from run.state import Run, Validation, whole_position


def start_row(run: Run) -> dict[str, Any]:
    """The metrics row written at a start: what is trained from here on, and on which device and ranks."""
    settings, layout = run.settings, run.layout
    on_cuda = layout.device.type == "cuda"
    return {
        "step": run.step,
        "started": True,
        "tp": layout.tp,
        "dp": layout.dp,
        "device": torch.cuda.get_device_name(layout.device) if on_cuda else layout.device.type,
        "precision": settings.precision,
        "parameters": run.model.num_parameters(),
        "micro_batch_size": run.batch.micro_batch_size,
        "tokens_per_step": run.tokens_per_step,
        "total_steps": settings.total_steps,
        "code": describe_code(run.code),
        "resumed_from": None if run.resumed_from is None else run.resumed_from.name,
    }


class Meter:
    """Measures the interval since the last logged step."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._logged = run.step
        config = run.config
        self._flops_per_token = training_flops_per_token(
            run.model.num_parameters(embeddings=False),
            config.num_hidden_layers,
            config.num_attention_heads * config.head_dim,
            run.block_size,
            config.vocab_size,
            config.hidden_size,
        )
        if run.layout.device.type == "cuda":  # discard the peak of the autotuner's trials
            torch.cuda.reset_peak_memory_stats(run.layout.device)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, so that time spent on validation and saving does not count as training time."""
        self._begin, self._tokens = time.perf_counter(), self._run.tokens_seen
        self.data_wait = 0.0

    def row(self, outcome: StepOutcome, learning_rate: float, epoch: int) -> dict[str, Any]:
        """Return the metrics row of this step, and begin the next interval. Collective; syncs with the device."""
        run = self._run
        loss, grad_norm = torch.stack([outcome.loss, outcome.grad_norm.to(outcome.loss.dtype)]).tolist()
        seconds = time.perf_counter() - self._begin
        rate = (run.tokens_seen - self._tokens) / seconds
        row = {
            "step": run.step,
            "loss": loss,
            "perplexity": perplexity_of(loss) if math.isfinite(loss) else None,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_seen": run.tokens_seen,
            "tokens_per_second": rate,
            "model_flops_utilization": None
            if run.peak_flops is None
            else rate * self._flops_per_token / (run.peak_flops * dist.get_world_size()),
            "memory_gib": memory_in_use(run.layout.device) / GIB,
            "data_wait_fraction": min(1.0, self.data_wait / seconds),
            "epoch": epoch,
            "skipped_steps": run.skipped_steps,
        }
        position = whole_position(run)
        if position is not None:
            row |= data_metrics(position)
        if run.settings.deterministic:
            row |= {"loss_bits": float32_bits(loss), "grad_norm_bits": float32_bits(grad_norm)}
            # Links each row to the previous one, so that an audit detects a lost row at any log interval. The step of a
            # checkpoint is always logged, so the chain also holds across restarts.
            row["logged_after"], self._logged = self._logged, run.step
        self.restart()
        return row


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: the allocator's peak on an accelerator, this process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak FLOP/s of the device in this precision; None if unknown."""
    if device.type != "cuda":
        return None
    if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        precision = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), precision)


@torch.no_grad()
def validate(run: Run, validation: Validation) -> dict[str, float]:
    """Mean loss and perplexity over the held-out blocks. Collective; bit-identical at every data-parallel size."""
    size, layout, document_mask = run.batch.micro_batch_size, run.layout, run.settings.document_mask
    batches = validation.tokens.split(size)
    totals = torch.zeros(len(batches), dtype=torch.float64, device=layout.device)
    for first in range(0, len(batches), layout.dp):
        index = first + layout.dp_rank
        if index >= len(batches):
            if run.model.shards is None:
                break
            index = first  # another rank's batch, its loss dropped: all ranks must join the parameter all-gathers
        tokens = batches[index].to(layout.device)
        # Compiled segments have a fixed shape, so the last batch is padded with rows that do not count.
        tokens = F.pad(tokens, (0, 0, 0, size - tokens.shape[0]), value=PADDING)
        blocks = unpack_blocks(tokens, document_mask=document_mask)
        loss = run.model(blocks.input_ids, blocks.labels, blocks.document_starts).double()
        if index == first + layout.dp_rank:
            totals[index] = loss
    # Each batch's loss comes from one rank and the others add zeros, so the sum is exact in any order.
    dist.all_reduce(totals, group=layout.dp_group)
    mean = float(totals.sum()) / max(counted_targets(validation.tokens, document_mask), 1)
    return {"validation_loss": mean, "validation_perplexity": perplexity_of(mean)}
