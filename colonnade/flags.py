"""Command-line parsing for the commands: flags generated from the tables of settings.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from colonnade.command_settings import (
    EvaluationSettings,
    ParitySettings,
    PlanSettings,
    ResumeSettings,
    TrainedModelSettings,
)
from colonnade.config import complete_settings, override, read_settings
from colonnade.errors import UsageError
from colonnade.other_names import advice
from colonnade.run_settings import RunSettings
from colonnade.setting_values import check_field, flag_of, useless_alone

_TRAINING = (
    "Pretrain a decoder-only language model with tensor parallelism. Use torchrun to start several ranks. If "
    "the folder already holds the run, it resumes where it stopped. Defaults are in parentheses; a preset may "
    "set others."
)
_RESUME = (
    "Resume a pretraining run from a checkpoint with changed settings, on any number of ranks. Settings that "
    "are not given keep the run's values, not the defaults in parentheses. Unless --keep-optimizer is given, "
    "the optimizer is reset and the learning rate warmed up again."
)
_PLAN = (
    "Plan a run before starting it: print parameters, tokens, steps, memory per rank, FLOPs and time, and write "
    "a settings file for training.py --config. Run settings given here are copied into that file. No GPU is "
    "needed."
)
# The settings that a plan determines. In a --config file, the first two stand for --total-steps and --micro-batch-size.
PLANNED = ("total_steps", "initial_batch_size", "gradient_accumulation_steps")

_EVALUATION = (
    "Compute loss, perplexity and bits per byte of a trained model on text, on any number of ranks, scoring "
    "every token once; and run benchmark tasks through lm-eval. Defaults are in parentheses."
)
_PARITY = (
    "Train the first steps of a run twice, sharded over all ranks and unsharded on the first rank, from the "
    "same weights on the same blocks, and compare. Start it under torchrun. Accepts every flag of training.py, "
    "so a run's own command line or settings file can be reused; flags for checkpoints, validation, logs and "
    "stopping do not affect the comparison."
)


def parse_training(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The settings given to `training.py`, by flag or in a file; `complete_settings` fills in the others.

    Raises:
        UsageError: a flag, key or value that cannot be used, or several that contradict each other.
        SystemExit: after --help.
    """
    parser = _SettingsParser(prog="training.py", description=_TRAINING)
    parser.add_table(RunSettings)
    given = _run_settings(parser.parse(arguments))
    complete_settings(given)
    return given


def parse_resume(arguments: Sequence[str] | None = None) -> tuple[ResumeSettings, dict[str, Any]]:
    """How to resume, and the run settings given to `resume_pretrain_tensor.py`, by flag or in a file.

    Raises:
        UsageError: a flag, key or value that cannot be used.
        SystemExit: after --help.
    """
    parser = _SettingsParser(prog="resume_pretrain_tensor.py", description=_RESUME)
    parser.add_table(ResumeSettings)
    parser.add_table(RunSettings, leave_out=("seed",))
    parser.add_argument("--batch-size", metavar="SIZE", default=argparse.SUPPRESS, help="same as --initial-batch-size")
    values = parser.parse(arguments)
    if "batch_size" in values:
        if "initial_batch_size" in values:
            raise UsageError("--batch-size and --initial-batch-size are the same: give one of them")
        spec = next(spec for spec in fields(RunSettings) if spec.name == "initial_batch_size")
        values["initial_batch_size"] = check_field(spec, values.pop("batch_size"), "--batch-size")
    resume = _checked(ResumeSettings, values)
    if "checkpoint_path" not in resume:
        raise UsageError("--checkpoint-path is missing: give a run's folder, one of its checkpoints, or a .pth file")
    if resume.get("keep_optimizer"):
        if resume.get("rewarmup_steps"):
            raise UsageError(
                f"--keep-optimizer goes on without a warm-up: leave out --rewarmup-steps {resume['rewarmup_steps']}"
            )
        resume["rewarmup_steps"] = 0
    return ResumeSettings(**resume), _run_settings(values)


