"""One optimizer step: forward and backward of each micro-batch, gradients summed, measured and clipped, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from colonnade.data.blocks import counted_targets, unpack_blocks
from colonnade.optim.gradients import (
    accumulate_in_tree,
    clip_by_norm,
    fixed_order_norm,
    global_norm,
    local_gradients,
    sum_over_data_parallel,
)
from colonnade.parallel.collectives import TensorGroup
from colonnade.parallel.mesh import ParallelLayout


class SlicedModel(Protocol):
    """What a step asks of a model (a `TensorParallelModel` has it)."""

    layout: ParallelLayout
    group: TensorGroup

    @property
    def pieces(self) -> Sequence[tuple[int, int]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def __call__(self, input_ids: Tensor, labels: Tensor, document_starts: Tensor | None = None) -> Tensor: ...


def micro_batches_of(share: Tensor, count: int) -> list[Tensor]:
    """A data-parallel rank's share [chunks, ...] of a step as `count` micro-batches of equal size.

    Of a global batch in N micro-batches the j-th holds the chunks g with g mod N == j. A rank's share holds the g with
    g mod dp == rank, so its micro-batches are those j with j mod dp == rank: the same N micro-batches at every dp.
    """
    return [share[index::count] for index in range(count)]


def targets_of_step(share: Tensor, layout: ParallelLayout, *, document_mask: bool) -> int:
    """Labels that count in the global batch, from each data-parallel rank's share of it. Collective.

    Args:
        share: [chunks, block_size + 1] blocks in the wire format, on the CPU (on a device this waits for it).
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
    after_backward: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Train on this rank's share of the global batch. Collective.

    Args:
        share: [chunks, block_size + 1] blocks in the wire format (`colonnade/data/blocks.py`).
        accumulation: micro-batches of this rank.
        targets: labels of the global batch that count, which the loss is a mean over (`targets_of_step`).
        max_grad_norm: 0 for no clipping.
        document_mask: attention and loss stay within documents.
        deterministic: sum in the order that does not depend on the number of ranks; needs a model with fixed slices.
        after_backward: called while a device is still busy with what was launched.

    Returns:
        (this rank's part of the mean loss, the global gradient norm before clipping), both on the device: the mean loss
        is the sum of the parts over the data-parallel ranks (`sum_over_data_parallel`).
    """

    def backward(micro_batch: Tensor) -> Tensor:
        blocks = unpack_blocks(micro_batch, document_mask=document_mask)
        # A batch without a single target has the loss 0, not 0 / 0.
        part = model(blocks.input_ids, blocks.labels, blocks.document_starts) / max(targets, 1)
        scaler.scale(part).backward()
        return part.detach()

    micro_batches = micro_batches_of(share, accumulation)
    if deterministic:
        loss = accumulate_in_tree(micro_batches, backward, list(model.parameters()))
    else:
        loss = torch.zeros((), device=model.layout.device)
        for micro_batch in micro_batches:
            loss += backward(micro_batch)
    if after_backward is not None:
        after_backward()
    gradients = local_gradients(model.parameters())
    sum_over_data_parallel([gradient for gradient, _ in gradients], model.layout.dp_group, fixed_order=deterministic)
    scaler.unscale_(optimizer)
    if model.group.fixed_order:
        norm = fixed_order_norm(gradients, model.pieces, model.group)
    else:
        norm = global_norm(gradients, model.group)
    if max_grad_norm > 0:
        clip_by_norm(gradients, norm, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm
