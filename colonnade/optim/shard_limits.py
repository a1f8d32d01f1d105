"""Which settings and parameters data-parallel ranks can shard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.optim.optimizer import VECTOR_ELEMENTS
from colonnade.parallel.mesh import ParallelLayout
from colonnade.parallel.sharding import cut_of, default_slices, is_vocabulary, piece_count
from colonnade.run_settings import RunSettings
from colonnade.setting_values import divisors

FLOAT32_ELEMENTS = 16  # in the widest vector register; parameters are float32


@dataclass(frozen=True)
class Ranks:
    """The part of a `ParallelLayout` that sharding depends on."""

    dp: int
    tp: int
    device: torch.device


def shard_count(settings: RunSettings, dp: int) -> int:
    """Number of shards that data-parallel ranks cut the parameters into; 1 if each holds them whole."""
    return 1 if settings.data_parallel_shard == "none" else dp // settings.data_parallel_replicate_size


def check_shards(settings: RunSettings, config: ModelConfig, layout: ParallelLayout | Ranks) -> None:
    """Reject what cannot be sharded over data-parallel ranks, before anything is built.

    Raises:
        UsageError: sharding cannot work; the message names the setting and what would work.
    """
    if settings.data_parallel_shard == "none":
        return
    flag, replicas = f"--data-parallel-shard {settings.data_parallel_shard}", settings.data_parallel_replicate_size
    if layout.dp % replicas:
        if layout.dp == 1:
            raise UsageError(
                f"--data-parallel-replicate-size {replicas} groups data-parallel ranks, and there is one: leave it "
                "out, or start more ranks than --tensor-parallel-size"
            )
        raise UsageError(
            f"--data-parallel-replicate-size {replicas} does not divide the {layout.dp} data-parallel ranks; sizes "
            f"that do: {', '.join(map(str, divisors(layout.dp)))}"
        )
    shards = shard_count(settings, layout.dp)
    if shards == 1:
        return
    if settings.cuda_graphs:
        raise UsageError(
            f"{flag} and --cuda-graphs: a graph writes gradients where the next one does, before they are shared out; "
            "leave out one of them"
        )
    if config.padded_vocab_size % layout.tp and not settings.replicate_embeddings:
        raise UsageError(
            f"{flag}: a padded vocabulary of {config.padded_vocab_size} is cut unevenly over {layout.tp} "
            "tensor-parallel ranks and cannot be cut again; use a --tensor-parallel-size that divides it"
        )
    if settings.deterministic and layout.device.type == "cpu":
        slices = settings.tensor_slices or default_slices(config)
        name = part_off_border(config, layout.tp, slices, shards, replicate_embeddings=settings.replicate_embeddings)
        if name is not None:
            raise UsageError(
                f"--deterministic {flag}: in {shards} parts {name} has other bits than whole in AdamW's kernel for the "
                "CPU; cut it into fewer with --data-parallel-replicate-size, or give --data-parallel-shard none"
            )


def fewest_replicas(settings: RunSettings, config: ModelConfig, layout: ParallelLayout | Ranks) -> int:
    """The smallest --data-parallel-replicate-size these ranks can work with: the one that takes the least memory.

    With as many replicas as data-parallel ranks nothing is sharded, which always works.
    """
    for replicas in divisors(layout.dp):
        try:
            check_shards(settings.replace(data_parallel_replicate_size=replicas), config, layout)
        except UsageError:
            continue
        return replicas
    return layout.dp


def part_off_border(
    config: ModelConfig, tp: int, slices: int, shards: int, *, replicate_embeddings: bool = False
) -> str | None:
    """A parameter for which the CPU's fused AdamW gives a shard other bits than the whole; None if there is none.

    Its scalar code for elements that do not fill a vector register rounds differently (`fused_keeps_bits`). A shard is
    a contiguous range of the whole parameter's memory: it gets the same bits if it begins at a register boundary.
    """
    rest = False
    found = None
    for name, shape in {**outer_shapes(config), **layer_shapes(config)}.items():
        rows = config.padded_vocab_size if is_vocabulary(name) else shape[0]
        sizes = [rows, *shape[1:]]
        count = piece_count(name, config, slices)
        rest |= count > 1 and math.prod(sizes) // count % VECTOR_ELEMENTS != 0
        cut = cut_of(name, config, tp, replicate_embeddings=replicate_embeddings)
        if cut.sharded:
            sizes[cut.dim] //= tp
        if -(-sizes[0] // shards) * math.prod(sizes[1:]) % FLOAT32_ELEMENTS:
            found = found or name
    return None if rest else found  # with a rest the unfused update is used, which treats all elements alike
