"""Runs that are asked to stop, at any rank: all ranks save after the same step and leave with 0."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from colonnade.checkpoint.run_lock import RunLock
from faults import inject
from faults.conftest import STEPS
from faults.runs import assert_same_end, restarting
from forked_commands import Outcome, begin, start


def end_of(directory: Path, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((directory / name).read_text())
    return content


def assert_stopped(directory: Path, outcomes: list[Outcome], reason: str) -> int:
    """All ranks left with 0 after saving one step, which is returned."""
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes
    stopped = end_of(directory, "STOPPED.json")
    assert stopped["reason"] == reason
    step = stopped["step"]
    assert isinstance(step, int)
    assert 0 < step < STEPS
    assert (directory / f"streaming_checkpoint_step_{step}" / "MANIFEST.json").exists()
    assert stopped["checkpoint"] == f"streaming_checkpoint_step_{step}"
    assert f"stopped after step {step} of {STEPS} ({reason})" in outcomes[0].output
    return step


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1)), (signal.SIGHUP, (0, 1)), (signal.SIGUSR1, (0,))],
)
def test_a_signal_to_any_rank_stops_all_and_no_step_is_lost(
    flags: list[str], undisturbed: Path, tmp_path: Path, number: signal.Signals, ranks: tuple[int, ...]
) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    running = begin("training", these, ranks=2)
    running.until(r"step +3/")
    running.signal(number, *ranks)
    assert_stopped(directory, running.finish(), number.name)
    (outcome,) = start("training", these)
    assert outcome.code == 0, outcome.errors
    assert not (directory / "STOPPED.json").exists()
    assert end_of(directory, "COMPLETE.json")["step"] == STEPS
    assert_same_end(directory, undisturbed, STEPS, tmp_path)


def test_a_hangup_that_nohup_ignores_stops_nothing(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--total-steps", "12"]
    running = begin("training", these, prepare=inject.hangups_are_ignored)
    running.until(r"step +3/")
    running.signal(signal.SIGHUP)
    assert [outcome.code for outcome in running.finish()] == [0]
    assert end_of(directory, "COMPLETE.json")["step"] == 12


def test_a_signal_is_heard_with_thousands_of_open_files(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    running = begin("training", [*flags, "--checkpoint-dir", str(directory)], prepare=inject.many_open_files)
    running.until(r"step +3/")
    running.signal(signal.SIGTERM)
    assert_stopped(directory, running.finish(), "SIGTERM")


def test_the_wall_time_stops_a_run_before_it_is_over(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    began = time.monotonic()
    outcomes = start("training", [*flags, "--checkpoint-dir", str(directory), "--wall-time", "00:00:01"], ranks=2)
    assert_stopped(directory, outcomes, "wall time")
    assert time.monotonic() - began < 60


def test_what_is_left_for_a_step_includes_the_wait_for_the_device_and_no_save(flags: list[str], tmp_path: Path) -> None:
    glob = flags[flags.index("--data-glob") + 1]
    these = [*flags, "--total-steps", "4", "--checkpoint-dir", str(tmp_path), "--checkpoint-interval", "2"]
    validated = ["--validation-glob", glob, "--validation-interval", "3", "--validation-chunks", "4"]
    (outcome,) = start("training", [*these, *validated], prepare=inject.saves_and_validations_take_long)
    assert outcome.code == 0, outcome
    last = [float(value) for value in re.findall("reserve ([0-9.]+)", outcome.output)][-1]
    assert last >= 2 * 0.5
    assert last < 2 * 0.5 + 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_validation_and_samples_that_a_stop_left_out_are_made_up(
    flags: list[str], tmp_path: Path, ranks: int
) -> None:
    glob, prompts = flags[flags.index("--data-glob") + 1], tmp_path / "prompts"
    prompts.write_text("def \n")
    these = [
        *(*flags, "--total-steps", "10", "--validation-glob", glob, "--validation-chunks", "4"),
        *("--validation-interval", "4", "--sample-prompts", str(prompts), "--sample-interval", "2"),
        *("--sample-tokens", "4", "--sample-temperature", "0"),
    ]
    rows = {}
    for name, prepare in (("stopped", inject.stopped_at_step_8), ("whole", None)):
        directory = tmp_path / name
        outcomes = start("training", [*these, "--checkpoint-dir", str(directory)], ranks=ranks, prepare=prepare)
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
        if prepare is not None:
            assert end_of(directory, "STOPPED.json")["step"] == 8
            outcomes = start("training", [*these, "--checkpoint-dir", str(directory)], ranks=ranks)
            assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
        told = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        kept = ("step", "loss", "validation_loss", "samples")
        rows[name] = sorted(
            str({key: row[key] for key in kept if key in row}) for row in told if not row.get("started")
        )
    assert rows["stopped"] == rows["whole"]
    assert sum("validation_loss" in row for row in rows["whole"]) == 3
    assert sum("samples" in row for row in rows["whole"]) == 4


def test_ranks_that_disagree_on_the_wall_time_stop_after_the_same_step(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--wall-time", "00:30:00"]
    outcomes = start("training", these, ranks=2, prepare=inject.rank_1_has_no_time)
    assert assert_stopped(directory, outcomes, "wall time") == 1


def test_sigterm_with_a_peer_that_never_comes_ends_the_rank(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    running = begin("training", [*flags, "--checkpoint-dir", str(directory)], ranks=2, prepare=inject.short_grace)
    running.until(r"step +11/")
    running.signal(signal.SIGSTOP, 1)
    time.sleep(0.5)  # rank 0 comes to a collective that rank 1 never reaches
    running.signal(signal.SIGTERM, 0)
    running.processes[0].join(60)
    assert running.processes[0].exitcode == 1
    assert "SIGTERM asked for a stop, and step" in running.text(0, "errors")
    assert "rank 1 gives no sign" in running.text(0, "errors")
    running.signal(signal.SIGKILL, 1)
    running.finish()
    assert (directory / "streaming_checkpoint_step_6" / "MANIFEST.json").exists()
    assert not (directory / "STOPPED.json").exists()


def test_a_stop_waits_for_a_first_step_that_compiles(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    running = begin("training", these, ranks=2, prepare=inject.first_step_takes_long)
    running.until("sequences of 64 tokens a step")
    time.sleep(1)
    running.signal(signal.SIGTERM)
    assert assert_stopped(directory, running.finish(), "SIGTERM") == 1


def test_a_second_interrupt_leaves_at_once(flags: list[str], tmp_path: Path) -> None:
    running = begin("training", [*flags, "--checkpoint-dir", str(tmp_path / "run")], prepare=inject.step_3_for_ever)
    running.until(r"step +2/")
    running.signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.processes[0].is_alive()
    running.signal(signal.SIGINT)
    (outcome,) = running.finish(30)
    assert outcome.code == 130
    assert "left without a save" in outcome.errors


def test_a_run_ends_although_its_reader_is_inside_a_slow_read(flags: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    (outcome,) = start("training", these, prepare=inject.reads_for_ever_at_the_end, draws=True)
    assert outcome.code == 0, outcome.errors
    assert end_of(directory, "COMPLETE.json")["step"] == STEPS
    assert (directory / "report.html").exists()
    lock = RunLock(directory)
    lock.take()  # refused while another process holds it
    lock.release()


def test_a_finished_run_is_complete_until_it_is_made_longer(
    undisturbed: Path, flags: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    before = sorted(path.name for path in directory.iterdir())
    (outcome,) = start("training", [*flags, "--checkpoint-dir", str(directory)])
    assert outcome.code == 0
    assert "the run is finished, nothing was changed" in outcome.output
    assert sorted(path.name for path in directory.iterdir()) == before
    longer = ["--checkpoint-path", str(directory), "--keep-optimizer", "--total-steps", "900"]
    running = begin("resume_pretrain_tensor", longer)
    running.until(rf"step +{STEPS + 2}/")
    assert not (directory / "COMPLETE.json").exists()
    running.signal(signal.SIGTERM)
    assert running.finish()[0].code == 0
    assert end_of(directory, "STOPPED.json")["total_steps"] == 900


# ----------------------------------------------------------------------------------------------- torchrun's restarts


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_when_a_rank_aborts_at_its_exit(
    flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory)]
    output = restarting("training", "first_attempt_aborts_at_its_exit", these, tmp_path)
    assert output.count(f"finished at step {STEPS}") == 1
    assert output.count("the run is finished, nothing was changed") == 1
    assert_same_end(directory, undisturbed, STEPS, tmp_path)


@pytest.mark.slow
def test_a_restarted_resume_goes_on_and_does_not_warm_up_once_more(
    flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """The optimizer is reset once a launch, not once an attempt: rates and losses are those without the failure."""
    for name in ("failing", "whole"):
        directory = tmp_path / name
        directory.mkdir()
        source = directory / "streaming_checkpoint_step_6"
        shutil.copytree(undisturbed / "streaming_checkpoint_step_6", source)
        these = ["--checkpoint-path", str(directory), "--rewarmup-steps", "4", "--checkpoint-interval", "2"]
        if name == "failing":
            output = restarting("resume_pretrain_tensor", "first_attempt_dies_in_step_15", these, tmp_path)
            assert "optimizer state reset" in output
            # The save of the last step before may have been under way.
            assert re.search(r"resuming from .*_step_(8|10|12|14) ", output)
        else:
            (outcome,) = start("resume_pretrain_tensor", these)
            assert outcome.code == 0, outcome.errors
    assert_same_end(tmp_path / "failing", tmp_path / "whole", STEPS, tmp_path)
