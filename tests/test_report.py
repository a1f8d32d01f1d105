"""The report page: what it holds, against the rows it was made from, read as HTML and SVG by others."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colonnade.errors import UsageError
from colonnade.telemetry import pictures, report
from colonnade.telemetry.charts import MOST_POINTS, Curve, chart, thinned

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=y>"


def write_run(
    folder: Path, steps: int, *, scale: float = 1.0, mixture: bool = False, restart: int | None = None
) -> Path:
    folder.mkdir()
    start = {"step": 0, "started": True, "tp": 4, "dp": 2, "device": HOSTILE, "parameters": 1234567, "code": "0.1 (ab)"}
    rows: list[dict[str, Any]] = [{**start, "time": "2026-11-20T10:00:00.000+00:00"}]
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "loss": scale * 10 / step, "grad_norm": 1.0, "learning_rate": 1e-4 * step}
        row |= {"tokens_per_second": 1e5 + step, "model_flops_utilization": 0.4 if mixture else None}
        if mixture:
            row |= {f"data_share/{HOSTILE}": 0.75, "data_share/code": 0.25}
        rows.append(row)
        if step == restart:
            rows.append({**start, "step": step, "dp": 1, "time": "2026-11-20T11:00:00.000+00:00"})
    rows.append({"step": steps, "validation_loss": scale * 2.5})
    rows.append({"step": steps, "samples": [{"prompt": HOSTILE, "text": "if a < b & c:\n\treturn"}]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text by tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data.strip())


def made(tmp_path: Path, *runs: Path) -> tuple[str, Page]:
    output = tmp_path / "page.html"
    report.write_report(runs, output)
    html = output.read_text(encoding="utf-8")
    return html, Page(html)


def test_a_run_has_its_facts_charts_and_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<b", 100, mixture=True, restart=40)
    (run / "STOPPED.json").write_text(json.dumps({"step": 100, "reason": "SIGTERM"}))
    _, page = made(tmp_path, run)
    assert page.texts["h1"] == ["a<b"]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["parameters"] == "1,234,567"
    assert facts["ranks"] == f"4 (tp 4 × dp 1) on {HOSTILE}"
    assert facts["state"] == "stopped at step 100 (SIGTERM)"
    assert facts["started"] == "2026-11-20 10:00:00 UTC"
    assert facts["restarts at steps"] == "40"
    assert facts["validation loss"] == f"2.5000 (perplexity {math.exp(2.5):.4g})"
    assert page.texts["h3"] == [
        *("Loss (nats a token)", "Loss from step 50 on", "Learning rate", "Gradient norm", "Tokens a second"),
        *("Utilisation (model FLOPs / peak)", "Data: share of the tokens so far"),
    ]
    assert [tag for tag, _ in page.tags].count("svg") == 7
    assert page.texts["b"] == [HOSTILE]
    assert "if a < b & c:" in page.texts["blockquote"][-1]


def test_nothing_of_a_run_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    html, page = made(tmp_path, write_run(tmp_path / "a", 60, mixture=True))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import|https?://", html)


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 100, restart=40)
    (tmp_path / "other").mkdir()
    second = write_run(tmp_path / "other" / "a", 50, scale=2.0)
    html, page = made(tmp_path, first, second)
    assert page.texts["h1"] == ["a (1) · a (2)"]
    entries = [text for text in page.texts["li"] if text]
    assert entries[:5] == [
        *(
            "a (1): training, smoothed",
            "a (1): validation",
            "a (2): training, smoothed",
            "a (2): validation",
            "restart",
        ),
    ]
    losses = html[html.index("<svg") : html.index("</svg>")]
    assert {int(number) for number in re.findall(r"--curve-(\d)", losses)} == {0, 1}
    cells = page.texts["td"]
    assert cells[2:4] == ["1,234,567", "1,234,567"]


def test_a_curve_goes_through_its_points() -> None:
    steps, values = [1, 4, 9, 20], [3.0, math.nan, 2.0, 5.5]
    svg = ET.fromstring(chart([Curve(steps, values, 3)], [(10, None)]).replace("<svg", f'<svg xmlns="{SVG[1:-1]}"', 1))
    lines = {
        re.search(r"stroke: ([^;]+)", path.get("style") or "")[1]: path.get("d")  # type: ignore[index]
        for path in svg.iter(f"{SVG}path")
        if "stroke: " in (path.get("style") or "")
    }
    path = lines["var(--curve-3)"]
    assert path is not None
    drawn = np.array([(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)])
    # The point that is not finite leaves a gap: two pieces.
    assert len(drawn) == 3
    x, y = drawn.T
    seen = np.array([1, 9, 20]), np.array([3.0, 2.0, 5.5])
    for places, meant in zip((x, y), seen, strict=True):
        slope, start = np.polyfit(meant, places, 1)
        assert places == pytest.approx(start + slope * meant, abs=0.01)
    assert svg.get("viewBox") == "0 0 400 215"
    assert svg.get("width") is None


def test_many_points_keep_their_ends() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[1234], values[40_000], values[7] = 99.0, -99.0, math.nan
    steps, kept = thinned(range(50_000), values.tolist())
    assert len(steps) <= MOST_POINTS
    assert steps == sorted(steps)
    assert max(kept) == 99.0
    assert min(kept) == -99.0
    assert [values[step] for step in steps] == kept
    assert thinned([1, 2], [math.nan, 1.0])[0] == [1, 2]
    assert all(math.isnan(value) for value in thinned(range(5000), [math.nan] * 5000)[1])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", 3)
    report.main([str(run)])
    assert (run / "report.html").exists()
    report.main([str(run / "metrics.jsonl"), str(run), "--output", "both.html"])
    assert capsys.readouterr().out.split() == [str(run / "report.html"), "both.html"]
    (tmp_path / "empty").mkdir()
    for wrong in ([str(tmp_path / "empty")], [str(tmp_path / "absent")]):
        with pytest.raises(UsageError, match=r"holds no metrics\.jsonl"):
            report.main(wrong)
    with pytest.raises(UsageError, match="the following arguments are required: RUN"):
        report.main([])


def test_a_run_without_rows_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    _, page = made(tmp_path, tmp_path / "run")
    assert "No step has been logged yet." in page.texts["p"]


def test_the_page_is_there_while_the_run_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 3)
    drawn = pictures.Pictures(run, unigram_entropy=None)
    drawn.write({"step": 3, "validation_loss": 2.0})  # the last one is not five minutes old
    drawn.close(failed=True)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setattr(pictures, "REPORT_SECONDS", 0.0)
    drawn.write({"step": 3, "loss": 2.0})
    assert not (run / "report.html").exists()
    drawn.write({"step": 3, "validation_loss": 2.0})
    assert Page((run / "report.html").read_text()).texts["h1"] == ["run"]
    drawn.close(failed=False)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
