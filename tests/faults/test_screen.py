"""Runs whose screen is gone: they train on, and their files have everything."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.launching import losses
from forked_commands import Outcome, start


def full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def full_disk_for_both() -> None:
    full_disk()
    os.dup2(1, 2)


def reader_that_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the one from before takes it for a file still


def latin_1() -> None:
    sys.stdout.reconfigure(encoding="latin-1", errors="strict")  # type: ignore[union-attr]  # as PYTHONIOENCODING=latin-1


def run(flags: list[str], directory: Path, prepare: Callable[[], None], *others: str) -> Outcome:
    these = [*flags, "--checkpoint-dir", str(directory), "--total-steps", "3", *others]
    (outcome,) = start("training", these, prepare=prepare)
    assert outcome.code == 0, outcome
    assert json.loads((directory / "COMPLETE.json").read_text())["checkpoint"] == "streaming_checkpoint_step_3"
    assert sorted(losses(directory)) == [1, 2, 3]
    return outcome


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [(full_disk, "No space left on device"), (reader_that_left, "Broken pipe"), (full_disk_for_both, None)],
)
def test_a_screen_that_cannot_be_written_does_not_end_a_run(
    flags: list[str], tmp_path: Path, prepare: Callable[[], None], reason: str | None
) -> None:
    outcome = run(flags, tmp_path / "run", prepare)
    assert outcome.output == ""
    warnings = [line for line in outcome.errors.splitlines() if "the output cannot be written" in line]
    expected = f"warning: the output cannot be written ({reason}); it is dropped from here on"
    assert warnings == ([] if reason is None else [expected])
    assert "Traceback" not in outcome.errors


def test_a_character_that_the_screen_lacks_is_shown_as_an_escape(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("10 € for\n", encoding="utf-8")
    samples = ["--sample-prompts", str(tmp_path / "prompts"), "--sample-interval", "2", "--sample-tokens", "4"]
    outcome = run(flags, tmp_path / "run", latin_1, *samples)
    assert "sample '10 \\u20ac for'" in outcome.output
