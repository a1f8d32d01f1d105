"""What each sink has written, read back by somebody else; and sinks that fail, which touch nothing else."""

from __future__ import annotations

import csv
import errno
import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colonnade.checkpoint.retention import Retention
from colonnade.config import complete_settings
from colonnade.data.mixture import parse_data_glob
from colonnade.errors import RunError, UsageError
from colonnade.telemetry import sinks, tracking
from colonnade.telemetry.csv_table import COLUMNS, CsvTable
from colonnade.telemetry.metrics import read_metrics, restarts
from colonnade.telemetry.progress import ProgressReport
from colonnade.telemetry.sinks import JsonLines, Tracker
from colonnade.telemetry.tensorboard import TensorBoard
from colonnade.telemetry.weights_and_biases import WeightsAndBiases, own_id
from run import model_card
from wandb_records import history, offline_runs, records

START = {"step": 0, "started": True, "tp": 2, "dp": 1}
SAMPLES = [{"prompt": "def ", "text": "f(x):\n    return <b>"}]


def training(step: int, loss: float | None = None) -> dict[str, Any]:
    loss = 10.0 / step if loss is None else loss
    return {"step": step, "loss": loss, "learning_rate": 1e-3 * step, "model_flops_utilization": None, "epoch": 0}


def validation(step: int) -> dict[str, Any]:
    return {"step": step, "validation_loss": 11.0 / step, "tokens_seen": 256 * step}


def stamped(*rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**row, "time": f"2026-11-21T10:00:{row['step']:02d}.500+00:00"} for row in rows]


def write_all(sink: sinks.Sink, step: int, *rows: Mapping[str, Any]) -> None:
    sink.open(step)
    for row in stamped(*rows):
        sink.write(row)
    sink.close(False)


# CSV -----------------------------------------------------------------------------------------------------------------


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_a_step_with_its_validation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    samples = {"step": 4, "samples": SAMPLES}
    write_all(CsvTable(path), 0, START, training(2), training(4, float("nan")), validation(4), samples, validation(5))
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = table(path)
    assert [row["step"] for row in rows] == ["2", "4", "5"]
    assert [row["loss"] for row in rows] == ["5.0", "", ""]
    assert [row["validation_loss"] for row in rows] == ["", "2.75", "2.2"]
    assert rows[1]["learning_rate"] == "0.004"
    assert rows[1]["tokens_seen"] == "1024"
    assert rows[1]["time"] == "2026-11-21 10:00:04"
    assert {row["model_flops_utilization"] for row in rows} == {""}


def test_a_row_is_in_the_file_at_once_and_a_restart_drops_the_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    sink = CsvTable(path)
    sink.open(0)
    for row in stamped(training(1), training(2), training(3)):
        sink.write(row)
        assert table(path)[-1]["step"] == str(row["step"])
    path.write_text(path.read_text() + '4,"2026')  # what a kill has left
    write_all(CsvTable(path), 2, validation(2), training(3, 30.0))
    rows = table(path)
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "10.0"), ("2", "5.0"), ("3", "30.0")]
    assert rows[1]["validation_loss"] == "5.5"


# TensorBoard ---------------------------------------------------------------------------------------------------------


def test_tensorboard_tells_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_all(TensorBoard(tmp_path), 0, START, training(1), training(2), training(3), validation(3))
    again = {"step": 4, "samples": SAMPLES}
    write_all(TensorBoard(tmp_path), 2, {**START, "step": 2}, training(3, 30.0), training(4, float("inf")), again)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 10.0), (2, 5.0), (3, 30.0)]
    assert [event.wall_time for event in events.Scalars("learning_rate")][1] == pytest.approx(1795255202.5)
    assert "model_flops_utilization" not in events.Tags()["scalars"]
    (text,) = events.Tensors("samples/0/text_summary")
    assert text.tensor_proto.string_val == [b"    def f(x):\n        return <b>"]


# Weights & Biases ----------------------------------------------------------------------------------------------------


def client(directory: Path, said: list[str], **options: Any) -> WeightsAndBiases:
    given = {"project": "demo", "entity": None, "run_name": None, "config": {"seed": 7}, "say": said.append}
    return WeightsAndBiases(directory, **{**given, **options})


