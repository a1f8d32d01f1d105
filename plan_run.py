"""Plan a run before starting it: parameters, tokens, steps, memory per rank, FLOPs and time.

    python plan_run.py --preset argonne-2b --vocab-size 151669 --gpus 8 --gpu H200
    torchrun --nproc_per_node=8 training.py --config run.yaml
    python plan_run.py --preset argonne-2b --vocab-size 151669 --count-parameters

1. Read the planning flags and the settings of the run.
2. Plan: `colonnade.tuning.plan` chooses the layout of the ranks and the batch sizes of a step.
3. Print the plan, and write the settings to a file for `training.py --config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from colonnade.command_settings import PlanSettings
from colonnade.config import check_settings, complete_settings, load_preset, override
from colonnade.errors import UsageError
from colonnade.files import replace_file
from colonnade.flags import PLANNED, parse_plan
from colonnade.model_config import ModelConfig
from colonnade.run_settings import RunSettings
from colonnade.runtime.launch import launch
from run.plan_report import counts, print_parameters, print_plan

if TYPE_CHECKING:
    from colonnade.tuning.plan import Plan


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
        print_parameters(config, as_json=asked.json)
        return
    # Needs torch; importing it takes seconds, so it waits until the flags have been validated.
    from colonnade.tuning.plan import plan_run

    plan = plan_run(asked, settings, config, given.keys())
    planned = _settings_of(plan, given)
    if asked.write:
        _write(planned, plan, output, asked.gpus_per_node)
    if asked.json:
        print(json.dumps({**counts(config), **plan.to_dict(), "output": str(output) if asked.write else None}))
    else:
        print_plan(config, plan)
        if asked.write:
            print(f"written to {output}: {_command(plan, output, asked.gpus_per_node, planned)}")


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
    """All settings that `training.py` needs, validated as it will validate them."""
    kept = {name: value for name, value in given.items() if name not in PLANNED}
    values = override(kept, plan.settings())
    complete_settings(check_settings(values, "the plan"))
    return values


def _write(values: Mapping[str, Any], plan: Plan, path: Path, per_node: int) -> None:
    ranks = f"tp {plan.parallel.tp} x dp {plan.dp}"
    head = f"# {plan.tokens:,} tokens in {plan.steps:,} steps on {ranks}\n# {_command(plan, path, per_node, values)}\n"
    try:
        replace_file(path, head + yaml.safe_dump(dict(values), sort_keys=False))
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written ({error.strerror}); give another file") from error


def _command(plan: Plan, path: Path, per_node: int, values: Mapping[str, Any]) -> str:
    """The command that starts the run, with a placeholder for what the file of `values` lacks: data and tokenizer."""
    launcher = "python"
    if plan.gpus > 1:
        nodes = max(1, plan.gpus // per_node)
        meeting = " --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=RUN"  # on each node, see docs/usage.md
        launcher = f"torchrun --nproc_per_node={plan.gpus // nodes}"
        launcher += f" --nnodes={nodes}{meeting}" if nodes > 1 else ""
    missing = "" if values.get("data_glob") else " --data-glob 'FOLDER/*.parquet'"
    if not values.get("tokenizer_path") and not values.get("init_from"):
        missing += " --tokenizer-path TOKENIZER"
    return f"{launcher} training.py --config {path}{missing}"


if __name__ == "__main__":
    launch(main)
