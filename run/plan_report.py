"""What `plan_run.py` prints: a plan, and the table of a model's parameters."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.tuning.memory import GIB

if TYPE_CHECKING:
    from colonnade.tuning.cost_model import ParallelConfig
    from colonnade.tuning.plan import Plan

SHOWN = 6  # rows in the table of candidates


def counts(config: ModelConfig) -> dict[str, Any]:
    return {
        "parameters": config.num_parameters,
        "parameters_without_embeddings": config.num_parameters_without_embeddings,
        "vocab_size": config.vocab_size,
    }


def print_plan(config: ModelConfig, plan: Plan) -> None:
    memory, parallel = plan.memory, plan.parallel
    of_limit = "" if plan.memory_limit is None else f" of {_amount(plan.memory_limit)}"
    lines = {
        "parameters": f"{config.num_parameters:,} ({config.num_parameters_without_embeddings:,} without embeddings)",
        "tokens": f"{plan.tokens:,}",
        "step": f"{plan.tokens_per_step:,} tokens: micro-batch {plan.micro_batch} x accumulation {plan.accumulation} x "
        f"dp {plan.dp}, blocks of {plan.block_size:,}",
        "steps": f"{plan.steps:,}, the first {plan.warmup_steps:,} of them warm-up",
        "ranks": f"{plan.gpus}: tp {parallel.tp} x dp {plan.dp}, {parallel.precision}, {parallel.optimizer}, "
        f"activation checkpointing {parallel.activation_checkpointing}, data-parallel shard "
        f"{parallel.data_parallel_shard}" + "".join(f", {switch}" for switch in _switches(parallel)),
        "memory a rank": f"{_amount(memory.total)}{of_limit} at the worst moment: "
        + ", ".join(f"{name} {_amount(size)}" for name, size in memory.to_dict().items() if name != "total"),
        "collectives": _traffic(plan),
        "step time": _step_time(plan),
        "FLOPs": f"{plan.flops:.3g}",
        "time": "not known" if plan.seconds is None else _duration(plan.seconds),
    }
    for name, text in lines.items():
        print(f"{name:<14} {text}")
    _print_candidates(plan)
    if plan.gpu is None:
        print(f"no --gpu: {parallel.precision} and no time known; name the GPU for a recommendation")
    print("assumed")
    for assumption in plan.assumptions:
        print(f"  {assumption}")


def _traffic(plan: Plan) -> str:
    """The bytes and calls per step of each collective in each group."""
    sums: dict[str, tuple[int, int]] = {}
    for one in plan.traffic:
        calls, size = sums.get(f"{one.group} {one.collective}", (0, 0))
        sums[f"{one.group} {one.collective}"] = calls + one.calls, size + one.size
    if not sums:
        return "nothing"
    return ", ".join(f"{name} {_amount(size)} in {calls:,} calls" for name, (calls, size) in sums.items()) + " a step"


def _step_time(plan: Plan) -> str:
    if plan.time is None:
        return "not known"
    time = plan.time
    return (
        f"{time.seconds:.3g} s: computation {time.compute:.3g}, communication {time.communication:.3g}, of which "
        f"{time.hidden:.3g} are hidden"
    )


def _print_candidates(plan: Plan) -> None:
    if plan.time is None:
        return
    print("candidates     the first is recommended: of the fastest that fit, one with free memory")
    heads = (
        "tp",
        "dp",
        "shard",
        "checkpointing",
        "also",
        "micro-batch",
        "GiB a rank",
        "s a step",
        "sent s",
        "hidden s",
    )
    rows: dict[tuple[int, str, str], tuple[str, ...]] = {}
    for one in plan.candidates:
        parallel, time = one.parallel, one.time
        assert time is not None
        cells = (
            str(parallel.tp),
            str(parallel.dp),
            parallel.data_parallel_shard,
            parallel.activation_checkpointing,
            ", ".join(_switches(parallel)) or "-",
            str(one.micro_batch),
            f"{one.memory.total / GIB:.1f}" + ("" if one.fits else " no"),
            f"{time.seconds:.3g}",
            f"{time.communication:.2g}",
            f"{time.hidden:.2g}",
        )
        # The best variant of each split: most of the others differ little.
        rows.setdefault((parallel.tp, parallel.data_parallel_shard, parallel.activation_checkpointing), cells)
    shown = [heads, *list(rows.values())[:SHOWN]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(heads))]
    for row in shown:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def _switches(parallel: ParallelConfig) -> list[str]:
    """The settings beside the kinds of sharding and recomputation that are not off."""
    named = {
        f"{parallel.replicas} replicas": parallel.replicas > 1,
        "sequence parallel": parallel.sequence_parallel,
        "overlap": parallel.overlap_collectives,
    }
    return [name for name, is_on in named.items() if is_on]


def _amount(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


@dataclass(frozen=True)
class Module:
    """A row of the parameter table: one parameter, or the same parameter of all layers."""

    name: str
    shape: tuple[int, ...]
    times: int

    @property
    def parameters(self) -> int:
        return self.times * math.prod(self.shape)


def modules_of(config: ModelConfig) -> list[Module]:
    """The rows of the parameter table, in the order of the forward pass."""
    outer = [Module(name, shape, 1) for name, shape in outer_shapes(config).items()]
    layers = [
        Module(f"model.layers.*.{name}", shape, config.num_hidden_layers)
        for name, shape in layer_shapes(config).items()
    ]
    return [outer[0], *layers, *outer[1:]]


def print_parameters(config: ModelConfig, *, as_json: bool) -> None:
    modules, whole = modules_of(config), config.num_parameters
    if as_json:
        rows = [{**asdict(row), "parameters": row.parameters, "share": row.parameters / whole} for row in modules]
        print(json.dumps({**counts(config), "num_hidden_layers": config.num_hidden_layers, "modules": rows}))
        return
    width = max(len(row.name) for row in modules)
    print(f"{'module':<{width}}  {'shape':>15}  {'times':>5}  {'parameters':>15}  {'share':>6}")
    for row in modules:
        shape = " x ".join(map(str, row.shape))
        share = row.parameters / whole
        print(f"{row.name:<{width}}  {shape:>15}  {row.times:>5}  {row.parameters:>15,}  {share:>6.1%}")
    for name, count in (("all", whole), ("without embeddings", config.num_parameters_without_embeddings)):
        print(f"{name:<{width}}  {'':>15}  {'':>5}  {count:>15,}  {count / whole:>6.1%}")
    print(
        f"a vocabulary of {config.vocab_size:,}" + ("; the head is the embedding" if config.tie_word_embeddings else "")
    )