def parse_plan(arguments: Sequence[str] | None = None) -> tuple[PlanSettings, dict[str, Any]]:
    """The plan's own settings, and the run settings given to `plan_run.py`, by flag or in a file.

    Raises:
        UsageError: a flag, key or value that cannot be used, or several that contradict each other.
        SystemExit: after --help.
    """
    parser = _SettingsParser(prog="plan_run.py", description=_PLAN)
    parser.add_table(PlanSettings)
    parser.add_table(RunSettings, leave_out=PLANNED)
    values = parser.parse(arguments)
    plan = _checked(PlanSettings, values)
    given = _run_settings(values)
    _settle_length_and_batch(plan, given)
    if "vocab_size" in plan and given.get("tokenizer_path") is not None:
        raise UsageError(
            f"--vocab-size {plan['vocab_size']} and --tokenizer-path {given['tokenizer_path']}: give one of them"
        )
    return PlanSettings(**plan), given


def _settle_length_and_batch(plan: dict[str, Any], given: dict[str, Any]) -> None:
    """Add the number of steps and the micro-batch of a --config file to the plan's settings; its flags override them.

    Raises:
        UsageError: two flags give the length of the run, or the file gives accumulation.
    """
    lengths = [name for name in ("tokens", "tokens_per_parameter", "total_steps") if name in plan]
    if len(lengths) > 1:
        told = " and ".join(f"{flag_of(name)} {plan[name]}" for name in lengths)
        raise UsageError(f"{told}: give one of them")
    if lengths:
        given.pop("total_steps", None)
    elif "total_steps" in given:
        plan["total_steps"] = given["total_steps"]
    if given.get("initial_batch_size", "auto") != "auto":
        plan.setdefault("micro_batch_size", int(given["initial_batch_size"]))
    if given.get("gradient_accumulation_steps", 1) > 1:
        raise UsageError(
            f"--config: gradient_accumulation_steps {given['gradient_accumulation_steps']}: accumulation follows from "
            "the tokens of a step and the ranks; leave it out, and give --tokens-per-step if they are to be fixed"
        )


def parse_parity(arguments: Sequence[str] | None = None) -> tuple[ParitySettings, dict[str, Any]]:
    """What to compare, and the run settings given to `check_parity.py`, by flag or in a file.

    Raises:
        UsageError: a flag, key or value that cannot be used.
        SystemExit: after --help.
    """
    parser = _SettingsParser(prog="check_parity.py", description=_PARITY)
    parser.add_table(ParitySettings)
    parser.add_table(RunSettings)
    values = parser.parse(arguments)
    given = _run_settings(values)
    if "checkpoint_path" not in values:  # else the checkpoint's settings are merged below the given ones first
        complete_settings(given)
    return ParitySettings(**_checked(ParitySettings, values)), given


# Settings of `evaluate.py` that have no effect without another one: {the needed one: those that need it}.
_ONLY_WITH = {
    "data_glob": ("text_column", "concatenate", "stride", "max_documents", "max_tokens"),
    "tasks": ("tasks_path", "few_shot", "task_limit"),
}


def parse_evaluation(arguments: Sequence[str] | None = None) -> EvaluationSettings:
    """The settings given to `evaluate.py`: which model, and what to score.

    Raises:
        UsageError: a flag or value that cannot be used, or there is nothing to score.
        SystemExit: after --help.
    """
    parser = OneLineParser(prog="evaluate.py", description=_EVALUATION)
    parser.add_table(EvaluationSettings)
    values = _checked(EvaluationSettings, parser.parse(arguments))
    settings = EvaluationSettings(**values)
    if not settings.checkpoint_path:
        raise UsageError("--checkpoint-path is missing: give a run's folder, one of its checkpoints, or a .pth file")
    if settings.data_glob is None and settings.tasks is None:
        raise UsageError("--data-glob is missing: give the files whose text is to be scored, or --tasks")
    for needed, names in _ONLY_WITH.items():
        for name in names:
            if name in values and needed not in values:
                raise useless_alone(name, needed)
    return settings


