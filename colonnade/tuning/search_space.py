"""What a plan may vary: tensor-parallel sizes, sharding and its replicas, recomputation, overlap, micro-batches.

Settings that were given explicitly are not varied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from colonnade.command_settings import PlanSettings
from colonnade.decoder.float8 import check_float8_sizes
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.shard_limits import Ranks, check_shards
from colonnade.parallel.determinism import halving_sizes
from colonnade.parallel.sharding import check_slices, default_slices, slice_counts
from colonnade.run_settings import CHECKPOINTING, DATA_PARALLEL_SHARDS, RunSettings
from colonnade.setting_values import divisors
from colonnade.tuning.batch_record import micro_batch_candidates
from colonnade.tuning.cost_model import ParallelConfig


def tensor_sizes(asked: PlanSettings, settings: RunSettings, config: ModelConfig, block: int) -> list[int]:
    tp, slices = settings.tensor_parallel_size, _fixed_slices(settings, config)
    if tp is None:
        check_slices(config, 1, slices)
        node = min(asked.gpus, asked.gpus_per_node)
        sizes = [size for size in slice_counts(config, range(1, node + 1)) if node % size == 0]
        sizes = [size for size in sizes if slices is None or slices % size == 0]
    else:
        if asked.gpus % tp:
            raise UsageError(
                f"--tensor-parallel-size {tp} does not divide --gpus {asked.gpus}; sizes that do: "
                f"{', '.join(map(str, divisors(asked.gpus)))}"
            )
        check_slices(config, tp, slices)
        sizes = [tp]
    return _that_float8_takes(sizes, settings, config, block) if settings.float8 else sizes


def _fixed_slices(settings: RunSettings, config: ModelConfig) -> int | None:
    """V if sums have a fixed order, else None; tensor-parallel sizes must then divide it."""
    return settings.tensor_slices or (default_slices(config) if settings.deterministic else None)


def that_share_out(chunks: int, sizes: list[int], asked: PlanSettings, settings: RunSettings, block: int) -> list[int]:
    """The tensor-parallel sizes at which the data-parallel ranks can evenly split a step's `chunks` sequences.

    The rules are those of a run: a deterministic one has to halve them.

    Raises:
        UsageError: there is no such size.
    """
    workable = halving_sizes(chunks) if settings.deterministic else divisors(chunks)
    shared = [tp for tp in sizes if asked.gpus // tp in workable]
    if shared:
        return shared
    at = f"at tp {', '.join(map(str, sizes))}"
    if settings.deterministic:
        raise UsageError(
            f"--deterministic: the {chunks} sequences of a step can be halved for {', '.join(map(str, workable))} "
            f"data-parallel ranks, and --gpus {asked.gpus} {at} are other numbers of them; give other --gpus or "
            "--tokens-per-step"
        )
    near = sorted(workable, key=lambda count: abs(count - asked.gpus / sizes[0]))[:3]
    raise UsageError(
        f"the {chunks * block} tokens of a step are {chunks} sequences, which {asked.gpus} devices cannot share out "
        f"{at}; give --tokens-per-step as a multiple of {block * asked.gpus}, or --gpus "
        f"{', '.join(str(count * sizes[0]) for count in sorted(near))}"
    )


def _that_float8_takes(sizes: list[int], settings: RunSettings, config: ModelConfig, block: int) -> list[int]:
    """The tensor-parallel sizes at which the sizes of products allow float8. Raises UsageError if there is none."""
    slices = _fixed_slices(settings, config)
    taken, refusal = [], None
    for tp in sizes:
        try:
            check_float8_sizes(config, block, slices or tp, fixed_slices=slices is not None)
        except UsageError as error:
            refusal = refusal or error
        else:
            taken.append(tp)
    if refusal is not None and not taken:
        raise refusal
    return taken


def parallel_configs(
    start: ParallelConfig, asked: PlanSettings, settings: RunSettings, config: ModelConfig, given: Collection[str]
) -> Iterator[ParallelConfig]:
    """Variants of `start` over sharding and its replicas, recomputation, sequence parallelism and overlap.

    Each is kept as it is if it was given explicitly or if no device is; sharding is "none" where it is no option.
    """
    is_known = asked.gpu is not None
    checkpointing: tuple[str, ...] = CHECKPOINTING
    if not is_known or not {"activation_checkpointing", "disable_gradient_checkpointing"}.isdisjoint(given):
        checkpointing = (start.activation_checkpointing,)
    shards: tuple[str, ...] = DATA_PARALLEL_SHARDS
    if not is_known or "data_parallel_shard" in given:
        shards = (start.data_parallel_shard,)
    elif _shares_nothing(start, settings, config):
        shards = ("none",)
    sharding = [(shard, replicas) for shard in shards for replicas in _replicas(shard, start, asked, given)]
    switches = _tensor_parallel_switches(start, settings, config, given)
    for (shard, replicas), mode, switch in product(sharding, checkpointing, switches):
        yield replace(start, data_parallel_shard=shard, replicas=replicas, activation_checkpointing=mode, **switch)


def _replicas(shard: str, start: ParallelConfig, asked: PlanSettings, given: Collection[str]) -> list[int]:
    """Numbers of replicas: one, or one a node, so that parameters are gathered within nodes only."""
    nodes = asked.gpus // asked.gpus_per_node
    shards_of_node = asked.gpus_per_node // start.tp
    if shard == "none" or asked.gpu is None or "data_parallel_replicate_size" in given:
        return [start.replicas]
    is_possible = nodes > 1 and shards_of_node > 1 and start.dp == nodes * shards_of_node
    return [1, nodes] if is_possible else [1]


def _tensor_parallel_switches(
    start: ParallelConfig, settings: RunSettings, config: ModelConfig, given: Collection[str]
) -> list[dict[str, Any]]:
    """Choices of sequence parallelism and overlap; none for sums in a fixed order, whose costs are others."""
    if start.tp == 1 or start.on_cpu or _fixed_slices(settings, config) is not None:
        return [{}]
    varied = [name for name in ("sequence_parallel", "overlap_collectives") if name not in given]
    if settings.plain_step:  # it excludes overlap
        varied = [name for name in varied if name != "overlap_collectives"]
    return [dict(zip(varied, values, strict=True)) for values in product((False, True), repeat=len(varied))]


def _shares_nothing(parallel: ParallelConfig, settings: RunSettings, config: ModelConfig) -> bool:
    """Whether sharding is no option: dp is 1, it is refused, or the run is deterministic (sharded only on request)."""
    if settings.deterministic or parallel.dp == 1:
        return True
    device = torch.device("cpu" if parallel.on_cpu else "cuda")
    sharing = settings.replace(data_parallel_shard="zero2")  # zero3 is refused in the same cases
    return refusal_to_share(sharing, config, Ranks(parallel.dp, parallel.tp, device)) is not None


def refusal_to_share(settings: RunSettings, config: ModelConfig, ranks: Ranks) -> UsageError | None:
    """The error that says why these ranks cannot shard parameters as the settings ask; None if they can."""
    try:
        check_shards(settings, config, ranks)
    except UsageError as error:
        return error
    return None


def micro_batches(asked: PlanSettings, settings: RunSettings, chunks: int, limit: int | None) -> list[int]:
    """Micro-batch sizes to try, largest first, all divisors of a rank's sequences per step.

    Only one of them if a size was given, or without a memory limit.
    """
    sizes = micro_batch_candidates(chunks)
    given = asked.micro_batch_size
    if given is not None:
        if given not in sizes:
            near = ", ".join(map(str, sorted(sizes, key=lambda size: abs(size - given))[:3]))
            raise UsageError(
                f"--micro-batch-size {given} does not divide the {chunks} sequences of a step on each "
                f"rank; near it do: {near}"
            )
        return [given]
    if limit is not None:
        return sizes[::-1]
    wanted = 1 if settings.initial_batch_size == "auto" else int(settings.initial_batch_size)
    return [max(size for size in sizes if size <= wanted)]
