"""Initial weights that do not depend on the number of ranks.

A weight is drawn in blocks along the dimension it is sharded on. Each block has its own generator, seeded by (seed,
parameter name, block), so a rank draws only the blocks that its shard touches, and every number of ranks gives the same
bits. Blocks are drawn on the CPU in float32, so the device does not change the values, and the parameter's dtype only
rounds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from colonnade.cores import usable_cores
from colonnade.parallel.mesh import local_world_size_from_environment

BLOCK = 128
"""Rows (columns for a row-parallel weight) that share a generator. Part of the definition of a run's weights."""
# With more, the memory's bandwidth is the limit; a node's ranks draw at the same time.
MAX_THREADS = 8


def fill_normal_(local: Tensor, *, name: str, shape: torch.Size, dim: int, offset: int, seed: int, std: float) -> None:
    """Fill a shard with its part of a normally distributed weight.

    Args:
        local: the shard, of shape `shape` except along `dim`; filled in place.
        name: the parameter's name, part of the seed of each block.
        shape: the whole parameter's shape.
        dim: the dimension the parameter is sharded on (0 column-parallel, 1 row-parallel).
        offset: the shard's first index along `dim`.
        seed: the run's seed.
        std: standard deviation; the mean is 0.
    """
    end = offset + local.shape[dim]
    block_shape = list(shape)
    block_shape[dim] = BLOCK

    def draw(block: int) -> None:
        start = block * BLOCK
        # The last block is drawn whole and cut, so that its values do not depend on where the parameter ends.
        values = torch.empty(block_shape).normal_(0.0, std, generator=_generator(seed, name, block))
        first, last = max(start, offset), min(start + BLOCK, end)
        local.narrow(dim, first - offset, last - first).copy_(values.narrow(dim, first - start, last - first))

    # A generator draws on one thread: 7 ns a number, a minute for 8 billion.
    cores = usable_cores() // local_world_size_from_environment()
    with _one_torch_thread_each(), ThreadPoolExecutor(max(1, min(cores, MAX_THREADS))) as threads:
        list(threads.map(torch.no_grad()(draw), range(offset // BLOCK, -(-end // BLOCK))))


@contextmanager
def _one_torch_thread_each() -> Iterator[None]:
    """Otherwise each thread would start as many threads of its own as torch may use."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
