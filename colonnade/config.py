"""Assembling run settings: flags (`flags.py`), a YAML file and presets fill one table (`run_settings.py`).

Precedence: built-in defaults < the preset's `training` section < `--config` file < flags. Nothing heavy is imported, so
that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from colonnade.errors import UsageError
from colonnade.files import replace_file
from colonnade.other_names import advice
from colonnade.run_settings import RunSettings
from colonnade.setting_values import brief, check_field, multiples_near, read_yaml

PRESET_FOLDER = Path(__file__).resolve().parent.parent / "presets"

# ---------------------------------------------------------------------------------------------------- checking


def check_settings(values: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Check setting names and values from a file: each name is known, each value has its type and is within limits.

    Raises:
        UsageError: names `source`, the key and the limit; for an unknown key, the one that may have been meant.
    """
    specs = {spec.name: spec for spec in fields(RunSettings)}
    checked = {}
    for key, value in values.items():
        if key not in specs:
            told = advice(str(key)[:100], specs, "the flags in --help are the keys, with _ for -")
            if isinstance(value, Mapping):
                told = "settings are flat: write its keys without a section"
            raise UsageError(f"{source}: unknown key {brief.repr(key)}; {told}")
        checked[key] = check_field(specs[key], value, f"{source}: {key}")
    return checked


def read_settings(path: Path, source: str) -> dict[str, Any]:
    """The settings in a YAML file. `source` is the flag that named it. Raises UsageError."""
    return check_settings(read_yaml(path, source), f"{source} {path}")


