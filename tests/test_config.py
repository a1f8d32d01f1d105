"""Settings: one table, filled by flags, YAML and presets; limits, precedence, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import string
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import export_hf
import model
from colonnade.config import complete_settings, load_preset, override, preset_names, write_settings
from colonnade.errors import UsageError
from colonnade.flags import parse_evaluation, parse_plan, parse_resume, parse_training
from colonnade.other_names import _OTHER_NAMES
from colonnade.run_settings import MAX_STEPS, MAX_TOKENS_PER_STEP, RunSettings
from colonnade.setting_values import wall_time_seconds

ROOT = Path(__file__).resolve().parent.parent
SPECS = {spec.name: spec for spec in dataclasses.fields(RunSettings)}

# A value of each setting that is not its default, as text and as what it means.
VALUES: dict[str, tuple[str, Any]] = {
    "preset": ("tiny", "tiny"),
    "model_config": ("some/config.json", "some/config.json"),
    "data_glob": ("a/*.parquet, b/*.arrow", "a/*.parquet, b/*.arrow"),
    "tokenizer_path": ("gpt2", "gpt2"),
    "validation_glob": ("v*.parquet", "v*.parquet"),
    "validation_interval": ("0", 0),
    "validation_chunks": ("7", 7),
    "block_size": ("32", 32),
    "initial_batch_size": ("16", "16"),
    "gradient_accumulation_steps": ("3", 3),
    "tokens_per_step": ("4096", 4096),
    "memory_limit_gib": ("2.5", 2.5),
    "total_steps": ("77", 77),
    "learning_rate": ("1e-3", 0.001),
    "min_learning_rate": ("0", 0.0),
    "warmup_steps": ("0", 0),
    "schedule": ("wsd", "wsd"),
    "schedule_steps": ("888", 888),
    "init_from": ("folder", "folder"),
    "sample_interval": ("50", 50),
    "sample_prompts": ("prompts.txt", "prompts.txt"),
    "sample_tokens": ("12", 12),
    "sample_temperature": ("0.5", 0.5),
    "decay_steps": ("9", 9),
    "decay_shape": ("linear", "linear"),
    "optimizer": ("muon", "muon"),
    "muon_momentum": ("0.9", 0.9),
    "data_parallel_shard": ("zero3", "zero3"),
    "data_parallel_replicate_size": ("2", 2),
    "activation_checkpointing": ("selective", "selective"),
    "z_loss": ("1e-4", 1e-4),
    "weight_decay": ("1e-1", 0.1),
    "adam_beta1": ("0", 0.0),
    "adam_beta2": (".99", 0.99),
    "max_grad_norm": ("0", 0.0),
    "seed": ("0", 0),
    "text_column": ("body", "body"),
    "data_lanes": ("12", 12),
    "packing": ("best-fit", "best-fit"),
    "precision": ("bf16", "bf16"),
    "tokenizer_backend": ("hf", "hf"),
    "tensor_parallel_size": ("2", 2),
    "tensor_slices": ("8", 8),
    "checkpoint_dir": ("runs/a b", "runs/a b"),
    "checkpoint_interval": ("0", 0),
    "keep_checkpoints": ("0", 0),
    "keep_every": ("500", 500),
    "checkpoint_mode": ("sync", "sync"),
    "wall_time": ("1-23:30:00", "1-23:30:00"),
    "startup_timeout": ("60", 60.0),
    "step_timeout": ("2.5", 2.5),
    "wandb_project": ("demo", "demo"),
    "wandb_entity": ("me", "me"),
    "wandb_run_name": ("a run", "a run"),
    "log_interval": ("1", 1),
    "fingerprint_interval": ("0", 0),
    "drift_check_interval": ("5", 5),
    "max_skipped_steps": ("3", 3),
    "spike_sigma": ("4.5", 4.5),
    "spike_window": ("50", 50),
    "spike_action": ("skip", "skip"),
    "profile_start": ("10", 10),
    "profile_steps": ("2", 2),
}
SWITCHES = sorted(name for name, spec in SPECS.items() if spec.type == "bool")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def write(path: Path, values: Mapping[str, Any] | str) -> str:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(dict(values)), encoding="utf-8")
    return str(path)


def refusal(*flags: str, parse: Any = parse_training) -> str:
    """The line that refuses a command line."""
    with pytest.raises(UsageError) as caught:
        parse(list(flags))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


# ------------------------------------------------------------------------------------------------- one value, two ways


def test_every_setting_has_a_sample() -> None:
    assert VALUES.keys() | set(SWITCHES) == SPECS.keys()


def flags_of(settings: Mapping[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (flag(name), value)]


def beside(name: str) -> dict[str, str]:
    """The other setting that a setting needs to mean something, where that is not the default."""
    if name == "sample_interval":
        return {"sample_prompts": "prompts.txt"}
    other, values = SPECS[name].metadata.get("only_with", (None, ()))
    return {} if other is None or SPECS[other].default in values else {other: values[0]}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_and_a_file_mean_the_same(name: str, tmp_path: Path) -> None:
    text, meaning = VALUES[name]
    others = beside(name)
    expected = {**others, name: meaning}
    assert parse_training([flag(name), text, *flags_of(others)]) == expected
    assert parse_training(["--config", write(tmp_path / "c.yaml", {**others, name: text})]) == expected
    # As YAML's own type, where it has one.
    assert parse_training(["--config", write(tmp_path / "c.yaml", expected)]) == expected


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name: str, tmp_path: Path) -> None:
    assert parse_training([]) == {}
    assert parse_training([flag(name)]) == {name: True}
    path = write(tmp_path / "on.yaml", {name: True})
    assert parse_training(["--config", path, "--no-" + name.replace("_", "-")]) == {name: False}
    assert parse_training(["--config", write(tmp_path / "c.yaml", {name: False})]) == {name: False}
    for wrong in ("yes", 1, None, [True]):
        assert "must be true or false" in refusal("--config", write(tmp_path / "c.yaml", {name: wrong}))


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "learning_rate: 1e-3\nmin_learning_rate: 1E-5\ntotal_steps: '12'\n")
    assert isinstance(yaml.safe_load(Path(path).read_text())["learning_rate"], str)
    assert parse_training(["--config", path]) == {"learning_rate": 1e-3, "min_learning_rate": 1e-5, "total_steps": 12}


# -------------------------------------------------------------------------------------------------------------- limits

LIMITS: list[tuple[str, list[str], list[str]]] = [  # name, what is refused, what is just allowed
    ("block_size", ["0", "-1"], ["1"]),
    ("initial_batch_size", ["0", "-2", "65537", "1.5", "Auto", "٣", " 4", "1" * 5000], ["1", "65536", "auto"]),
    ("gradient_accumulation_steps", ["0", "-1", str(MAX_TOKENS_PER_STEP + 1)], ["1"]),
    ("tokens_per_step", ["0", "-32", str(MAX_TOKENS_PER_STEP + 1)], ["1", str(MAX_TOKENS_PER_STEP)]),
    ("memory_limit_gib", ["0", "-1", "1e300"], ["1e-9"]),
    ("total_steps", ["0", "-1", str(MAX_STEPS + 1)], ["1", str(MAX_STEPS)]),
    ("learning_rate", ["0", "-1e-3", "1e-400", "11"], ["1e-30", "10"]),
    ("min_learning_rate", ["-1e-9"], ["0"]),
    ("warmup_steps", ["-1", str(MAX_STEPS + 1)], ["0"]),
    ("schedule", ["WSD", "cos", "none"], ["cosine", "wsd", "constant"]),
    ("schedule_steps", ["0", "-1", str(MAX_STEPS + 1)], ["101", str(MAX_STEPS)]),  # the warm-up takes 100
    ("decay_steps", ["0", "-1", str(MAX_STEPS + 1)], ["1"]),
    ("decay_shape", ["sqrt", "1-SQRT"], ["1-sqrt", "linear", "cosine"]),
    ("optimizer", ["adam", "Muon"], ["adamw", "muon"]),
    ("muon_momentum", ["-0.1", "1", "1.5"], ["0", "0.999999"]),
    ("weight_decay", ["-0.1"], ["0"]),
    ("adam_beta1", ["-0.1", "1", "1.5"], ["0", "0.999999"]),
    ("adam_beta2", ["-0.1", "1", "1.5"], ["0", "0.999999"]),
    ("max_grad_norm", ["-1"], ["0"]),
    ("seed", ["-1", str(2**63)], ["0", str(2**63 - 1)]),
    ("precision", ["fp8", "FP32", "half"], ["auto", "fp32", "bf16", "fp16"]),
    ("tokenizer_backend", ["rust", "HF", "fast"], ["auto", "hf", "fastokens"]),
    ("tensor_parallel_size", ["0", "-2"], ["1"]),
    ("tensor_slices", ["0", "-2"], ["1"]),
    ("validation_interval", ["-1"], ["0"]),
    ("validation_chunks", ["-1"], ["0"]),
    ("checkpoint_interval", ["-1"], ["0"]),
    ("keep_checkpoints", ["-1"], ["0"]),
    ("log_interval", ["0", "-1"], ["1"]),
    ("drift_check_interval", ["-1"], ["0"]),
    ("max_skipped_steps", ["0", "-1", str(MAX_STEPS + 1)], ["1"]),
    ("spike_sigma", ["-1"], ["0"]),
    ("sample_temperature", ["-1", "1e-45", "0.00009"], ["0", "0.0001"]),
    ("spike_window", ["9", "10001"], ["10", "10000"]),
    ("spike_action", ["stop", "Skip"], ["warn", "skip"]),
]


@pytest.mark.parametrize(("name", "refused", "allowed"), LIMITS, ids=[name for name, _, _ in LIMITS])
def test_limits(name: str, refused: list[str], allowed: list[str]) -> None:
    for text in refused:
        line = refusal(f"{flag(name)}={text}")
        assert line.startswith(f"{flag(name)} is ")
        assert "; it must be " in line
    for text in allowed:
        assert str(parse_training([flag(name), text, *flags_of(beside(name))])[name])


def numeric(kind: str) -> list[str]:
    return [name for name, spec in SPECS.items() if str(spec.type).startswith(kind)]


@pytest.mark.parametrize("name", numeric("int"))
def test_whole_numbers(name: str, tmp_path: Path) -> None:
    for text in ("x", "1.5", "1e-2", "nan", "inf", "", "0x10", "9" * 5000, "1e999999999", "K", "1.5e0"):
        assert "it must be a whole number" in refusal(flag(name), text)
    for value in (True, 1.5, float("nan"), [1], {"a": 1}, "x"):
        line = refusal("--config", write(tmp_path / "c.yaml", {name: value}))
        assert line.startswith(f"--config {tmp_path / 'c.yaml'}: {name} is ")
        assert "it must be a whole number" in line


def test_whole_numbers_as_people_write_them(tmp_path: Path) -> None:
    for name, texts, number in (
        ("total_steps", ("1e4", "10_000", "10000.0", "1E+4"), 10_000),
        ("tokens_per_step", ("1e6", "1M", "1000k", "0.001B", "1_000_000"), 1_000_000),
        ("seed", ("9007199254740993", "9007199254740993.0"), 2**53 + 1),  # which a float cannot hold
    ):
        for text in texts:
            for parsed in (
                parse_training([flag(name), text]),
                parse_training(["--config", write(tmp_path / "c.yaml", f"{name}: {text}\n")]),
            ):
                assert parsed == {name: number} or (parsed[name] == 2**53 and text.endswith(".0"))  # YAML's own float
                assert type(parsed[name]) is int
    assert parse_plan(["--preset", "tiny", "--tokens", "2T"])[0].tokens == 2 * 10**12
    assert parse_plan(["--preset", "tiny", "--tokens", "2.5e12"])[0].tokens == 25 * 10**11
    for text in ("1.0005K", "1.5", "2G", "2TT", "T"):
        assert "it must be a whole number" in refusal("--tokens", text, parse=parse_plan)
    # Where K could be 1024 it is not accepted.
    for name in ("total_steps", "block_size", "seed"):
        assert "it must be a whole number" in refusal(flag(name), "4K")


def test_other_words_for_precisions(tmp_path: Path) -> None:
    for long, short in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")):
        assert parse_training(["--precision", long]) == {"precision": short}
        assert parse_training(["--config", write(tmp_path / "c.yaml", {"precision": long})]) == {"precision": short}
        export = ["--checkpoint-path", "x", "--output", "y", "--dtype"]
        assert export_hf._parse([*export, long])[1].dtype == export_hf._parse([*export, short])[1].dtype == long


@pytest.mark.parametrize("name", numeric("float"))
def test_finite_numbers(name: str, tmp_path: Path) -> None:
    for text in ("x", "nan", "inf", "-inf", "1e400", "", "1,5"):
        assert "it must be a finite number" in refusal(f"{flag(name)}={text}")
    for value in (True, float("nan"), float("inf"), 10**400, [1.0], {"a": 1}):
        assert "it must be a finite number" in refusal("--config", write(tmp_path / "c.yaml", {name: value}))


@pytest.mark.parametrize("name", [name for name in numeric("str") if name not in ("initial_batch_size", "wall_time")])
def test_texts(name: str, tmp_path: Path) -> None:
    assert "must be" in refusal(flag(name), "")
    assert "must be" in refusal(flag(name), " ")
    for value in ({"a": "b"}, ["a"], 5, True, "a\0b"):
        assert "it must be text" in refusal("--config", write(tmp_path / "c.yaml", {name: value}))


def test_wall_times(tmp_path: Path) -> None:
    """Also as YAML 1.1 reads them: 4:00:00 is a number to the base 60."""
    for text, seconds in {"00:00:30": 30, "4:00:00": 14400, "04:00:00": 14400, "2-01:00:05": 176405}.items():
        for parsed in (
            parse_training(["--wall-time", text]),
            parse_training(["--config", write(tmp_path / "c.yaml", {"wall_time": text})]),
        ):
            assert wall_time_seconds(parsed["wall_time"]) == seconds
    for text, written in {"30m": "00:30:00", "2h": "02:00:00", "90s": "00:01:30", "36h": "1-12:00:00"}.items():
        assert parse_training(["--wall-time", text]) == {"wall_time": written}
        assert parse_training(["--config", write(tmp_path / "c.yaml", {"wall_time": text})]) == {"wall_time": written}
    (tmp_path / "d.yaml").write_text("wall_time: 4:00:00\n")
    assert wall_time_seconds(parse_training(["--config", str(tmp_path / "d.yaml")])["wall_time"]) == 14400
    for text in ("", "90", "0m", "5w", "10:00", "00:00:00", "1:60:00", "-01:00:00", "1-2", "x"):
        assert "it must be a time above zero as [DAYS-]HH:MM:SS" in refusal(f"--wall-time={text}")
    for value in ({"a": "b"}, ["a"], True, 1.5, -5):
        assert "[DAYS-]HH:MM:SS" in refusal("--config", write(tmp_path / "c.yaml", {"wall_time": value}))


def test_a_setting_that_needs_a_value_is_not_null(tmp_path: Path) -> None:
    for name, spec in SPECS.items():
        path = write(tmp_path / "c.yaml", {name: None})
        if "None" in str(spec.type):
            assert parse_training(["--config", path]) == {name: None}
        else:
            assert "is None; it must be" in refusal("--config", path)


# ---------------------------------------------------------------------------------------------------------- whole files

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("block: [1,\n", "not YAML"),
        ("seed:\n\t- 1", "not YAML"),
        ("seed: 2024-13-41", "not YAML"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("seed: !!python/object/apply:os.system [false]", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("? [1]\n: 2", "not YAML"),
        ("seed: 1\nseed: 2", "the key 'seed' is there twice"),
        ("- a\n- b", "holds no mapping"),
        ("hello", "holds no mapping"),
        ("", "holds no mapping"),
        ("seed: 2024-01-01", "seed is datetime.date(2024, 1, 1); it must be a whole number"),
        (f"seed: [{'x, ' * 20000}]", "it must be a whole number"),
        (BOMB, "unknown key 'a0'"),
        (f"model_config:\n  {BOMB.replace(chr(10), chr(10) + '  ')}", "model_config is {"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_are_none(content: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", content)
    line = refusal("--config", path)
    assert line.startswith(f"--config {path}")
    assert says in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal("--config", str(tmp_path / "none.yaml"))
    assert "cannot be read (Is a directory)" in refusal("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not YAML" in refusal("--config", str(tmp_path / "binary.yaml"))


def test_unknown_names_come_with_the_nearest_known_one(tmp_path: Path) -> None:
    def in_file(key: object) -> str:
        return refusal("--config", write(tmp_path / "c.yaml", {key: 1}))  # type: ignore[dict-item]

    assert "unknown key 'blok_size'; the nearest known one is block_size" in in_file("blok_size")
    assert "unknown key 'total-steps'; the nearest known one is total_steps" in in_file("total-steps")
    for name, meant in (("lr", "learning_rate"), ("train.max_seq_length", "block_size"), ("dtype", "precision")):
        assert f"unknown key {name!r}; here it is {meant}" in in_file(name)
    assert "unknown key None" in in_file(None)
    assert "unknown key 3" in in_file(3)
    assert refusal("--blok-size", "3") == "unknown flag --blok-size; the nearest known one is --block-size"
    assert refusal("--blok-size=3") == "unknown flag --blok-size; the nearest known one is --block-size"
    assert "takes no value, and was given 'yes'" in refusal("--sequence-parallel=yes")
    assert "nearest known one is --checkpoint-path" in refusal("--checkpoint-pth", "x", parse=parse_resume)
    for name in ("tinny", "../presets/argonne-2b"):
        assert f"--preset {name!r} does not exist; there are aixsim-1.1b, " in refusal("--preset", name)
    assert "'foo' belongs to no flag" in refusal("--seed", "1", "foo")
    assert "'false' belongs to no flag; write --shuffle for true, --no-shuffle" in refusal("--shuffle", "false")
    assert "'b.jsonl' belongs to no flag; quote the pattern" in refusal("--data-glob", "a.jsonl", "b.jsonl")
    assert "--seed" in refusal("--seed")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("--lr", "here it is --learning-rate"),
        ("--tp", "here it is --tensor-parallel-size"),
        ("--tensor-model-parallel-size", "here it is --tensor-parallel-size"),
        ("--seq-len", "here it is --block-size"),
        ("--seq_length", "here it is --block-size"),
        ("--dtype", "here it is --precision"),
        ("--num-layers", "the model's sizes are in the file of --model-config, or of a --preset"),
        ("--micro-batch-size", "here it is --initial-batch-size"),
        ("--global-batch-size", "here it is --tokens-per-step (in tokens, not sequences)"),
        ("--training.steps", "here it is --total-steps"),
        ("--resume", "the same command goes on with the run in its --checkpoint-dir"),
        ("--quux", "--help lists the flags"),
        ("--x", "--help lists the flags"),
    ],
)
def test_the_names_of_other_trainers_are_known(name: str, told: str) -> None:
    assert refusal(name, "1") == f"unknown flag {name}; {told}"


def test_names_of_other_trainers_lead_to_flags_that_there_are() -> None:
    """A name that is a flag here needs no meaning; and what is named as its meaning can be given."""
    flags = {flag(name) for name in SPECS}
    assert not flags & {f"--{name}" for name in _OTHER_NAMES}
    for name in _OTHER_NAMES:
        told = refusal(f"--{name}", "1").partition("; ")[2]
        assert "--help" not in told
        assert "nearest known" not in told
        assert set(re.findall(r"--[a-z0-9-]+", told)) <= flags
    # A command that lacks the flag does not name it.
    with pytest.raises(UsageError, match="unknown flag --lr; --help lists the flags"):
        parse_evaluation(["--lr", "1"])


def test_a_preset_of_ones_own_is_a_path(tmp_path: Path) -> None:
    sizes, recommended = load_preset("tiny")
    path = write(
        tmp_path / "own.yaml", {"model": {**sizes, "num_hidden_layers": 3}, "training": {"learning_rate": 0.5}}
    )
    assert load_preset(path) == ({**sizes, "num_hidden_layers": 3}, {"learning_rate": 0.5})
    assert complete_settings(parse_training(["--preset", path])).learning_rate == 0.5 != recommended["learning_rate"]
    assert load_preset(str(ROOT / "presets" / "tiny.yaml")) == (sizes, recommended)
    assert f"--preset {tmp_path}/none.yaml: cannot be read" in refusal("--preset", f"{tmp_path}/none.yaml")
    assert "of a .yaml file of your own" in refusal("--preset", str(tmp_path / "own"))
    bad = write(tmp_path / "bad.yaml", {"model": sizes, "training": {"lr": 1}})
    assert f"--preset {bad}: unknown key 'lr'; here it is learning_rate" in refusal("--preset", bad)


def test_sections_in_a_file_are_refused_by_name(tmp_path: Path) -> None:
    line = refusal("--config", write(tmp_path / "c.yaml", {"training": {"seed": 1}}))
    assert "unknown key 'training'; settings are flat" in line


@pytest.mark.parametrize("parse", [parse_training, parse_resume])
def test_a_prefix_is_no_flag(parse: Any) -> None:
    names = [flag(name) for name in SPECS] + ["--config"]
    if parse is parse_resume:
        names = [name for name in names if name != "--seed"]
        names += ["--checkpoint-path", "--rewarmup-steps", "--keep-optimizer", "--batch-size"]
    tried = 0
    for name in names:
        for end in {4, len(name) // 2, len(name) - 1}:
            if name[:end] not in [*names, "--help"]:
                assert f"unknown flag {name[:end]};" in refusal(name[:end], "1", parse=parse)
                tried += 1
    assert tried > 150


# ---------------------------------------------------------------------------------------------------------- precedence


def test_flags_over_file_over_preset_over_defaults(tmp_path: Path) -> None:
    recommended = load_preset("tiny")[1]
    path = write(tmp_path / "c.yaml", {"preset": "tiny", "total_steps": 11, "warmup_steps": 5})
    chosen = complete_settings(parse_training(["--config", path, "--warmup-steps", "7"]))
    assert chosen.learning_rate == recommended["learning_rate"] != RunSettings().learning_rate
    assert chosen.total_steps == 11 != recommended["total_steps"]
    assert chosen.warmup_steps == 7
    assert chosen.weight_decay == RunSettings().weight_decay
    # A flag that repeats the built-in default is given all the same.
    assert complete_settings(parse_training(["--preset", "tiny", "--total-steps", "1000"])).total_steps == 1000


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"compile": True}, {"disable_compile": True}, {"disable_compile": True}),
        ({"disable_compile": True, "seed": 1}, {"compile": True}, {"compile": True, "seed": 1}),
        ({"preset": "tiny"}, {"model_config": "m.json"}, {"model_config": "m.json"}),
        ({"preset": "tiny"}, {"init_from": "folder"}, {"init_from": "folder"}),
        ({"model_config": "m.json"}, {"preset": "tiny"}, {"preset": "tiny"}),
        ({"tokens_per_step": 64}, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 2}),
        ({"gradient_accumulation_steps": 2}, {"tokens_per_step": 64}, {"tokens_per_step": 64}),
        ({"compile": True}, {"disable_compile": False}, {"compile": True, "disable_compile": False}),
    ],
)
def test_one_of_two_alternatives_replaces_the_other_below(
    below: dict[str, Any], above: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    assert override(below, above) == expected
    flags = [part for name, value in above.items() if value for part in (flag(name), str(value))]
    flags = [part for part in flags if part != "True"]
    if len(flags):
        assert parse_training(["--config", write(tmp_path / "c.yaml", below), *flags]) == expected


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--preset", "tiny", "--model-config", "m.json"), ("--preset tiny", "--model-config m.json")),
        (("--compile", "--disable-compile"), ("--compile", "--disable-compile")),
        (
            ("--tokens-per-step", "64", "--gradient-accumulation-steps", "2"),
            ("--tokens-per-step 64", "--gradient-accumulation-steps 2"),
        ),
        (("--learning-rate", "1e-4", "--min-learning-rate", "1e-3"), ("--min-learning-rate 0.001", "0.0001")),
    ],
)
def test_contradictions_at_one_level(flags: tuple[str, ...], names: tuple[str, ...]) -> None:
    line = refusal(*flags)
    assert all(name in line for name in names)


# --------------------------------------------------------------------------------------------------------- resume flags


def test_resume_flags(tmp_path: Path) -> None:
    resume, settings_given = parse_resume(["--checkpoint-path", "run"])
    assert (resume.checkpoint_path, resume.rewarmup_steps, resume.keep_optimizer) == ("run", 100, False)
    assert settings_given == {}
    resume, settings_given = parse_resume(
        ["--checkpoint-path", "run", "--rewarmup-steps", "0", "--batch-size", "8", "--total-steps", "9"]
    )
    assert resume.rewarmup_steps == 0
    assert settings_given == {"initial_batch_size": "8", "total_steps": 9}
    resume, _ = parse_resume(["--checkpoint-path", "run", "--keep-optimizer", "--rewarmup-steps", "0"])
    assert (resume.keep_optimizer, resume.rewarmup_steps) == (True, 0)
    path = write(tmp_path / "c.yaml", {"tokens_per_step": 64})
    assert parse_resume(["--checkpoint-path", "run", "--config", path])[1] == {"tokens_per_step": 64}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--checkpoint-path is missing"),
        (("--checkpoint-path", ""), "--checkpoint-path is ''"),
        (("--checkpoint-path", "x", "--rewarmup-steps", "-1"), "--rewarmup-steps is -1; it must be at least 0"),
        (("--checkpoint-path", "x", "--rewarmup-steps", "9" * 5000), "it must be a whole number"),
        (("--checkpoint-path", "x", "--rewarmup-steps", "5", "--keep-optimizer"), "leave out --rewarmup-steps 5"),
        (("--checkpoint-path", "x", "--batch-size", "0"), "--batch-size is '0'"),
        (("--checkpoint-path", "x", "--batch-size", "2", "--initial-batch-size", "2"), "give one of them"),
        (("--checkpoint-path", "x", "--seed", "2"), "unknown flag --seed"),
    ],
)
def test_resume_flags_refused(flags: tuple[str, ...], says: str) -> None:
    assert says in refusal(*flags, parse=parse_resume)


# -------------------------------------------------------------------------------------------------------- presets, help


def test_presets_are_whole() -> None:
    assert {"argonne-2b", "tiny"} < set(preset_names())
    known = {field.name for field in dataclasses.fields(model.ModelConfig)}
    for name in preset_names():
        sizes, recommended = load_preset(name)
        assert sizes.keys() <= known
        assert model.ModelConfig.from_dict(sizes, vocab_size=1000).max_position_embeddings >= recommended["block_size"]
        assert complete_settings({"preset": name}).preset == name


def test_a_preset_with_other_sections_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colonnade.config.PRESET_FOLDER", tmp_path)
    for content in ("model: 5", "training: {}", "model: {}\ntraning: {}", "model: {}\ntraining: []"):
        write(tmp_path / "mine.yaml", content)
        assert "must hold a mapping 'model'" in refusal("--preset", "mine")
    write(tmp_path / "mine.yaml", "model: {}\ntraining: {seed: x}")
    assert f"--preset {tmp_path}/mine.yaml: seed is 'x'" in refusal("--preset", "mine")


@pytest.mark.parametrize("script", ["training.py", "resume_pretrain_tensor.py"])
def test_help_is_grouped_and_tells_how_to_switch_off(script: str) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for group in ("model", "data", "batch", "optimization", "execution", "checkpoints and logs"):
        assert f"\n{group}:\n" in done.stdout
    described = done.stdout.partition("\noptions:")[2]
    entries = {words[0].rstrip(","): " ".join(words) for words in map(str.split, described.split("\n  --")[1:])}
    for name, spec in SPECS.items():
        if script == "resume_pretrain_tensor.py" and name == "seed":
            continue
        entry = entries[flag(name)[2:]]
        assert len(entry.split()) > 3
        # Zero switches these off, or means all; it is an ordinary value of the others.
        if spec.metadata.get("minimum") == 0 and name not in ("seed", "min_learning_rate", "adam_beta1", "adam_beta2"):
            assert "; 0 for " in entry


def test_help_and_errors_come_without_heavy_imports() -> None:
    program = (
        "import sys; from colonnade.errors import UsageError; import training, resume_pretrain_tensor\n"
        "for main in (training.main, resume_pretrain_tensor.main):\n"
        "    try: main(['--seeed'])\n"
        "    except UsageError: pass\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_printed_by_the_first_rank_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as leaving:
            parse_training(["--help"])
        assert leaving.value.code == 0
        assert bool(capsys.readouterr().out) is printed


# ------------------------------------------------------------------------------------------------------- given back

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
RATE = st.floats(1e-30, 10.0)


@settings(deadline=None, max_examples=60)
@given(
    data_glob=TEXT
    | st.sampled_from(["no", "null", "~", "1e-3", "5", "true", "2024-01-01", "{a}", "- x", "a: b", "\n x\n"]),
    checkpoint_dir=TEXT,
    learning_rate=RATE,
    weight_decay=st.floats(0.0, 1e300),
    seed=st.integers(0, 2**63 - 1),
    strict_data=st.booleans(),
    block_size=st.none() | st.integers(1, 10**6),
)
def test_saved_settings_are_given_back(**values: Any) -> None:
    chosen = RunSettings(**values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        write_settings(chosen, path)
        assert [entry.name for entry in Path(folder).iterdir()] == ["run.yaml"]
        assert complete_settings(parse_training(["--config", str(path)])) == chosen


def test_names_that_are_not_utf_8_are_given_back(tmp_path: Path) -> None:
    chosen = RunSettings(checkpoint_dir=os.fsdecode(b"run-\xff\xfe"))
    write_settings(chosen, tmp_path / "run.yaml")
    assert complete_settings(parse_training(["--config", str(tmp_path / "run.yaml")])) == chosen


def test_every_setting_of_a_preset_run_is_given_back(tmp_path: Path) -> None:
    for name in preset_names():
        chosen = complete_settings({"preset": name, "total_steps": 9, "learning_rate": 0.1 + 0.2})
        write_settings(chosen, tmp_path / "run.yaml")
        assert complete_settings(parse_training(["--config", str(tmp_path / "run.yaml")])) == chosen


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(IsADirectoryError):
        write_settings(RunSettings(), tmp_path / "run.yaml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


def test_identity_holds_what_shapes_the_loss_curve() -> None:
    quiet = {name for name in SPECS if name not in RunSettings().identity()}
    spikes = {"spike_sigma", "spike_window", "spike_action"}
    assert quiet == {
        *spikes,
        *("max_skipped_steps", "drift_check_interval"),
        *("decay_steps", "decay_shape", "muon_momentum"),  # where they say something, they are
        *("preset", "model_config", "data_glob", "tokenizer_path", "strict_data", "data_lanes"),
        *("tokenizer_backend", "trust_remote_code"),
        *("validation_glob", "validation_interval", "validation_chunks"),
        *("initial_batch_size", "gradient_accumulation_steps", "tokens_per_step", "memory_limit_gib"),
        *("tensor_parallel_size", "replicate_embeddings", "disable_gradient_checkpointing"),
        *("activation_checkpointing", "sequence_parallel", "overlap_collectives", "cuda_graphs", "plain_step"),
        *("data_parallel_shard", "data_parallel_replicate_size"),
        *("compile", "disable_compile", "checkpoint_dir", "checkpoint_interval", "keep_checkpoints", "log_interval"),
        *("fingerprint_interval", "keep_every", "checkpoint_mode", "checkpoint_hash"),
        *("progress_bar", "jsonl", "csv", "tensorboard", "wandb_project", "wandb_entity", "wandb_run_name"),
        *("wandb_checkpoints", "drop_uploaded_checkpoints", "profile_start", "profile_steps"),
        *("wall_time", "startup_timeout", "step_timeout"),
        *("sample_interval", "sample_prompts", "sample_tokens", "sample_temperature"),
    }
    skipping = RunSettings(spike_sigma=4.0, spike_action="skip").identity()
    assert skipping.keys() - RunSettings().identity().keys() == spikes
    # A line changes nothing, and neither does an action without a limit.
    for other in (RunSettings(spike_sigma=4.0, spike_window=50), RunSettings(spike_action="skip")):
        assert other.identity() == RunSettings().identity()
    assert not set(string.ascii_uppercase) & set("".join(SPECS))
