"""Metric rows, plots and the progress report against independent readings of what they wrote."""

from __future__ import annotations

import gzip
import io
import json
import math
import signal
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colonnade.errors import RunError, UsageError
from colonnade.telemetry import progress
from colonnade.telemetry.metrics import MetricsLog, read_metrics, unigram_entropy
from colonnade.telemetry.plots import plot_loss, smooth
from colonnade.telemetry.profiling import StepProfiler
from colonnade.telemetry.progress import ProgressReport, format_row

REPOSITORY = Path(__file__).resolve().parent.parent
ROW = {
    "step": 120,
    "loss": 5.125,
    "perplexity": 168.2,
    "learning_rate": 2.4e-3,
    "grad_norm": 0.71,
    "tokens_seen": 1_234_567,
    "tokens_per_second": 12_345.0,
    "model_flops_utilization": 0.412,
    "memory_gib": 1.25,
    "data_wait_fraction": 0.004,
    "epoch": 0,
}


def strict_rows(path: Path) -> list[dict[str, object]]:
    """Read as strictly as JSON asks: every line whole, and no NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = path.read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in content.splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# Metrics -------------------------------------------------------------------------------------------------------------


def test_rows_come_back_and_each_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 4):
            log.append({**ROW, "step": step})
            assert [row["step"] for row in strict_rows(path)] == list(range(1, step + 1))
    assert read_metrics(path) == [{**ROW, "step": step} for step in (1, 2, 3)]


def test_non_finite_and_numpy_values_become_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": np.int64(3), "loss": math.nan, "grad_norm": np.float32(np.inf), "parts": (1.5, -math.inf)})
        log.append({"step": 4, "loss": np.float32(0.5), "done": np.True_, "note": 'é"\n', "nested": {"a": np.nan}})
    assert strict_rows(path) == [
        {"step": 3, "loss": None, "grad_norm": None, "parts": [1.5, None]},
        {"step": 4, "loss": 0.5, "done": True, "note": 'é"\n', "nested": {"a": None}},
    ]


def test_a_row_torn_anywhere_is_not_read_and_cut_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"step": 1, "loss": 2.0}) + "\n"
    torn = json.dumps({"step": 2, "loss": 1.5})
    for length in range(1, len(torn) + 1):
        path.write_text(whole + torn[:length])
        assert [row["step"] for row in read_metrics(path)] == [1]
        with MetricsLog(path) as log:
            log.append({"step": 2, "loss": 1.25})
        assert strict_rows(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.25}]


def test_a_killed_writer_leaves_every_finished_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import itertools\nfrom colonnade.telemetry.metrics import MetricsLog\n"
        f"log = MetricsLog({str(path)!r})\n"
        "for step in itertools.count(1):\n    log.append({'step': step, 'loss': 1.0})\n"
        "    print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 200:
        pass
    writer.send_signal(signal.SIGKILL)
    printed = writer.communicate(timeout=30)[0].splitlines()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= (int(printed[-1]) if printed else 200)


def test_truncating_tells_one_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"event": "start"})
        for step in range(1, 7):
            log.append({"step": step, "loss": float(step)})
            if step % 2 == 0:
                log.append({"step": step, "validation_loss": float(step)})
        log.append({"event": "after step 6"})
        assert log.truncate_after(4) == 4
        assert log.truncate_after(4) == 0
        log.append({"step": 5, "loss": 50.0})
    rows = strict_rows(path)
    assert rows[0] == {"event": "start"}
    assert [row["step"] for row in rows[1:]] == [1, 2, 2, 3, 4, 4, 5]
    assert rows[-1] == {"step": 5, "loss": 50.0}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_to_nothing_and_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        assert log.truncate_after(0) == 0
        log.append({"step": 1})
        assert log.truncate_after(0) == 1
    assert path.read_bytes() == b""
    assert read_metrics(path) == []


def test_unreadable_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read metrics"):
        read_metrics(tmp_path / "absent.jsonl")
    path = tmp_path / "metrics.jsonl"
    for bad in ("{broken", "[1]", "\x00\x00"):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
        with pytest.raises(UsageError, match="line 2 of"):
            read_metrics(path)
    with pytest.raises(RunError, match="cannot write metrics"):
        MetricsLog(path / "below-a-file" / "metrics.jsonl")


@given(st.lists(st.integers(0, 20), min_size=1, max_size=200))
def test_unigram_entropy_is_the_counters(ids: list[int]) -> None:
    total = len(ids)
    expected = -math.fsum(count / total * math.log(count / total) for count in Counter(ids).values())
    assert unigram_entropy(np.array(ids)) == pytest.approx(expected, abs=1e-12)


def test_unigram_entropy_of_known_distributions() -> None:
    assert unigram_entropy(np.arange(1024, dtype=np.int32).reshape(32, 32)) == pytest.approx(math.log(1024))
    assert math.copysign(1, unigram_entropy(np.zeros(5, dtype=np.uint16))) == 1
    with pytest.raises(ValueError, match="no tokens"):
        unigram_entropy(np.array([], dtype=np.int32))


# Plots ---------------------------------------------------------------------------------------------------------------


def write_run(path: Path, steps: int) -> None:
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            loss = math.nan if step == steps // 2 else 3 + 6 * math.exp(-step / 20)
            log.append({"step": step, "loss": loss, "learning_rate": 1e-3 * step / steps})
            if step % 10 == 0:
                log.append({"step": step, "validation_loss": 3.1})


@pytest.mark.parametrize("steps", [1, 12, 300])
def test_plot_is_a_picture_of_its_own(steps: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    write_run(tmp_path / "metrics.jsonl", steps)
    output = tmp_path / "plots" / "loss.png"
    assert plot_loss(tmp_path / "metrics.jsonl", output, unigram_entropy=6.2)
    with_line = imread(output)
    assert min(with_line.shape[:2]) > 500
    assert plot_loss(tmp_path / "metrics.jsonl", output)
    assert not np.array_equal(imread(output), with_line)
    assert [file.name for file in output.parent.iterdir()] == ["loss.png"]


def test_plot_of_no_losses_draws_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": math.nan, "learning_rate": 0.1})
    assert not plot_loss(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=200).tolist()
    values[77] = math.nan
    smoothed = smooth(values)
    reach = 4  # 200 points / 50
    for index, value in enumerate(smoothed):
        near = min(index, reach)
        window = [v for v in values[index - near : index + near + 1] if not math.isnan(v)]
        if index == 77:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(statistics.fmean(window), abs=1e-12)
    line = [9.0 - 0.01 * step for step in range(500)]
    assert smooth(line)[:490] == pytest.approx(line[:490], abs=1e-9)  # no lag behind a falling loss


def test_drawing_leaves_pyplot_alone_and_loads_late(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", 3)
    code = (
        "import sys; from colonnade.telemetry import metrics, plots, progress;"
        "heavy = {'torch', 'matplotlib', 'numpy', 'tqdm'} & set(sys.modules);"
        f"drawn = plots.plot_loss({str(tmp_path / 'metrics.jsonl')!r}, {str(tmp_path / 'a.png')!r});"
        "print(heavy, drawn, 'matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "True", "False", "False"]


# Progress ------------------------------------------------------------------------------------------------------------


def test_a_row_reads_well() -> None:
    assert format_row(ROW, 1000) == (
        "step  120/1000 | epoch 0 | loss 5.1250 | ppl 168 | lr 2.40e-03 | grad norm 0.710 | tokens 1.23M | "
        "12.3k tok/s | MFU 41.2% | 1.25 GiB | data wait 0.4%"
    )
    assert (
        format_row({"step": 7, "validation_loss": 4.5, "loss": None, "other": 1}) == "step 7 | validation loss 4.5000"
    )
    assert format_row({"step": 7, "loss": math.nan, "perplexity": math.inf}) == "step 7 | loss nan | ppl inf"


def test_without_a_terminal_nothing_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines, bar = io.StringIO(), io.StringIO()
    with ProgressReport(1000, initial_step=200, line_stream=lines, bar_stream=bar) as report:
        for step in range(201, 1001):
            clock[0] += 0.125
            report.update(step, 2.5 if step == 300 else None)
        report.write({"step": 1000, "loss": 2.5})
        report.message("saved")
    report.close()
    assert lines.getvalue().splitlines() == ["step 1000/1000 | loss 2.5000", "saved"]
    shown = bar.getvalue()
    assert "\r" not in shown
    assert "\x1b" not in shown
    # 800 steps in 100 s: after 30, 60 and 90 s, and at the end.
    counts = [line.split("[")[0].split()[-1] for line in shown.splitlines()]
    assert counts == ["440/1000", "680/1000", "920/1000", "1000/1000"]
    assert all("loss 2.5000" in line for line in shown.splitlines())
    assert "8.00step/s" in shown.splitlines()[-1]


def test_on_a_terminal_lines_stand_above_the_bar() -> None:
    screen = Terminal()
    with ProgressReport(10, line_stream=screen, bar_stream=screen) as report:
        for step in range(1, 11):
            report.update(step, 10.0 - step)
            if step == 5:
                report.write({"step": step, "loss": 5.0})
    shown = screen.getvalue()
    row = "step  5/10 | loss 5.0000\n"
    assert row in shown
    assert shown[shown.index(row) - 1] == "\r"  # on a line the bar was wiped from
    last = shown.replace("\r", "\n").rstrip().splitlines()[-1]
    assert "10/10" in last
    assert "loss 0.0000" in last


def test_other_ranks_say_nothing() -> None:
    lines, bar = io.StringIO(), Terminal()
    with ProgressReport(10, enabled=False, line_stream=lines, bar_stream=bar) as report:
        report.update(10, 1.0)
        report.write(ROW)
        report.message("hello")
    assert lines.getvalue() == bar.getvalue() == ""


def profiled(folder: Path, told: list[str], *, first: int, count: int, steps: range, rank: int = 0) -> None:
    """A start that takes these steps, one matrix product each, with a profiler."""
    begun = StepProfiler(first, count, step=steps[0] - 1, folder=folder, rank=rank, on_cuda=False, tell=told.append)
    for step in steps:
        with begun.recorded(step):
            torch.ones(2, 2) @ torch.ones(2, 2)
        if begun.is_complete(step):
            begun.close(step)
    begun.close(steps[-1])


@pytest.mark.parametrize(
    ("first", "count", "steps", "recorded"),
    [
        (3, 2, range(1, 7), [3, 4]),
        (1, 2, range(1, 5), [1, 2]),
        (3, 1, range(3, 7), [3]),
        (3, 9, range(1, 5), [3, 4]),
        (3, 2, range(4, 7), []),
        (4, 1, range(1, 4), []),
        (0, 3, range(1, 4), []),
    ],
)
def test_a_profile_holds_the_steps_asked_for(
    first: int, count: int, steps: range, recorded: list[int], tmp_path: Path
) -> None:
    told: list[str] = []
    profiled(tmp_path / "profile", told, first=first, count=count, steps=steps)
    if not recorded:
        assert not told
        assert not (tmp_path / "profile").exists()
        return
    path = tmp_path / "profile" / f"steps_{recorded[0]}-{recorded[-1]}_rank_0.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert [event["name"] for event in events if event["name"].startswith("step ")] == [f"step {n}" for n in recorded]
    assert sum(event["name"] == "aten::mm" for event in events) == len(recorded)
    assert "aten::mm" in path.with_name(path.name.replace(".json.gz", ".txt")).read_text()
    assert told == [f"profile: {path.with_suffix('').with_suffix('.txt')} and .json.gz"]


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    told: list[str] = []
    profiled(tmp_path / "profile", told, first=1, count=1, steps=range(1, 3), rank=3)
    assert not told
    assert f"rank 3: its profile cannot be written to {tmp_path / 'profile'}" in caplog.text
    assert (tmp_path / "profile").read_text() == "in the way"


def test_a_step_that_fails_ends_its_profile(tmp_path: Path) -> None:
    begun = StepProfiler(1, 5, step=0, folder=tmp_path / "profile", rank=0, on_cuda=False, tell=lambda line: None)
    with pytest.raises(KeyError), begun.recorded(1):
        raise KeyError
    with torch.profiler.profile() as another:  # refused while one is recording
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert "aten::mm" in {event.key for event in another.key_averages()}
    begun.close(1)
    assert not (tmp_path / "profile").exists()