# ----------------------------------------------------------------------------------------------------- presets


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_preset(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A preset's (model sizes, recommended settings). `name` is one of `preset_names`, or a path to a .yaml file.

    Raises:
        UsageError: there is no preset of that name (the existing ones are listed), or its file has other sections.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESET_FOLDER / f"{name}.yaml"
        if name not in preset_names():
            raise UsageError(
                f"--preset {brief.repr(name)} does not exist; there are {', '.join(preset_names())}, or give the path "
                "of a .yaml file of your own"
            )
    values = read_yaml(path, "--preset")
    model, training = values.pop("model", None), values.pop("training", {})
    if values or not isinstance(model, dict) or not isinstance(training, dict):
        raise UsageError(
            f"--preset {path}: must hold a mapping 'model', may hold a mapping 'training', and nothing else"
        )
    return model, check_settings(training, f"--preset {path}")


# ---------------------------------------------------------------------------------------------- putting together

# Pairs of switches that cannot both be on.
_CONTRADICTIONS = (
    ("compile", "disable_compile"),
    ("plain_step", "compile"),
    ("plain_step", "cuda_graphs"),
    ("plain_step", "overlap_collectives"),
)
# Pairs of settings that answer the same question. Giving one replaces the other if that has lower precedence.
_ALTERNATIVES = (
    *_CONTRADICTIONS,
    ("preset", "model_config"),
    ("preset", "init_from"),
    ("activation_checkpointing", "disable_gradient_checkpointing"),
    ("tokens_per_step", "gradient_accumulation_steps"),
)


def override(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two sources of settings; those in `above` take precedence over those in `below`.

    A setting in `above` also drops from `below` its alternatives, and the settings it makes meaningless (`only_with`).
    """
    replaced = {other for pair in _ALTERNATIVES for one, other in (pair, pair[::-1]) if above.get(one)}
    for spec in fields(RunSettings):
        other, values = spec.metadata.get("only_with", ("", ()))
        if other in above and above[other] not in values:
            replaced.add(spec.name)
    return {**{name: value for name, value in below.items() if name not in replaced}, **above}


def complete_settings(given: Mapping[str, Any]) -> RunSettings:
    """Fill in what was not given from the preset's recommendations and the defaults, and check for contradictions.

    Raises:
        UsageError: an unknown preset, or settings that contradict each other.
    """
    settings = RunSettings(**given)
    if settings.preset is not None:
        if settings.model_config is not None:
            raise UsageError(f"--preset {settings.preset} and --model-config {settings.model_config}: give one of them")
        if settings.init_from is not None:
            raise UsageError(
                f"--preset {settings.preset} and --init-from {settings.init_from}: its weights have an architecture of "
                "their own; leave --preset out"
            )
        settings = RunSettings(**override(load_preset(settings.preset)[1], given))
    return check_contradictions(settings)


def sequences_of_step(tokens_per_step: int, block_size: int) -> int:
    """The number of sequences in --tokens-per-step. Raises UsageError unless it is a whole number."""
    sequences, rest = divmod(tokens_per_step, block_size)
    if rest:
        near = " or ".join(map(str, multiples_near(tokens_per_step, block_size)))
        raise UsageError(
            f"--tokens-per-step {tokens_per_step} is no multiple of --block-size {block_size}; nearest: {near}"
        )
    return sequences


def check_contradictions(settings: RunSettings) -> RunSettings:
    """Return `settings` unchanged if no two of them contradict each other. Raises UsageError."""
    for one, other in _CONTRADICTIONS:
        if getattr(settings, one) and getattr(settings, other):
            flags = f"--{one} and --{other}".replace("_", "-")
            raise UsageError(f"{flags} contradict each other: give one of them")
    if settings.disable_gradient_checkpointing and settings.activation_checkpointing not in (None, "none"):
        raise UsageError(
            f"--disable-gradient-checkpointing and --activation-checkpointing {settings.activation_checkpointing} "
            "contradict each other: give one of them"
        )
    if settings.tokens_per_step is not None and settings.gradient_accumulation_steps > 1:
        raise UsageError(
            f"--tokens-per-step {settings.tokens_per_step} and --gradient-accumulation-steps "
            f"{settings.gradient_accumulation_steps}: accumulation follows from the tokens; give one of them"
        )
    if settings.sample_interval > 0 and settings.sample_prompts is None:
        raise UsageError(f"--sample-interval {settings.sample_interval} needs prompts: give --sample-prompts FILE")
    if settings.deterministic and settings.replicate_embeddings:
        raise UsageError(
            "--deterministic and --replicate-embeddings: whole tables are summed in another order than their slices; "
            "leave out one of them"
        )
    _check_meanings(settings)
    if settings.min_learning_rate is not None and settings.min_learning_rate > settings.learning_rate:
        raise UsageError(
            f"--min-learning-rate {settings.min_learning_rate} is above --learning-rate {settings.learning_rate}: "
            f"give one that is not, as a tenth of it ({settings.learning_rate / 10:g})"
        )
    if settings.schedule_steps is not None and settings.schedule_steps <= settings.warmup_steps:
        raise UsageError(
            f"--schedule-steps {settings.schedule_steps} ends within --warmup-steps {settings.warmup_steps}, after "
            "which the learning rate would fall to its minimum at once: raise the first or lower the second"
        )
    horizon = settings.schedule_steps or settings.total_steps
    if settings.decay_steps is not None and settings.decay_steps > horizon - settings.warmup_steps:
        raise UsageError(
            f"--decay-steps {settings.decay_steps} and --warmup-steps {settings.warmup_steps} are more than the "
            f"{horizon} steps of the schedule: lower one of them"
        )
    return settings


def _check_meanings(settings: RunSettings) -> None:
    """Refuse a setting that differs from its default and would be ignored."""
    defaults = RunSettings()
    for name, (other, values) in settings.without_meaning().items():
        value, flag, other_flag = getattr(settings, name), name.replace("_", "-"), other.replace("_", "-")
        if value != getattr(defaults, name):
            raise UsageError(
                f"--{flag} {value} says nothing with --{other_flag} {getattr(settings, other)}: leave it out, or give "
                f"--{other_flag} {' or '.join(values)}"
            )


def write_settings(settings: RunSettings, path: Path) -> None:
    """Save settings as YAML that `--config` can read back. Raises OSError."""
    replace_file(path, yaml.safe_dump(settings.to_dict(), sort_keys=False))