def test_the_client_offline_gets_every_row_and_a_restart_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    write_all(client(tmp_path, said), 0, START, training(1), training(2, float("nan")), {"step": 2, "samples": SAMPLES})
    write_all(client(tmp_path, said), 1, {**START, "step": 1}, training(2, 30.0))
    first, second = offline_runs(tmp_path)
    rows = history(first)
    assert [(row["step"], row.get("loss")) for row in rows] == [(1, 10.0), (2, None), (2, None)]
    assert rows[2]["samples/_type"] == "table-file"
    (file,) = (first.parent / "files").rglob("*.table.json")
    assert json.loads(file.read_text())["data"] == [["def ", SAMPLES[0]["text"]]]
    assert [(row["step"], row["loss"]) for row in history(second)] == [(2, 30.0)]
    of_run = [record.run for path in (first, second) for record in records(path) if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in of_run} == {
        (own_id(tmp_path, "demo", None), "demo", tmp_path.name)
    }
    axes = [(m.metric.glob_name, m.metric.step_metric) for m in records(first) if m.HasField("metric")]
    assert ("*", "step") in axes
    assert own_id(tmp_path, "another", None) != of_run[0].run_id
    assert said == []


@pytest.mark.parametrize(
    ("error", "text", "said_of_it"),
    [
        ("UsageError", "No API key configured. Use `wandb login` to log in.", "has no API key"),
        ("CommError", "connection\nrefused", "cannot be reached (CommError: connection refused)"),
    ],
)
def test_without_a_key_or_a_server_the_run_is_kept_offline(
    error: str, text: str, said_of_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    modes: list[str | None] = []

    def init(**options: Any) -> Any:
        modes.append(options["mode"])
        if options["mode"] is None:
            raise getattr(wandb.errors, error)(text)
        return wandb.sdk.wandb_run.Run(wandb.Settings(mode="offline", run_id=options["id"]))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "define_metric", lambda *_, **__: None)
    said: list[str] = []
    client(tmp_path, said).open(0)
    assert modes == [None, "offline"]
    assert len(said) == 1
    assert said_of_it in said[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://me:secret@host/a.parquet?X-Signature=ab%2Fc&e=1", "https://host/a.parquet"),
        (
            "web=https://me:se@cret@h/a.parquet?sig=x:y:0.25,s3=s3://b/part-?.parquet:2",
            "web=https://h/a.parquet:0.25,s3=s3://b/part-?.parquet:2",
        ),
        (
            "ftp://me:secret@h:21/x/*.parquet,https://h/b.parquet#t=9,/local/a@b?.parquet",
            "ftp://h:21/x/*.parquet,https://h/b.parquet,/local/a@b?.parquet",
        ),
        ("abfs://container@account.dfs.core.windows.net/*.parquet",) * 2,
        ("hf://datasets/owner/name@main/data/*.parquet",) * 2,
    ],
)
def test_nothing_secret_of_a_data_pattern_leaves_the_machine(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the configuration that the client is given, nor in a model card."""
    configs: list[Mapping[str, Any]] = []

    def client(*_: Any, config: Mapping[str, Any], **__: Any) -> Kept:
        configs.append(config)
        return Kept()

    monkeypatch.setattr(tracking, "WeightsAndBiases", client)
    settings = complete_settings(
        {"data_glob": given, "validation_glob": given, "wandb_project": "p", "checkpoint_dir": str(tmp_path)}
    )
    progress = ProgressReport(9, line_stream=io.StringIO(), bar_stream=io.StringIO())
    tracker, _ = tracking.open_tracker(settings, 0, progress, retention=Retention(tmp_path), unigram_entropy=None)
    tracker.close(10)
    assert (configs[0]["data_glob"], configs[0]["validation_glob"]) == (expected, expected)
    trained: Any = SimpleNamespace(settings=settings, record={"tokens_seen": 7})
    patterns = [line.split("`")[1] for line in model_card._data(trained).splitlines() if line.startswith("- ")]
    assert [corpus.pattern for corpus in parse_data_glob(expected)] == patterns


# Sinks that fail -----------------------------------------------------------------------------------------------------


class Kept:
    """A sink that keeps what it is given."""

    name = "kept"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def open(self, step: int) -> None:
        self.calls.append(step)

    def write(self, row: Mapping[str, Any]) -> None:
        self.calls.append(row["step"])

    def close(self, failed: bool) -> None:
        self.calls.append(failed)


class Failing(Kept):
    """Raises in the calls named."""

    def __init__(self, *calls: str) -> None:
        super().__init__()
        self.name, self._fails = f"failing in {' and '.join(calls)}", calls

    def open(self, step: int) -> None:
        self._fail("open")

    def write(self, row: Mapping[str, Any]) -> None:
        self._fail("write")

    def close(self, failed: bool) -> None:
        self._fail("close")

    def _fail(self, call: str) -> None:
        self.calls.append(call)
        if call in self._fails:
            raise OSError(errno.ENOSPC, "No space left\non device")


class Hanging(Kept):
    name = "hanging"
    for_ever = threading.Event()

    def write(self, row: Mapping[str, Any]) -> None:
        self.for_ever.wait()


def test_a_sink_that_fails_or_hangs_is_told_once_and_the_others_get_all(tmp_path: Path) -> None:
    lines, kept, hanging = io.StringIO(), Kept(), Hanging()
    failing = [Failing("open"), Failing("write"), Failing("close"), Failing("open", "write", "close")]
    progress = ProgressReport(9, line_stream=lines, bar_stream=io.StringIO())
    tracker = Tracker(3, progress, JsonLines(tmp_path / "m.jsonl"), others=[*failing, hanging, kept])
    for step in range(4, 10):
        tracker.write(training(step))
    tracker.close(0.5, failed=True)
    assert kept.calls == [3, 4, 5, 6, 7, 8, 9, True]
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [4, 5, 6, 7, 8, 9]
    warnings = [line for line in lines.getvalue().splitlines() if line.startswith("warning")]
    assert len(warnings) == len(failing) + 1
    for sink in failing:
        (line,) = [line for line in warnings if f"{sink.name} is off" in line]
        assert "No space left on device" in line
    assert failing[1].calls == ["open", "write"]
    assert any("hanging is off (it did not end in time" in line for line in warnings)
    tracker.write(training(9))  # after the end: nobody is there
    assert kept.calls[-1] is True


def test_a_sink_that_takes_nothing_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "MOST_WAITING", 3)
    lines = io.StringIO()
    tracker = Tracker(0, ProgressReport(9, line_stream=lines, bar_stream=io.StringIO()), None, others=[Hanging()])
    for step in range(1, 9):
        tracker.write(training(step))
    tracker.close(10.0)
    assert [line for line in lines.getvalue().splitlines() if line.startswith("warning")] == [
        "warning: hanging is off (it has not taken 3 rows); the run goes on without it"
    ]


@pytest.mark.parametrize("must_record", [True, False])
def test_a_record_that_fails_ends_the_run_only_where_it_must(must_record: bool) -> None:
    class Full(Kept):
        def write(self, row: Mapping[str, Any]) -> None:
            super().write(row)
            raise RunError("cannot write metrics to m.jsonl: No space left on device")

    lines, record = io.StringIO(), Full()
    progress = ProgressReport(9, line_stream=lines, bar_stream=io.StringIO())
    tracker = Tracker(0, progress, record, must_record=must_record)
    if must_record:
        with pytest.raises(RunError, match="No space left"):
            tracker.write(training(1))
        return
    for step in (1, 2, 3):
        tracker.write(training(step))
    assert record.calls == [0, 1]
    assert lines.getvalue().count("No space left") == 1


# Settings and rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"wandb_entity": "me"}, "--wandb-entity does nothing without --wandb-project"),
        ({"wandb_checkpoints": True}, "--wandb-checkpoints does nothing without --wandb-project"),
        (
            {"wandb_project": "p", "drop_uploaded_checkpoints": True},
            "--drop-uploaded-checkpoints does nothing without --wandb-checkpoints",
        ),
        ({"deterministic": True, "jsonl": False}, "--deterministic and --no-jsonl"),
    ],
)
def test_settings_that_do_nothing_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        tracking.require_sinks(complete_settings(given))


@pytest.mark.parametrize(
    ("given", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb_project": "p"}, "wandb")]
)
def test_a_package_that_is_missing_is_named(
    given: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = complete_settings(given)
    tracking.require_sinks(settings)
    for module in ("colonnade.telemetry.tracking", "colonnade.checkpoint.remote_artifacts"):
        monkeypatch.setattr(f"{module}.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=rf"the package {package}, .*pip install 'colonnade\[{package}\]'"):
        tracking.require_sinks(settings)


def test_restarts_are_starts_after_the_first_row() -> None:
    assert restarts([START, training(1), {**START, "step": 1}, {**START, "step": 1}, training(2)]) == [1]
    assert restarts([training(1), {**START, "step": 1}]) == [1]
    assert restarts([START]) == []


def test_the_screen_tells_samples_shortly_and_no_start() -> None:
    lines = io.StringIO()
    screen = ProgressReport(9, line_stream=lines, bar_stream=io.StringIO(), bar=False)
    screen.write(START)
    screen.write({"step": 4, "samples": [{"prompt": "p" * 50, "text": "a\nb" * 50}]})
    screen.update(9)
    screen.close()
    (line,) = lines.getvalue().splitlines()
    assert line.startswith("step 4/9 | sample 'ppp")
    assert len(line) < 150
