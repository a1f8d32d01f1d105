"""What goes wrong in a validation or in samples: all ranks leave with one line, and the step before them is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import inject
from forked_commands import Outcome, start


def start_validated(flags: list[str], directory: Path, prepare: Callable[[], None], *others: str) -> list[Outcome]:
    """Two ranks that save and validate after step 6."""
    glob = flags[flags.index("--data-glob") + 1]
    validated = ["--validation-glob", glob, "--validation-interval", "6", "--validation-chunks", "4"]
    these = [*flags, *validated, "--checkpoint-dir", str(directory), *others]
    outcomes = start("training", these, ranks=2, prepare=prepare)
    assert (directory / "streaming_checkpoint_step_6" / "MANIFEST.json").exists()
    assert not (directory / "COMPLETE.json").exists()
    return outcomes


def test_a_rank_that_is_killed_in_a_validation_ends_the_others_without_a_word(flags: list[str], tmp_path: Path) -> None:
    # In async mode its part of the save may die with it.
    prepare = inject.rank_1_dies_in_a_validation
    outcomes = start_validated(flags, tmp_path / "run", prepare, "--checkpoint-mode", "sync")
    assert [outcome.code for outcome in outcomes] == [1, -9]
    assert "Traceback" not in outcomes[0].errors
    assert "error" not in outcomes[0].errors


def test_memory_that_runs_out_in_a_validation_is_one_line(flags: list[str], tmp_path: Path) -> None:
    outcomes = start_validated(flags, tmp_path / "run", inject.rank_1_has_no_memory_for_a_validation)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    said = [line for outcome in outcomes for line in outcome.errors.splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith("training.py: error: rank 1: out of memory in the validation after step 6; ")
    assert "Traceback" not in "".join(outcome.errors for outcome in outcomes)


@pytest.mark.parametrize("step", [6, 24])
def test_samples_that_fail_are_one_line_after_the_save(flags: list[str], tmp_path: Path, step: int) -> None:
    (tmp_path / "prompts").write_text("def \n")
    samples = ["--sample-prompts", str(tmp_path / "prompts"), "--sample-interval", str(step), "--sample-tokens", "4"]
    these = [*flags, *samples, "--checkpoint-dir", str(tmp_path / "run")]
    (outcome,) = start("training", these, prepare=inject.samples_fail)
    assert outcome.code == 1
    assert (tmp_path / "run" / f"streaming_checkpoint_step_{step}" / "MANIFEST.json").exists()
    said = [line for line in outcome.errors.splitlines() if "error" in line.lower()]
    assert len(said) == 1
    assert f"rank 0: the samples after step {step} failed (RuntimeError: probability tensor contains " in said[0]
    # What was left to do comes with the next start, also where the last step was taken.
    (outcome,) = start("training", these)
    assert outcome.code == 0, outcome
    assert (tmp_path / "run" / "COMPLETE.json").exists()
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert step in {row["step"] for row in rows if "samples" in row}
    (outcome,) = start("training", these)
    assert "the run is finished, nothing was changed" in outcome.output
