"""Samples that a run takes of its own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colonnade.data.prompts import prompts_in
from distributed.launching import losses, make_inputs
from forked_commands import start
from run.samples import samples_are_due

PROMPTS = ["def ", "import os"]


def test_a_line_of_a_file_of_prompts_ends_at_a_line_end_alone(tmp_path: Path) -> None:
    """U+2028 and U+0085 stand in JSON as they are; a byte order mark is no part of a prompt."""
    prompts = ["one\u2028line", "two\u0085lines\n", "three"]
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
        (tmp_path / "p.jsonl").write_bytes((mark + end.join([*rows[:2], "", *rows[2:]]) + end).encode())
        assert prompts_in(tmp_path / "p.jsonl", "--sample-prompts") == prompts
        (tmp_path / "p.txt").write_bytes((mark + end.join(["one\u2028line", " ", "three"])).encode())
        assert prompts_in(tmp_path / "p.txt", "--sample-prompts") == ["one\u2028line", "three"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return [
        *(*make_inputs(folder), "--initial-batch-size", "4", "--checkpoint-interval", "0", "--total-steps", "7"),
        *("--sample-prompts", str(folder / "prompts.txt"), "--sample-tokens", "10", "--sample-temperature", "0"),
    ]


def sampled(directory: Path) -> dict[int, list[dict[str, Any]]]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["samples"] for row in rows if "samples" in row}


def test_gaps_between_samples_grow() -> None:
    assert [step for step in range(100) if samples_are_due(step, 3)] == [3, 6, 12, 24, 48, 96]
    assert not any(samples_are_due(step, 0) for step in range(10))


def test_a_run_samples_itself_and_is_the_same_run(inputs: list[str], tmp_path: Path) -> None:
    plain, one, two = tmp_path / "plain", tmp_path / "one", tmp_path / "two"
    (outcome,) = start("training", [*inputs, "--checkpoint-dir", str(plain)])
    assert outcome.code == 0, outcome
    assert sampled(plain) == {}
    assert "--sample-tokens 10 does nothing without --sample-interval" in outcome.output
    for ranks, directory in ((1, one), (2, two)):
        flags = [*inputs, "--sample-interval", "2", "--checkpoint-dir", str(directory)]
        outcomes = start("training", flags, ranks=ranks)
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
    assert losses(one) == losses(plain)
    assert list(sampled(one)) == [2, 4, 7]
    assert sampled(two) == sampled(one)
    for row, prompt in zip(sampled(one)[7], PROMPTS, strict=True):
        flags = ["--checkpoint-path", str(one), "--prompt", prompt, "--max-new-tokens", "10", "--temperature", "0"]
        (outcome,) = start("generate", flags)
        assert outcome.output == f"{prompt}{row['text']}\n"
        assert row["prompt"] == prompt


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample-prompts", "{}/none"], "--sample-prompts {}/none cannot be read"),
        (["--sample-prompts", "{}/empty"], "holds no prompts"),
        (["--sample-prompts", "{}/many"], "holds 17 prompts; give at most 16"),
        (["--sample-tokens", "64"], "the model's context of 64; give at most"),
        (["--sample-temperature", "-1"], "--sample-temperature is -1.0; it must be at least 0"),
    ],
)
def test_wrong_input_is_one_line(inputs: list[str], tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "many").write_text("x\n" * 17)
    placed = [flag.replace("{}", str(tmp_path)) for flag in flags]
    run = ["--checkpoint-dir", str(tmp_path / "run"), "--sample-interval", "2"]
    (outcome,) = start("training", [*inputs, *run, *placed])
    assert outcome.code == 2, outcome
    assert message.replace("{}", str(tmp_path)) in outcome.errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_an_interval_without_prompts_is_refused(inputs: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in inputs if not flag.endswith("prompts.txt") and flag != "--sample-prompts"]
    (outcome,) = start("training", [*flags, "--sample-interval", "2", "--checkpoint-dir", str(tmp_path / "run")])
    assert outcome.code == 2
    assert "--sample-interval 2 needs prompts: give --sample-prompts FILE" in outcome.errors
