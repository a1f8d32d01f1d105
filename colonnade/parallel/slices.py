"""This rank's part of a parameter, and its cut into the slices that the rank computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colonnade.parallel.collectives import TensorGroup, laid_out


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a `DTensor` parameter, as a plain tensor that autograd follows."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def split_slices(
    pair: tuple[Tensor, Tensor | None], group: TensorGroup, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor | None]]:
    """Cut a column-parallel (weight, bias) into the local slices along its rows."""
    weight, bias = pair
    biases: Sequence[Tensor | None] = [None] * group.local_slices
    if bias is not None:
        biases = cut_slices(bias, group, dtype)
    return list(zip(cut_slices(weight, group, dtype), biases, strict=True))


def cut_slices(shard: Tensor, group: TensorGroup, dtype: torch.dtype, dim: int = 0) -> list[Tensor]:
    """Cut this rank's shard into its slices along `dim`, each as it would lie in memory if it were alone."""
    if group.fixed_order:
        shard = shard.to(dtype)  # one cast for all slices
    return fixed_layout(shard.chunk(group.local_slices, dim), group, dtype)


def fixed_layout(slices: Sequence[Tensor], group: TensorGroup, dtype: torch.dtype) -> list[Tensor]:
    """Slices in the dtype of the products and a layout that no rank count changes, where the order of sums is fixed."""
    return [laid_out(part, dtype) for part in slices] if group.fixed_order else list(slices)
