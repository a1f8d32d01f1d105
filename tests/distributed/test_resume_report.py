"""What a start says of the checkpoint it goes on from: what has changed, and whether the loss goes on where it was."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import colonnade
import forked_commands
from colonnade.telemetry.code_version import code_version
from distributed.launching import losses, make_inputs

CHANGED = "changed since the checkpoint: "


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--total-steps", "24", "--checkpoint-interval", "16", "--initial-batch-size", "4"),
    ]


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    command("training", [*flags, "--checkpoint-dir", str(directory)])
    return directory


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The run as it was at step 16."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "streaming_checkpoint_step_24")
    return tmp_path / "run"


def command(script: str, flags: list[str], ranks: int = 1) -> str:
    first, *_ = outcomes = forked_commands.start(script, flags, ranks=ranks)
    assert {outcome.code for outcome in outcomes} == {0}, outcomes
    return first.output


def report(output: str) -> list[str]:
    """The changes that a start tells of."""
    (line,) = (line for line in output.splitlines() if line.startswith(CHANGED))
    return line.removeprefix(CHANGED).split("; ")


def told(output: str) -> list[str]:
    """Lines on whether the loss goes on."""
    return [line for line in output.splitlines() if "loss continues" in line or "loss does not continue" in line]


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "streaming_checkpoint_step_16" / "MANIFEST.json"
    content = json.loads(file.read_text())
    change(content)
    content.pop("sha256", None)
    file.write_text(json.dumps(content))


def test_nothing_changed_and_the_loss_continues(flags: list[str], finished: Path, stopped: Path) -> None:
    output = command("training", [*flags, "--checkpoint-dir", str(stopped)])
    assert report(output) == ["nothing"]
    before = np.array([losses(finished)[step] for step in range(1, 17)])
    after = np.array([losses(finished)[step] for step in range(17, 22)])
    fit = np.polynomial.Polynomial.fit(np.arange(16), before, 1)
    spread = np.sqrt(np.square(before - fit(np.arange(16))).sum() / 14)
    expected = f"loss continues at {after.mean():.4f} (recent mean {before[-5:].mean():.4f}, spread {spread:.4f})"
    assert told(output) == [expected]
    lines = output.splitlines()
    assert lines.index(expected) == next(i for i, line in enumerate(lines) if line.startswith("step 21/24")) - 1


def test_everything_that_changed_is_told(flags: list[str], stopped: Path, tmp_path: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        content["libraries"] |= {"torch": "2.0.1", "numpy": "1.0"}
        content["run"]["code"] = {"version": "0.0.9", "commit": "abc"}
        content["run"]["tokenizer_backend"] = "another 1.0"

    edit(stopped, older)
    now = code_version()
    changed = [*flags, "--log-interval", "2", "--initial-batch-size", "2", "--tokens-per-step", "256"]
    output = command("training", [*changed, "--checkpoint-dir", str(stopped), "--tensor-parallel-size", "1"], ranks=2)
    changes = report(output)
    for expected in (
        "log_interval 1 -> 2",
        "initial_batch_size 4 -> 2",
        "tokens_per_step None -> 256",
        "ranks 1 -> 2",
        "dp 1 -> 2",
        "micro-batch 4 -> 2",
        f"code 0.0.9 (abc) -> {colonnade.__version__} ({now['commit'] or 'no commit known'})",
    ):
        assert expected in changes
    assert [
        change.partition(" -> ")[0] for change in changes if change.split()[0] in ("torch", "numpy", "tokenizer")
    ] == [
        "tokenizer backend another 1.0",
        "numpy 1.0",
        "torch 2.0.1",
    ]
    assert not [change for change in changes if change.split()[0] in ("tp", "sequences", "precision", "checkpoint_dir")]


def test_a_resumed_run_tells_its_data_and_what_it_does(flags: list[str], stopped: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(Path(flags[1]).parent, corpus)
    next(iter(sorted(corpus.iterdir()))).unlink()
    given = ["--checkpoint-path", str(stopped), "--data-glob", str(corpus / "*.parquet"), "--allow-data-change"]
    changes = report(command("resume_pretrain_tensor", [*given, "--learning-rate", "5e-4", "--rewarmup-steps", "3"]))
    assert "learning_rate 0.001 -> 0.0005" in changes
    assert [change for change in changes if change.startswith("data ") and " files with " in change]
    assert "optimizer state reset; learning rate warmed up again over 3 steps" in "; ".join(changes)


def test_a_switch_that_is_part_of_the_arithmetic_is_told_once(flags: list[str], stopped: Path) -> None:
    given = ["--checkpoint-path", str(stopped), "--total-steps", "19", "--rewarmup-steps", "5"]
    output = command("resume_pretrain_tensor", [*given, "--deterministic", "--sequence-parallel"])
    changes = [change for change in report(output) if change.startswith("sequence_parallel")]
    assert changes == ["sequence_parallel False -> True"]
    assert "--rewarmup-steps 5 are more than the 3 that are left" in output
    output = command("resume_pretrain_tensor", [*given[:-3], "20", "--keep-optimizer", "--no-sequence-parallel"])
    assert report(output).count("sequence_parallel True -> False") == 1


@pytest.mark.parametrize(
    ("window", "begins"),
    [([9.5, 9.51, 9.49, 9.5] * 4, "warning: loss does not continue where it was: "), ([5.0] * 9, None), (None, None)],
    ids=["elsewhere", "too short", "of an earlier version"],
)
def test_a_loss_that_is_elsewhere_is_a_warning(
    flags: list[str], stopped: Path, window: list[float] | None, begins: str | None
) -> None:
    def change(content: dict[str, Any]) -> None:
        if window is None:
            for key in ("loss_window", "skipped_steps", "skipped_in_row", "code"):
                del content["run"][key]
        else:
            content["run"]["loss_window"] = window

    edit(stopped, change)
    output = command("training", [*flags, "--checkpoint-dir", str(stopped)])
    assert [line[: len(begins or "")] for line in told(output)] == ([] if begins is None else [begins])
    assert report(output) == ["nothing"]


def test_the_commit_is_gits(tmp_path: Path) -> None:
    assert code_version(tmp_path) == {"version": colonnade.__version__, "commit": None}
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git(*identity, "commit", "--quiet", "-m", "one")
    git(*identity, "tag", "-a", "-m", "one", "v1")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version(tmp_path)["commit"] == commit
    (tmp_path / "file").write_text("2")
    assert code_version(tmp_path)["commit"] == f"{commit}-dirty"
    # An installed package inside a checkout of something else does not belong to it.
    (tmp_path / "inside").mkdir()
    assert code_version(tmp_path / "inside")["commit"] is None
