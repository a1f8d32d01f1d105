"""A bad step is skipped truly, on all ranks; too many in a row end the run; spikes; and it is one run when stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import forked_commands
from distributed.launching import make_inputs
from distributed.pool import RankPool
from distributed.test_bits import MODELS, same_bits
from distributed.test_parity import CONFIG
from distributed.workers import steps_with_a_bad_one
from forked_commands import Outcome
from test_loss_window import decisions

NORM, CUT = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
ODD = MODELS["odd sizes"]

# ------------------------------------------------------------------------------------------------------- one bad step

WAYS: dict[str, tuple[Any, int, int, dict[str, Any]]] = {  # config, ranks, tp, options
    "fused": (CONFIG, 1, 1, {}),
    "unfused": (CONFIG, 1, 1, {"fused": False}),
    "fp16": (CONFIG, 2, 2, {"compute_dtype": torch.float16}),
    "fp16, unfused": (CONFIG, 1, 1, {"compute_dtype": torch.float16, "fused": False}),
    "fp16, dp 2": (CONFIG, 2, 1, {"compute_dtype": torch.float16}),
    "bf16": (CONFIG, 2, 2, {"compute_dtype": torch.bfloat16}),
    "tp 2": (CONFIG, 2, 2, {}),
    "dp 2": (CONFIG, 2, 1, {}),
    "tp 2 x dp 2": (CONFIG, 4, 2, {}),
    "deterministic, tp 2": (CONFIG, 2, 2, {"deterministic": True, "slices": 4}),
    "deterministic, unfused, tp 2 x dp 2": (ODD, 4, 2, {"deterministic": True, "slices": 8, "fused": False}),
}


@pytest.mark.parametrize("poison", [CUT, NORM], ids=["a cut parameter", "a copy"])
@pytest.mark.parametrize("way", WAYS)
def test_a_bad_gradient_on_one_rank_leaves_no_trace_on_any(rank_pool: RankPool, way: str, poison: str) -> None:
    """The reference never sees the batch: the ranks end with the same bits."""
    config, ranks, tp, options = WAYS[way]
    expected = rank_pool.run(ranks, steps_with_a_bad_one, config, tp, bad=2, poison=None, **options)
    found = rank_pool.run(ranks, steps_with_a_bad_one, config, tp, bad=2, poison=poison, rank=ranks - 1, **options)
    for rank, (left, right) in enumerate(zip(expected, found, strict=True)):
        assert left["skipped"] == [0.0] * 4
        assert right["skipped"] == [0.0, 0.0, 1.0, 0.0, 0.0], f"rank {rank}"
        assert right["kept"], f"rank {rank}"
        assert right["scale"] == left["scale"]
        assert all(same_bits(old, new) for old, new in zip(left["tensors"], right["tensors"], strict=True))


@pytest.mark.parametrize("way", ["fused", "unfused", "fp16", "tp 2 x dp 2", "deterministic, tp 2"])
def test_a_loss_above_the_limit_leaves_no_trace(rank_pool: RankPool, way: str) -> None:
    config, ranks, tp, options = WAYS[way]
    for limit, skips in ((1.0, 1.0), (20.0, 0.0), (float("nan"), 0.0)):
        found = rank_pool.run(ranks, steps_with_a_bad_one, config, tp, bad=2, poison="loss", limit=limit, **options)
        for result in found:
            assert result["skipped"] == [0.0, 0.0, skips, 0.0, 0.0]
            assert result["kept"] is bool(skips)
            assert result["scale"] == (2.0**10 if way == "fp16" else 1.0), "a spike is no overflow"


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--total-steps", "12", "--checkpoint-interval", "4", "--initial-batch-size", "2"),
        *("--tokens-per-step", "512"),
    ]


def poisoned(flags: list[str], directory: Path, ranks: int = 1, **environment: Any) -> list[Outcome]:
    return forked_commands.start(
        "distributed.poisoned_training",
        [*flags, "--checkpoint-dir", str(directory)],
        ranks=ranks,
        environment={name.upper(): str(value) for name, value in environment.items()},
    )


def rows_of(directory: Path) -> dict[int, dict[str, Any]]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if "loss" in row}


def record(directory: Path, step: int) -> dict[str, Any]:
    text = (directory / f"streaming_checkpoint_step_{step}" / "MANIFEST.json").read_text()
    run: dict[str, Any] = json.loads(text)["run"]
    return run


def steps_of(directory: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in directory.glob("streaming_checkpoint_step_*"))


@pytest.mark.parametrize("tensor_parallel_size", [2, 1], ids=["tp 2", "dp 2"])
def test_a_nan_on_one_rank_is_told_and_counted(flags: list[str], tmp_path: Path, tensor_parallel_size: int) -> None:
    these = [*flags, "--tensor-parallel-size", str(tensor_parallel_size)]
    outcomes = poisoned(these, tmp_path / "run", ranks=2, poison_kind="gradient", poison_steps="3,4,9", poison_rank=1)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    told = [line for line in outcomes[0].output.splitlines() if " skipped (" in line]
    assert [line.partition(":")[0] for line in told] == [
        "step 3 skipped (1 in a row, 1 in all)",
        "step 4 skipped (2 in a row, 2 in all)",
        "step 9 skipped (1 in a row, 3 in all)",
    ]
    assert "gradient norm nan; its batch: chunks 16 to 23 of the data: row group " in told[0]
    assert "part_" in told[0]
    rows = rows_of(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows.values()] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert [step for step, row in rows.items() if row["grad_norm"] is None] == [3, 4, 9]
    ends = record(tmp_path / "run", 12)
    assert (ends["skipped_steps"], ends["skipped_in_row"]) == (3, 0)
    assert ends["loss_window"] == [row["loss"] for step, row in rows.items() if step not in (3, 4, 9)]
    # Due after step 4, in the middle of the series, and taken after the first good step.
    assert steps_of(tmp_path / "run") == [5, 8, 12]
    middle = record(tmp_path / "run", 5)
    assert (middle["skipped_steps"], middle["skipped_in_row"]) == (2, 0)
    # The data move on, whatever became of the step.
    assert middle["data_position"]["chunk"] == 5 * 8


def test_an_fp16_overflow_is_a_skipped_step(flags: list[str], tmp_path: Path) -> None:
    these = [*flags, "--total-steps", "2", "--precision", "fp16"]
    (outcome,) = poisoned(these, tmp_path / "run", poison_kind="loss", poison_steps="1", poison_factor=1e6)
    assert outcome.code == 0, outcome
    assert "step 1 skipped (1 in a row, 1 in all): loss 5" in outcome.output
    assert [row["skipped_steps"] for row in rows_of(tmp_path / "run").values()] == [1, 1]
    assert record(tmp_path / "run", 2)["scaler"]["scale"] == 2.0**15


def test_too_many_in_a_row_stop_all_ranks_and_nothing_is_saved_among_them(flags: list[str], tmp_path: Path) -> None:
    """Steps 3 to 6 are bad. The checkpoint due at 4 waits for 7: what it would hold may be what makes them bad."""
    directory, whole = tmp_path / "run", tmp_path / "whole"
    these = [*flags, "--deterministic", "--tensor-slices", "4"]
    poison = {"poison_kind": "gradient", "poison_steps": "3,4,5,6", "poison_rank": 1}
    for _ in range(2):
        outcomes = poisoned([*these, "--max-skipped-steps", "3"], directory, ranks=2, **poison)
        assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
        (line,) = (line for line in outcomes[0].errors.splitlines() if "error" in line)
        assert "error: 3 steps in a row were skipped, the last of them step 5 (--max-skipped-steps 3): loss 5." in line
        assert "gradient norm nan; its batch: chunks 32 to 39 of the data: row group" in line
        assert f"The last good checkpoint in {directory} stands" in line
        assert outcomes[1].errors == ""
        assert steps_of(directory) == []
        assert max(rows_of(directory)) == 4
    outcomes = poisoned([*these, "--max-skipped-steps", "4"], directory, ranks=2, **poison)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    assert "4 steps in a row were skipped, the last of them step 6" in outcomes[0].errors
    for place in (directory, whole):
        outcomes = poisoned([*these, "--max-skipped-steps", "5"], place, ranks=2, **poison)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    went_on, uninterrupted = record(directory, 12), record(whole, 12)
    for key in ("fingerprint", "moments_fingerprint", "loss_window", "skipped_steps", "skipped_in_row"):
        assert went_on[key] == uninterrupted[key], key
    assert went_on["skipped_steps"] == 4
    assert steps_of(whole) == [7, 8, 12]


SPIKES = ("--spike-sigma", "0.7", "--spike-window", "10", "--max-skipped-steps", "40", "--total-steps", "30")
SPOILED = {"poison_kind": "loss", "poison_steps": "14,15,22", "poison_factor": 2}


def spikes_told(output: str, words: str) -> dict[int, str]:
    """Lines on spikes by step."""
    lines = [line for line in output.splitlines() if words in line and "a spike" in line]
    return {int(line.split()[1]): line for line in lines}


@pytest.mark.parametrize("action", ["skip", "warn"])
def test_spikes_of_a_run_are_numpys(flags: list[str], tmp_path: Path, action: str) -> None:
    these = [*flags, *SPIKES, "--spike-action", action]
    (outcome,) = poisoned(these, tmp_path / "run", **SPOILED)
    assert outcome.code == 0, outcome
    rows = rows_of(tmp_path / "run")
    losses = [row["loss"] for row in rows.values()]
    expected = decisions(losses, 10, 0.7, skips=action == "skip")
    steps = [step for step, is_spike in zip(rows, expected, strict=True) if is_spike]
    assert {14, 15, 22} <= set(steps)
    told = spikes_told(outcome.output, "skipped (" if action == "skip" else "was taken in spite of")
    assert sorted(told) == steps
    assert list(rows.values())[-1]["skipped_steps"] == (len(steps) if action == "skip" else 0)
    assert f"loss {losses[13]:.6g}" in told[14]
    assert "standard deviation" in told[14]
    assert "; its batch: chunks 104 to 111 of the data: row group" in told[14]
    kept = [loss for loss, spike in zip(losses, expected, strict=True) if not (spike and action == "skip")]
    assert record(tmp_path / "run", 30)["loss_window"] == kept[-10:]


def test_skipped_spikes_are_the_same_at_other_ranks_and_after_a_stop(flags: list[str], tmp_path: Path) -> None:
    these = [*flags, *SPIKES, "--spike-action", "skip", "--deterministic", "--tensor-slices", "4"]
    seen = []
    for name, ranks in (("one", 1), ("two", 2)):
        outcomes = poisoned(these, tmp_path / name, ranks=ranks, **SPOILED)
        assert {outcome.code for outcome in outcomes} == {0}, outcomes
        seen.append(record(tmp_path / name, 30))
    shutil.copytree(tmp_path / "one", tmp_path / "stopped")
    for step in steps_of(tmp_path / "stopped"):
        if step > 16:  # after the first skipped spikes
            shutil.rmtree(tmp_path / "stopped" / f"streaming_checkpoint_step_{step}")
    outcomes = poisoned([*these, "--tensor-parallel-size", "1"], tmp_path / "stopped", ranks=2, **SPOILED)
    assert {outcome.code for outcome in outcomes} == {0}, outcomes
    seen.append(record(tmp_path / "stopped", 30))
    for key in ("fingerprint", "moments_fingerprint", "loss_window", "skipped_steps", "skipped_in_row"):
        assert [other[key] for other in seen] == [seen[0][key]] * 3, key
    assert seen[0]["skipped_steps"] >= 3
    # What decides of a step cannot be changed on the way.
    (outcome,) = forked_commands.start(
        "training", [*these, "--spike-sigma", "3", "--checkpoint-dir", str(tmp_path / "one")]
    )
    assert outcome.code == 2
    assert "spike_sigma 0.7 -> 3.0" in outcome.errors


def test_an_audit_skips_what_the_run_skipped(flags: list[str], tmp_path: Path) -> None:
    """At a rate so low that the text's own differences are spikes; the audit begins at a checkpoint with its window."""
    these = [*flags, *SPIKES, "--spike-action", "skip", "--deterministic", "--learning-rate", "1e-6"]
    these += ["--checkpoint-dir", str(tmp_path / "run")]
    (outcome,) = forked_commands.start("training", these)
    assert outcome.code == 0, outcome
    counts = [row["skipped_steps"] for row in rows_of(tmp_path / "run").values()]
    # With a window that began afresh there would be no spike before step 25.
    assert counts[23] > counts[19]
    audit = ["--run", str(tmp_path / "run"), "--from-step", "20", "--tensor-parallel-size", "2"]
    outcomes = forked_commands.start("audit_run", audit, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "steps 21 to 30 are the same to the bit: 10 losses" in outcomes[0].output
