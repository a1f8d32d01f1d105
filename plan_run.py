"""Plan a run before it is started: parameters, tokens, steps, memory a rank, FLOPs and time.

    python plan_run.py --preset argonne-2b --vocab-size 151669 --gpus 8 --gpu H200
    torchrun --nproc_per_node=8 training.py --config run.yaml
    python plan_run.py --preset argonne-2b --vocab-size 151669 --count-parameters

1. Read what is asked, and the settings of the run.
2. Plan: `colonnade.tuning.plan` splits the ranks and settles the sizes of a step.
3. Print the plan, and write the settings as a file that `training.py --config` takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from colonnade.command_settings import PlanSettings
from colonnade.config import check_settings, complete_settings, load_preset, override
from colonnade.errors import UsageError
from colonnade.files import replace_file
from colonnade.flags import PLANNED, parse_plan
from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.parallel.launch import launch
from colonnade.run_settings import RunSettings
from colonnade.tuning.memory import GIB

if TYPE_CHECKING:
    from colonnade.tuning.plan import Plan

SHOWN = 6  # candidates in the table


def main(arguments: list[str] | None = None) -> None:
    asked, given = parse_plan(arguments)
    if given.get("preset") is None and given.get("model_config") is None:
        raise UsageError("--preset or --model-config is missing: name the model to plan for")
    settings = complete_settings(given)
    output = Path(asked.output)
    if asked.write and not asked.count_parameters and output.exists() and not asked.force:
        raise UsageError(f"--output {output} is there already: give another name, --force, or --no-write")
    config = _model(asked, settings)
    if asked.count_parameters:
        _print_parameters(config, as_json=asked.json)
        return
    # Needs torch, which takes seconds to import: not before the flags have been found right.
    from colonnade.tuning.plan import plan_run

    plan = plan_run(asked, settings, config, given.keys())
    planned = _settings_of(plan, given)
    if asked.write:
        _write(planned, plan, output, asked.gpus_per_node)
    if asked.json:
        print(json.dumps({**_counts(config), **plan.to_dict(), "output": str(output) if asked.write else None}))
    else:
        _print_plan(config, plan)
        if asked.write:
            print(f"written to {output}: {_command(plan, output, asked.gpus_per_node)}")


def _model(asked: PlanSettings, settings: RunSettings) -> ModelConfig:
    from data_processing import vocabulary_size
    from run.data import run_tokenizer
    from run.inputs import named_model

    entries = asked.vocab_size
    if settings.tokenizer_path is not None:
        entries = vocabulary_size(run_tokenizer(settings))
    has_own = settings.preset is not None and "vocab_size" in load_preset(settings.preset)[0]
    if entries is None and settings.preset is not None and not has_own:
        raise UsageError(
            f"--preset {settings.preset} takes its vocabulary from the tokenizer: give --tokenizer-path or --vocab-size"
        )
    config = named_model(settings, entries)
    if asked.vocab_size is not None and config.vocab_size != asked.vocab_size:
        raise UsageError(f"--vocab-size {asked.vocab_size}: the model's config says {config.vocab_size}; leave it out")
    return config


# ------------------------------------------------------------------------------------------------------- the file


def _settings_of(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything `training.py` has to be told, checked as it will check it."""
    kept = {name: value for name, value in given.items() if name not in PLANNED}
    values = override(kept, plan.settings())
    complete_settings(check_settings(values, "the plan"))
    return values


def _write(values: Mapping[str, Any], plan: Plan, path: Path, per_node: int) -> None:
    ranks = f"tp {plan.parallel.tp} x dp {plan.dp}"
    head = f"# {plan.tokens:,} tokens in {plan.steps:,} steps on {ranks}\n# {_command(plan, path, per_node)}\n"
    try:
        replace_file(path, head + yaml.safe_dump(dict(values), sort_keys=False))
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written ({error.strerror}); give another file") from error


def _command(plan: Plan, path: Path, per_node: int) -> str:
    launcher = "python"
    if plan.gpus > 1:
        nodes = max(1, plan.gpus // per_node)
        meeting = " --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=RUN"  # on each node, as usage.md says
        launcher = f"torchrun --nproc_per_node={plan.gpus // nodes}"
        launcher += f" --nnodes={nodes}{meeting}" if nodes > 1 else ""
    return f"{launcher} training.py --config {path}"


# -------------------------------------------------------------------------------------------------- what is printed


def _counts(config: ModelConfig) -> dict[str, Any]:
    return {
        "parameters": config.num_parameters,
        "parameters_without_embeddings": config.num_parameters_without_embeddings,
        "vocab_size": config.vocab_size,
    }


def _print_plan(config: ModelConfig, plan: Plan) -> None:
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
        f"{parallel.data_parallel_shard}",
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
    print("assumed")
    for assumption in plan.assumptions:
        print(f"  {assumption}")


def _traffic(plan: Plan) -> str:
    """Of each group and collective the bytes and calls of a step."""
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
    print("candidates     the fastest that fits is recommended")
    heads = ("tp", "dp", "shard", "checkpointing", "micro-batch", "GiB a rank", "s a step", "sent s", "hidden s")
    print("  " + "  ".join(f"{head:>11}" for head in heads))
    for one in plan.candidates[:SHOWN]:
        parallel, time = one.parallel, one.time
        assert time is not None
        cells: tuple[str | int, ...] = (
            parallel.tp,
            parallel.dp,
            parallel.data_parallel_shard,
            parallel.activation_checkpointing,
            one.micro_batch,
            f"{one.memory.total / GIB:.1f}" + ("" if one.fits else " no"),
            f"{time.seconds:.3g}",
            f"{time.communication:.2g}",
            f"{time.hidden:.2g}",
        )
        print("  " + "  ".join(f"{cell:>11}" for cell in cells))


def _amount(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


@dataclass(frozen=True)
class Module:
    """A row of the table of parameters: one parameter, or those of all layers that are alike."""

    name: str
    shape: tuple[int, ...]
    times: int

    @property
    def parameters(self) -> int:
        return self.times * math.prod(self.shape)


def modules_of(config: ModelConfig) -> list[Module]:
    """The rows in the order of the forward pass."""
    outer = [Module(name, shape, 1) for name, shape in outer_shapes(config).items()]
    layers = [
        Module(f"model.layers.*.{name}", shape, config.num_hidden_layers)
        for name, shape in layer_shapes(config).items()
    ]
    return [outer[0], *layers, *outer[1:]]


def _print_parameters(config: ModelConfig, *, as_json: bool) -> None:
    modules, whole = modules_of(config), config.num_parameters
    if as_json:
        rows = [{**asdict(row), "parameters": row.parameters, "share": row.parameters / whole} for row in modules]
        print(json.dumps({**_counts(config), "num_hidden_layers": config.num_hidden_layers, "modules": rows}))
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


if __name__ == "__main__":
    launch(main)
