"""A deterministic run: killed and gone on with elsewhere it has the same bits, and an audit finds what has not."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import forked_commands
from distributed.launching import kill_after, make_inputs, run
from forked_commands import Outcome

STEPS = 12


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
    rows = map(json.loads, (line for line in lines if line.endswith("}")))
    return {row["step"]: row for row in rows if "started" not in row}


def bits_of(directory: Path) -> dict[int, tuple[str, str, str | None]]:
    rows = rows_of(directory / "metrics.jsonl")
    return {step: (row["loss_bits"], row["grad_norm_bits"], row.get("fingerprint")) for step, row in rows.items()}


def command(script: str, flags: list[str], code: int = 0) -> str:
    (outcome,) = forked_commands.start(script, flags)
    assert outcome.code == code, outcome
    return outcome.output + outcome.errors


def audit(directory: Path, *flags: str, code: int = 0) -> str:
    return command("audit_run", ["--run", str(directory), *flags], code)


def flipped(flags: list[str], directory: Path, tensor: str, *, rank: int, step: int, ranks: int = 2) -> list[Outcome]:
    """A run of 8 steps with a bit of `tensor` flipped on one rank after the update of `step`."""
    return forked_commands.start(
        "distributed.flipped_training",
        [*flags, "--total-steps", "8", "--checkpoint-dir", str(directory)],
        ranks=ranks,
        environment={"FLIP_TENSOR": tensor, "FLIP_RANK": str(rank), "FLIP_STEP": str(step)},
    )


def tamper(checkpoint: Path, key: str) -> None:
    """Flip one bit of a stored tensor; the file stays one that torch reads, of the same size, and loses its hash.

    What is left to notice it are the fingerprints.
    """
    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    place = next(place for index, place in stored.items() if index.fqn == key)
    content = bytearray((checkpoint / place.relative_path).read_bytes())
    part = slice(place.offset, place.offset + place.length)
    tensor = torch.load(BytesIO(content[part]), weights_only=True)
    tensor.view(torch.int32).view(-1)[5] ^= 1
    torch.save(tensor, again := BytesIO())
    assert len(again.getvalue()) == place.length
    content[part] = again.getvalue()
    (checkpoint / place.relative_path).write_bytes(content)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    for facts in manifest["files"].values():
        del facts["sha256"]
    manifest.pop("sha256", None)
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def forget_fingerprints(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest.pop("sha256", None)
    del manifest["run"]["fingerprint"], manifest["run"]["moments_fingerprint"]
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def test_killed_and_gone_on_elsewhere_it_has_the_same_bits(
    flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """From tp 2, killed with SIGKILL between two checkpoints, to dp 2 with activations kept."""
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    kill_after(5, flags, directory)
    assert 5 <= max(bits_of(directory)) < STEPS
    output = run("training.py", [*these, "--tensor-parallel-size", "1", "--disable-gradient-checkpointing"], ranks=2)
    assert "going on from" in output
    assert "micro-batch 2 x accumulation 2 x dp 2" in output
    expected = bits_of(uninterrupted)
    assert sorted(expected) == list(range(1, STEPS + 1))
    # Every third step, and each checkpoint.
    assert [step for step, bits in expected.items() if bits[2]] == [3, 4, 6, 8, 9, 12]
    assert bits_of(directory) == expected
    left, right = (rows_of(folder / "fingerprints.jsonl") for folder in (uninterrupted, directory))
    assert left == right


def test_an_audit_on_other_ranks_finds_an_honest_run_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    output = run("audit_run.py", ["--checkpoint-dir", str(directory), "--from-step", "5", "--to-step", "10"], ranks=2)
    assert "steps 5 to 10 are the same to the bit: 6 losses and gradient norms, 3 fingerprints" in output
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before, "an audit writes nothing"


def test_an_audit_finds_the_step_and_the_tensor_of_a_flipped_bit(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    outcomes = flipped(flags, directory, "model.layers.1.mlp.up_proj.weight", rank=1, step=6)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    output = audit(directory, code=1)
    assert "error: step 6 differs: fingerprint was" in output
    assert output.endswith("the first tensor that differs after step 6: model.layers.1.mlp.up_proj.weight\n")
    assert "steps 1 to 5 are the same" in audit(directory, "--to-step", "5")


def test_an_audit_names_a_flipped_moment(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    name = "model.layers.0.mlp.down_proj.weight.exp_avg_sq"
    outcomes = flipped(flags, directory, name, rank=0, step=6, ranks=1)
    assert outcomes[0].code == 0, outcomes
    output = audit(directory, code=1)
    assert "error: step 6 differs: moments_fingerprint was" in output
    assert output.endswith(f"the first tensor that differs after step 6: {name}\n")


def test_a_run_whose_copies_drift_apart_stops(flags: list[str], tmp_path: Path) -> None:
    """Flipped after step 5, of which there is no fingerprint; noticed after step 6, and no checkpoint follows."""
    directory, tensor = tmp_path / "run", "model.layers.1.mlp.up_proj.weight"
    outcomes = flipped([*flags, "--tensor-parallel-size", "1"], directory, tensor, rank=1, step=5)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    (line,) = (line for line in outcomes[0].errors.splitlines() if "error" in line)
    assert f"error: ranks hold different copies of {tensor} after step 6: ranks 0 and 1 differ, and no majority" in line
    assert outcomes[1].errors == ""
    assert sorted(path.name for path in directory.glob("streaming*")) == ["streaming_checkpoint_step_4"]
    assert max(bits_of(directory)) == 5


@pytest.mark.parametrize(
    ("key", "what", "column"),
    [
        ("model.model.layers.1.mlp.gate_proj.weight", "parameters", "fingerprint"),
        ("optimizer.exp_avg.model.norm.weight", "optimizer's moments", "moments_fingerprint"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_saved(
    flags: list[str], uninterrupted: Path, tmp_path: Path, key: str, what: str, column: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    shutil.rmtree(directory / "streaming_checkpoint_step_12")
    checkpoint = directory / "streaming_checkpoint_step_8"
    tamper(checkpoint, key)
    these = [*flags, "--checkpoint-dir", str(directory)]
    refusal = f"streaming_checkpoint_step_8 is damaged: its {what} do not have the fingerprint"
    output = command("training", these, code=2)
    assert refusal in output
    assert "use another checkpoint" in output
    resume = ["--checkpoint-path", str(directory), "--total-steps", "13"]
    assert refusal in command("resume_pretrain_tensor", [*resume, "--keep-optimizer"], code=2)
    if column == "fingerprint":
        assert refusal in command("resume_pretrain_tensor", resume, code=2)
    name = key.removeprefix("model.") if column == "fingerprint" else "model.norm.weight.exp_avg"
    output = audit(directory, "--from-step", "8", code=1)
    assert f"step_8 is not what was saved: {column} was" in output
    assert output.endswith(f"the first tensor that differs after step 8: {name}\n")
    assert "steps 5 to 12 are the same" in audit(directory, "--from-step", "7")
    forget_fingerprints(checkpoint)  # as one that an earlier version wrote: the log knows
    assert f"the first tensor that differs after step 8: {name}\n" in audit(directory, "--from-step", "8", code=1)


def test_an_audit_does_less_than_it_was_asked_only_with_an_error(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    assert f"--to-step 13: the last step on record in {directory} is 12" in audit(directory, "--to-step", "13", code=2)
    assert "--from-step 12 leaves nothing to audit: the last step" in audit(directory, "--from-step", "12", code=2)
    rows = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(row for row in rows if not row.startswith('{"step": 6,')))
    output = audit(directory, "--from-step", "4", "--to-step", "8", code=2)
    assert "the row of step 6 is missing between steps 5 and 7" in output
    damaged = [row.replace(', "fingerprint"', ', "other"') if row.startswith('{"step": 6,') else row for row in rows]
    (directory / "metrics.jsonl").write_text("".join(damaged))
    output = audit(directory, "--from-step", "4", "--to-step", "8", code=2)
    assert "do not record the same fingerprints at step 6" in output


def test_an_audit_of_a_sparse_log_goes_on_to_the_next_step_that_was_logged(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--checkpoint-interval", "0", "--fingerprint-interval", "0"]
    command("training", [*these, "--log-interval", "5"])
    assert sorted(bits_of(directory)) == [5, 10, 12]
    assert "steps 1 to 10 are the same to the bit: 2 losses" in audit(directory, "--to-step", "6")


def test_an_audit_of_data_that_have_moved(uninterrupted: Path, flags: list[str], tmp_path: Path) -> None:
    directory, inputs = tmp_path / "run", Path(flags[1]).parent.parent
    shutil.copytree(uninterrupted, directory)
    for name in ("corpus", "tokenizer"):
        shutil.copytree(inputs / name, tmp_path / "moved" / name)
    moved = ["--data-glob", str(tmp_path / "moved/corpus/*.parquet"), "--tokenizer-path"]
    for begin in ("0", "4"):
        stretch = ["--from-step", begin, "--to-step", "5"]
        assert "are the same to the bit" in audit(directory, *stretch, *moved, str(tmp_path / "moved/tokenizer"))
    next((tmp_path / "moved" / "corpus").iterdir()).unlink()
    for begin in ("0", "4"):
        stretch = ["--from-step", begin, "--to-step", "5"]
        output = audit(directory, *stretch, *moved, str(inputs / "tokenizer"), code=2)
        assert "--data-glob or --tokenizer-path: not the run's data: data " in output


def test_an_audit_on_ranks_that_cannot_says_which_can(uninterrupted: Path) -> None:
    outcomes = forked_commands.start("audit_run", ["--run", str(uninterrupted)], ranks=3)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2]
    assert "numbers of ranks that can: 1, 2, 4, 8, 16, with --tensor-parallel-size one of 1, 2, 4" in outcomes[0].errors
    assert "--tensor-slices" not in outcomes[0].errors


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
