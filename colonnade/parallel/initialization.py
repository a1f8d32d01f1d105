"""Initial weights that do not depend on the number of ranks.

A weight is drawn in blocks along the dimension it is cut on. Each block has a generator of its own, keyed by
(seed, parameter name, block), so a rank draws the blocks its shard touches and no others, and every rank count gives
the same bits. Blocks are drawn on the CPU in float32: the device and the parameter's dtype do not change the values.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BLOCK = 128
"""Rows (or columns, for a row-parallel weight) that share a generator. Part of the definition of a run's weights."""


def fill_normal_(local: Tensor, *, name: str, shape: torch.Size, dim: int, offset: int, seed: int, std: float) -> None:
    """Fill a shard with its part of a normally distributed weight.

    Args:
        local: the shard, of shape `shape` but along `dim`; filled in place.
        name: the parameter's name, part of the key.
        shape: the whole parameter's shape.
        dim: the dimension the parameter is cut on (0 column-parallel, 1 row-parallel).
        offset: the shard's first index along `dim`.
        seed: the run's seed.
        std: standard deviation; the mean is 0.
    """
    length = local.shape[dim]
    end = offset + length
    block_shape = list(shape)
    block_shape[dim] = BLOCK
    for block in range(offset // BLOCK, -(-end // BLOCK)):
        start = block * BLOCK
        # The last block is drawn whole and cut, so that its values do not depend on where the parameter ends.
        values = torch.empty(block_shape).normal_(0.0, std, generator=_generator(seed, name, block))
        first, last = max(start, offset), min(start + BLOCK, end)
        local.narrow(dim, first - offset, last - first).copy_(values.narrow(dim, first - start, last - first))


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