def _run_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The run settings of a command line, merged over those of the --config file it names."""
    flags = _checked(RunSettings, values)
    if "config" in values:
        return override(read_settings(Path(values["config"]), "--config"), flags)
    return flags


def _checked(table: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are fields of `table`, checked and converted. Raises UsageError."""
    specs = {spec.name: spec for spec in fields(table)}
    return {key: check_field(specs[key], value, flag_of(key)) for key, value in values.items() if key in specs}


class OneLineParser(argparse.ArgumentParser):
    """argparse for several ranks: one-line errors, help printed by rank 0 only, no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that is unique today could match another flag, or become ambiguous, after an update.
        super().__init__(allow_abbrev=False, **options)

    def parse(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The given flags by name. Raises UsageError for an unknown flag, saying which one may have been meant."""
        arguments = sys.argv[1:] if arguments is None else arguments
        namespace, unknown = self.parse_known_args(arguments)
        for argument in unknown:
            if not argument.startswith("--"):
                raise UsageError(
                    f"argument {argument!r:.100} belongs to no flag; {self._why_stray(argument, arguments)}"
                )
            name = argument.partition("=")[0][:100]
            known = [option for option in self._option_string_actions if option not in ("--help", "-h")]
            raise UsageError(f"unknown flag {name}; {advice(name, known, '--help lists the flags')}")
        return vars(namespace)

    def _why_stray(self, argument: str, arguments: Sequence[str]) -> str:
        """What to do about an argument that no flag takes, from the flag that it comes after."""
        before = [one for one in arguments[: list(arguments).index(argument)] if one.startswith("--")]
        flag = before[-1].partition("=")[0] if before else ""
        action = self._option_string_actions.get(flag)
        if isinstance(action, argparse.BooleanOptionalAction):
            name = flag.removeprefix("--no-").removeprefix("--")
            return f"write --{name} for true, --no-{name} for false"
        if flag.endswith("-glob"):
            return f"quote the pattern, else the shell replaces it by the files: {flag} 'FOLDER/*'"
        return "--help lists the flags"

    def error(self, message: str) -> Any:
        # argparse says "ignored" of an argument that it in fact rejects.
        told = message.replace("ignored explicit argument", "takes no value, and was given")
        raise UsageError(f"{told[:300]}; --help lists the flags")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)

    def add_table(self, table: type, *, leave_out: Collection[str] = (), required: Collection[str] = ()) -> None:
        """Add one flag per field, in the fields' groups. Flags that are not given stay out of the namespace."""
        groups: dict[str, Any] = {}
        for spec in fields(table):
            if spec.name in leave_out:
                continue
            facts = spec.metadata
            group = groups.get(facts["group"]) or groups.setdefault(
                facts["group"], self.add_argument_group(facts["group"])
            )
            if spec.type == "bool":
                group.add_argument(
                    flag_of(spec.name),
                    action=argparse.BooleanOptionalAction,
                    default=argparse.SUPPRESS,
                    help=facts["help"] + (" (default on)" if spec.default else ""),
                )
                continue
            choices = "{" + ",".join(facts["choices"]) + "}" if "choices" in facts else None
            metavar = choices or facts.get("unit") or spec.name.split("_")[-1].upper()
            default = "" if spec.default in (None, "") else f" (default {spec.default})"
            group.add_argument(
                flag_of(spec.name),
                metavar=metavar,
                required=spec.name in required,
                default=argparse.SUPPRESS,
                help=facts["help"] + default,
            )


class _SettingsParser(OneLineParser):
    """A parser that also takes a file of run settings (--config)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        text = "YAML file of settings by name; flags override it"
        self.add_argument("--config", metavar="YAML", default=argparse.SUPPRESS, help=text)


class TrainedModelParser(OneLineParser):
    """The parser of a command that reads a trained model, with the flags of `TrainedModelSettings`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_table(TrainedModelSettings, required=("checkpoint_path",))

    def parse_with_model(self, arguments: Sequence[str] | None) -> tuple[TrainedModelSettings, argparse.Namespace]:
        """The settings that name the model, and all given flags. Raises UsageError."""
        values = self.parse(arguments)
        return TrainedModelSettings(**_checked(TrainedModelSettings, values)), argparse.Namespace(**values)
