"""One optimizer step: each micro-batch forward and backward; gradients summed, measured and clipped; the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from colonnade.data.blocks import counted_targets, unpack_blocks
from colonnade.optim.gradients import (
    accumulate_in_tree,
    accumulate_over_shards,
    agreed_norm,
    agreed_norm_of_shards,
    clip_by_norm,
    local_gradients,
    sum_over_data_parallel,
)
from colonnade.optim.loss_window import WindowStatistics
from colonnade.optim.optimizer import step_unless
from colonnade.optim.overlapped_sum import OverlappedSum
from colonnade.parallel.collectives import TensorGroup
from colonnade.parallel.data_parallel import DataParallelShards
from colonnade.parallel.mesh import ParallelLayout


class SlicedModel(Protocol):
    """What a step requires of a model (`TensorParallelModel` provides it)."""

    layout: ParallelLayout
    group: TensorGroup

    @property
    def pieces(self) -> Sequence[tuple[int, int]]: ...
    @property
    def shards(self) -> DataParallelShards | None: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def weights_kept(self) -> AbstractContextManager[None]: ...
    def gradient_holders(self) -> list[Tensor]: ...
    def __call__(
        self, input_ids: Tensor, labels: Tensor, document_starts: Tensor | None = None, scale: float = 1.0
    ) -> Tensor: ...


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step: scalars on the device, the same on every rank.

    Attributes:
        loss: mean over the counted labels of the global batch.
        grad_norm: gradient norm of the whole model, before clipping.
        skipped: 1.0 if parameters, moments and step counts were left unchanged, else 0.0.
        losses_before: statistics of the losses before this step, if spikes are detected.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    losses_before: WindowStatistics | None = None


def micro_batches_of(share: Tensor, count: int) -> list[Tensor]:
    """Split a data-parallel rank's share [chunks, ...] of a step into `count` micro-batches of equal size.

    If the global batch has N micro-batches, the j-th holds the chunks g with g mod N == j. A rank's share holds the g
    with g mod dp == rank, so its micro-batches are the j with j mod dp == rank: the same N micro-batches at every dp.
    """
    return [share[index::count] for index in range(count)]


def targets_of_step(share: Tensor, layout: ParallelLayout, *, document_mask: bool) -> int:
    """Number of labels in the global batch that count, from each data-parallel rank's share of it. Collective.

    Args:
        share: [chunks, block_size + 1] blocks in the wire format, on the CPU (on a device this would be a host sync).
    """
    count = torch.tensor(counted_targets(share, document_mask))
    dist.all_reduce(count, group=layout.dp_group)
    return int(count)


def optimizer_step(
    model: SlicedModel,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    share: Tensor,
    *,
    accumulation: int,
    targets: int,
    max_grad_norm: float,
    document_mask: bool = False,
    deterministic: bool = False,
    plain: bool = False,
    skip_above: Tensor | None = None,
    after_backward: Callable[[], None] | None = None,
) -> StepOutcome:
    """Train on this rank's share of the global batch. Collective.

    A step whose loss or gradient norm is not finite is skipped on all ranks: the decision is made from values that have
    been summed over the ranks, and stays on the device.

    Args:
        share: [chunks, block_size + 1] blocks in the wire format (`colonnade/data/blocks.py`).
        accumulation: number of micro-batches on this rank.
        targets: number of labels in the global batch that count; the loss is their mean (`targets_of_step`).
        max_grad_norm: limit of the gradient norm; 0 for no clipping.
        document_mask: keep attention and loss within documents.
        deterministic: sum in an order that does not depend on the number of ranks; needs a model with fixed slices.
        plain: neither keep weights over micro-batches nor sum gradients during the backward pass.
        skip_above: also skip a step whose loss is above this; None or NaN for no limit.
        after_backward: called while the device is still busy with the launched kernels.
    """
    micro_batches = micro_batches_of(share, accumulation)
    shards = model.shards
    # In the fixed order, gradients are final only after the whole tree over micro-batches, so there is no overlap.
    overlapped = None
    if model.layout.dp > 1 and not deterministic and not plain and shards is None:
        overlapped = OverlappedSum(model.layout.dp_group)

    def backward(micro_batch: Tensor) -> Tensor:
        blocks = unpack_blocks(micro_batch, document_mask=document_mask)
        # A batch without any target has the loss 0, not 0 / 0.
        part = model(blocks.input_ids, blocks.labels, blocks.document_starts, scale=1 / max(targets, 1))
        if overlapped is not None and micro_batch is micro_batches[-1]:
            overlapped.watch(model.gradient_holders())
        scaler.scale(part).backward()
        return part.detach()

    with nullcontext() if plain else model.weights_kept():
        if shards is not None:
            loss = accumulate_over_shards(micro_batches, backward, shards)
        elif deterministic:
            loss = accumulate_in_tree(micro_batches, backward, model.gradient_holders)
        else:
            loss = torch.stack([backward(micro_batch) for micro_batch in micro_batches]).sum()
        if overlapped is not None:
            overlapped.finish(loss)
    if after_backward is not None:
        after_backward()
    gradients = local_gradients(model.parameters())
    if overlapped is None:
        _sum_over_data_parallel_ranks(model, [gradient for gradient, _ in gradients], loss, fixed_order=deterministic)
    scaler.unscale_(optimizer)
    norm, skipped = _norm_and_verdict(model, gradients, loss, skip_above)
    if max_grad_norm > 0:
        clip_by_norm(gradients, norm, max_grad_norm)
    # Not `scaler.step`, which skips on overflows only. Each overflow also makes the norm infinite or NaN.
    step_unless(optimizer, skipped)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(loss, norm, skipped)


def _sum_over_data_parallel_ranks(
    model: SlicedModel, gradients: Sequence[Tensor], loss: Tensor, *, fixed_order: bool
) -> None:
    """Sum in place what the backward pass has not: gradients (with shards, over replicas only) and the loss."""
    shards = model.shards
    if shards is None:
        sum_over_data_parallel([*gradients, loss], model.layout.dp_group, fixed_order=fixed_order)
        return
    # In the fixed order, the reduction has already summed gradients over the replicas.
    if shards.replicate_group is not None and not shards.fixed_order:
        sum_over_data_parallel(gradients, shards.replicate_group)
    sum_over_data_parallel([loss], model.layout.dp_group, fixed_order=fixed_order)


def _norm_and_verdict(
    model: SlicedModel, gradients: list[tuple[Tensor, bool]], loss: Tensor, skip_above: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm of the whole model's gradient, and whether the step is skipped, agreed on by all ranks."""
    flag = ~torch.isfinite(loss)
    if skip_above is not None:
        flag |= loss > skip_above
    pieces = model.pieces if model.group.fixed_order else None
    if model.shards is None:
        return agreed_norm(gradients, model.group, flag, pieces)
    return agreed_norm_of_shards(list(model.parameters()), model.group, flag, model.shards, pieces)
