"""A deterministic run: killed and gone on with elsewhere it has the same bits, and an audit finds what has not."""

import json
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed.launching import ROOT, finish, make_inputs, run, start

STEPS = 12
# Trains with one bit of one parameter flipped in memory after the update of step 6, on the rank that holds it.
FLIP = """
import sys
sys.path[:0] = [{root!r}]
import torch, training, training_utils
from colonnade.parallel.launch import launch

train_step = training_utils.train_step

def flipping(run, batch, learning_rate):
    outcome = train_step(run, batch, learning_rate)
    if run.step == 5 and run.layout.tp_rank == 1:
        weight = run.model.model.layers[1].mlp.up_proj.weight.to_local().detach()
        weight.view(torch.int32)[3, 7] ^= 1
    return outcome

training_utils.train_step = flipping
launch(training.main)
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--total-steps", str(STEPS), "--checkpoint-interval", "4", "--deterministic", "--fingerprint-interval", "3"),
        *("--initial-batch-size", "2", "--gradient-accumulation-steps", "4"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    run("training.py", [*flags, "--checkpoint-dir", str(directory)])
    return directory


def rows_of(path: Path) -> dict[int, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row for row in map(json.loads, (line for line in lines if line.endswith("}")))}


def bits_of(directory: Path) -> dict[int, tuple[str, str, str | None]]:
    rows = rows_of(directory / "metrics.jsonl")
    return {step: (row["loss_bits"], row["grad_norm_bits"], row.get("fingerprint")) for step, row in rows.items()}


def test_killed_and_gone_on_elsewhere_it_has_the_same_bits(
    flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """From tp 2, killed with SIGKILL between two checkpoints, to dp 2 with activations kept."""
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    process = start("training.py", these, ranks=2)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if max(rows_of(directory / "metrics.jsonl"), default=0) >= 5:
            break
        time.sleep(0.005)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.communicate()
    assert 5 <= max(bits_of(directory)) < STEPS
    output = run("training.py", [*these, "--tensor-parallel-size", "1", "--disable-gradient-checkpointing"], ranks=2)
    assert "going on from" in output
    assert "micro-batch 2 x accumulation 2 x dp 2" in output
    expected = bits_of(uninterrupted)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert [step for step, bits in expected.items() if bits[2]] == [3, 6, 9, 12]
    assert bits_of(directory) == expected
    left, right = (rows_of(folder / "fingerprints.jsonl") for folder in (uninterrupted, directory))
    assert left == right


def test_an_audit_on_other_ranks_finds_an_honest_run_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    output = run("audit_run.py", ["--checkpoint-dir", str(directory), "--from-step", "5", "--to-step", "10"], ranks=2)
    assert "steps 5 to 10 are the same to the bit: 6 losses and gradient norms, 2 fingerprints" in output
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before, "an audit writes nothing"


def test_an_audit_finds_the_step_and_the_tensor_of_a_flipped_bit(flags: list[str], tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(FLIP.format(root=str(ROOT))))
    directory = tmp_path / "run"
    these = [*flags, "--total-steps", "8", "--checkpoint-dir", str(directory)]
    finish(start(str(driver), these, ranks=2))
    output = run("audit_run.py", ["--run", str(directory)], code=1)
    assert "error: step 6 differs: fingerprint was" in output
    assert output.endswith("the first tensor that differs after step 6: model.layers.1.mlp.up_proj.weight\n")
    assert "steps 1 to 5 are the same" in run("audit_run.py", ["--run", str(directory), "--to-step", "5"])


def test_a_run_cannot_be_audited_across_a_change(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    run("resume_pretrain_tensor.py", ["--checkpoint-path", str(directory), "--total-steps", str(STEPS + 1)])
    output = run("audit_run.py", ["--run", str(directory), "--from-step", "9"], code=2)
    assert f"changed with resume_pretrain_tensor.py at step {STEPS}" in output
    run("audit_run.py", ["--run", str(directory), "--from-step", "9", "--to-step", str(STEPS)])


@pytest.mark.parametrize(
    ("change", "ranks", "says"),
    [
        (["--initial-batch-size", "4"], 1, "micro_batch_size 2 -> 4"),
        (["--tensor-slices", "2"], 1, "tensor_slices 4 -> 2"),
        (["--replicate-embeddings"], 1, "whole tables are summed in another order"),
    ],
)
def test_what_would_change_the_bits_is_refused(
    flags: list[str], uninterrupted: Path, tmp_path: Path, change: list[str], ranks: int, says: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    output = run("training.py", [*flags, "--checkpoint-dir", str(directory), *change], ranks=ranks, code=2)
    assert says in output
    assert "Traceback" not in output
