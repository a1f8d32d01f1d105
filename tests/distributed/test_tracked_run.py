"""Whole commands with every sink: what they leave, what a resume from an artifact is, and that no sink ends a run."""

from __future__ import annotations

import csv
import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest

import forked_commands
from distributed.launching import losses, make_inputs
from wandb_records import Store, history, offline_runs, store_instead_of_the_client

ARTIFACT = "wandb:me/demo/checkpoint-1a2b3c4d"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    return [*inputs, "--tokens-per-step", "256", "--initial-batch-size", "4"]


def test_a_run_goes_on_from_its_artifact_in_another_folder(flags: list[str], tmp_path: Path) -> None:
    environment = {"STORE": str(tmp_path / "store")}
    uploading = ["--wandb-project", "demo", "--wandb-checkpoints", "--drop-uploaded-checkpoints"]
    (outcome,) = forked_commands.start(
        "training",
        [
            *flags,
            *uploading,
            "--total-steps",
            "9",
            "--checkpoint-interval",
            "3",
            "--checkpoint-dir",
            str(tmp_path / "a"),
        ],
        environment=environment,
        prepare=store_instead_of_the_client,
    )
    assert outcome.code == 0, outcome.errors
    assert "warning" not in outcome.output
    assert [path.name for path in (tmp_path / "a").glob("streaming*")] == ["streaming_checkpoint_step_9"]
    told = [entry["metadata"] for entry in Store(tmp_path / "store").logged]
    assert [(facts["step"], facts["tokens_seen"]) for facts in told] == [(3, 768), (6, 1536), (9, 2304)]
    assert told[1]["loss"] == losses(tmp_path / "a")[6]

    fresh = tmp_path / "elsewhere" / "b"
    these = ["--checkpoint-path", f"{ARTIFACT}:step-6", "--keep-optimizer", "--checkpoint-dir", str(fresh)]
    outcomes = forked_commands.start(
        "resume_pretrain_tensor",
        [*these, "--no-wandb-checkpoints", "--no-drop-uploaded-checkpoints"],
        ranks=2,
        environment=environment,
        prepare=store_instead_of_the_client,
    )
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    expected = {step: loss for step, loss in losses(tmp_path / "a").items() if step > 6}
    assert losses(fresh) == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
    assert [path.name for path in fresh.glob("streaming*")] == ["streaming_checkpoint_step_9"]
    assert (tmp_path / "elsewhere" / "artifacts/me/demo/checkpoint-1a2b3c4d/v1/streaming_checkpoint_step_6").is_dir()


def test_a_restart_goes_on_in_every_sink(flags: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    these = [*flags, "--csv", "--tensorboard", "--wandb-project", "demo", "--no-progress-bar", "--total-steps", "6"]
    these += ["--checkpoint-interval", "3", "--keep-checkpoints", "0", "--checkpoint-dir", str(tmp_path)]
    for number in range(2):
        (outcome,) = forked_commands.start("training", these, environment={"WANDB_MODE": "offline"}, draws=True)
        assert outcome.code == 0, outcome.errors
        for name in ("metrics.jsonl", "metrics.csv", "tensorboard", "wandb"):
            assert f"  metrics     {tmp_path / name}\n" in outcome.output
        if number == 0:
            assert "step/s" not in outcome.errors
            first = (tmp_path / "metrics.jsonl").read_text().splitlines()
            # As if the run had been killed after step 6 with its checkpoint at 3.
            (tmp_path / "streaming_checkpoint_step_6").rename(tmp_path / "gone")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("started", False)) for row in rows] == [
        *((0, True), (1, False), (2, False), (3, False)),
        *((3, True), (4, False), (5, False), (6, False)),
    ]
    assert [json.dumps(row) for row in rows[:4]] == first[:4]
    assert rows[4]["resumed_from"] == "streaming_checkpoint_step_3"
    expected = list(losses(tmp_path).items())
    with (tmp_path / "metrics.csv").open() as file:
        assert [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected  # a loss is a float32
    starts = [[row["step"] for row in history(file)] for file in offline_runs(tmp_path)]
    assert starts == [[1, 2, 3, 4, 5, 6], [4, 5, 6]]
    assert (tmp_path / "report.html").read_text().count("restart</li>") == 4  # loss, rate, norm, speed


def every_sink_fails() -> None:
    """The disk of the record is full from step 3 on; the table raises, the events hang, the client cannot start."""
    import wandb

    from colonnade.errors import RunError
    from colonnade.telemetry import csv_table, pictures, sinks, tensorboard

    full = OSError(errno.ENOSPC, "No space left on device")
    write = sinks.JsonLines.write

    def until_full(self: Any, row: Any) -> None:
        if row["step"] >= 3:
            raise RunError(f"cannot write metrics to {self._path}: {full.strerror}")
        write(self, row)

    def fail(*_: Any, **__: Any) -> None:
        raise full

    def hang(*_: Any) -> None:
        time.sleep(600)

    sinks.JsonLines.write = until_full  # type: ignore[method-assign]
    csv_table.CsvTable.write = fail  # type: ignore[method-assign]
    tensorboard.TensorBoard.write = hang  # type: ignore[method-assign]
    pictures.write_report = fail
    wandb.init = fail  # type: ignore[assignment]


def test_no_sink_ends_a_run(flags: list[str], tmp_path: Path) -> None:
    these = [*flags, "--csv", "--tensorboard", "--wandb-project", "demo", "--wandb-checkpoints", "--total-steps", "5"]
    # Half of half the step's time is what the end waits for a sink that hangs.
    these += ["--checkpoint-dir", str(tmp_path), "--step-timeout", "8"]
    outcomes = forked_commands.start("training", these, ranks=2, prepare=every_sink_fails, draws=True)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert (tmp_path / "streaming_checkpoint_step_5").is_dir()
    assert (tmp_path / "COMPLETE.json").exists()
    assert list(losses(tmp_path)) == [1, 2]
    warnings = [line for line in outcomes[0].output.splitlines() if line.startswith("warning")]
    for named in ("metrics.jsonl", "metrics.csv is off", "TensorBoard is off", "report.html is off", "Biases is off ("):
        assert sum(named in line for line in warnings) == 1, warnings
    assert sum("checkpoints are not uploaded" in line for line in warnings) == 1
    assert len(warnings) == 6
