"""The stored answers: what finds them again, what does not, and files that are damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from colonnade.errors import RunError
from colonnade.tuning.batch_record import (
    RECORD_NAME,
    Trial,
    micro_batch_candidates,
    record_out_of_memory,
    store_answer,
    stored_answer,
)

FIELDS = {"device": "NVIDIA H200", "memory": 150_000_000_000, "model": {"hidden_size": 64, "layers": 2}, "tp": 2}


@pytest.mark.parametrize("chunks", [1, 2, 7, 36, 97, 480, 1024])
def test_candidates_are_the_divisors(chunks: int) -> None:
    divisors = [size for size in range(1, chunks + 1) if chunks % size == 0]
    assert micro_batch_candidates(chunks) == divisors
    assert micro_batch_candidates(chunks, at_most=10) == [size for size in divisors if size <= 10]


def test_candidates_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        micro_batch_candidates(0)


def test_an_answer_is_found_by_the_same_fields_only(tmp_path: Path) -> None:
    assert stored_answer(tmp_path, FIELDS) is None
    store_answer(tmp_path / "new", FIELDS, 6, [Trial(6, True, 0.5), Trial(8, False, None)])
    assert stored_answer(tmp_path / "new", dict(reversed(FIELDS.items()))) == 6
    for name in FIELDS:
        assert stored_answer(tmp_path / "new", {**FIELDS, name: "other"}) is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == [RECORD_NAME]  # nothing left over from writing

    (entry,) = json.loads((tmp_path / "new" / RECORD_NAME).read_text())["answers"].values()
    assert entry["depends_on"] == FIELDS
    assert entry["trials"][1] == {"size": 8, "fits": False, "seconds": None}


def test_answers_for_several_settings_live_side_by_side(tmp_path: Path) -> None:
    for tp in (1, 2, 4):
        store_answer(tmp_path, {**FIELDS, "tp": tp}, 10 * tp)
    assert [stored_answer(tmp_path, {**FIELDS, "tp": tp}) for tp in (1, 2, 4)] == [10, 20, 40]


def test_a_value_json_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        store_answer(tmp_path, {"device": object()}, 1)


def test_an_out_of_memory_bound_lasts(tmp_path: Path) -> None:
    candidates = [1, 2, 4, 8, 16]
    store_answer(tmp_path, FIELDS, 8)
    assert record_out_of_memory(tmp_path, FIELDS, 8, candidates) == 4
    assert record_out_of_memory(tmp_path, FIELDS, 8, candidates) == 4  # a second rank with the same failure
    assert stored_answer(tmp_path, FIELDS) == 4
    assert record_out_of_memory(tmp_path, FIELDS, 4, candidates) == 2
    assert record_out_of_memory(tmp_path, FIELDS, 16, candidates) == 2  # a late report does not raise it
    store_answer(tmp_path, FIELDS, 16)
    assert stored_answer(tmp_path, FIELDS) == 2
    with pytest.raises(RunError, match="no smaller one exists"):
        record_out_of_memory(tmp_path, FIELDS, 1, candidates)
    assert stored_answer(tmp_path, {**FIELDS, "tp": 1}) is None


def test_a_bound_without_an_answer_is_the_answer(tmp_path: Path) -> None:
    record_out_of_memory(tmp_path, FIELDS, 12, [1, 2, 3, 4, 6, 12])
    assert stored_answer(tmp_path, FIELDS) == 6


@pytest.mark.parametrize(
    "content",
    [b"", b'{"version": 1, "ans', b"\xff\xfe\x00", b"[]", b'{"version": 99, "answers": {}}', b'{"version": 1}'],
)
def test_damaged_records_are_ignored_with_one_line(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RECORD_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert stored_answer(tmp_path, FIELDS) is None
    assert len(caplog.records) == 1
    assert RECORD_NAME in caplog.records[0].getMessage()
    assert "\n" not in caplog.records[0].getMessage()
    store_answer(tmp_path, FIELDS, 3)
    assert stored_answer(tmp_path, FIELDS) == 3


@pytest.mark.parametrize("entry", [None, 4, {}, {"size": 0}, {"size": "4"}, {"size": True}, {"size": 4, "at_most": -1}])
def test_an_entry_without_a_valid_size_is_ignored(
    tmp_path: Path, entry: object, caplog: pytest.LogCaptureFixture
) -> None:
    store_answer(tmp_path, FIELDS, 4)
    store_answer(tmp_path, {"other": 1}, 5)
    content = json.loads((tmp_path / RECORD_NAME).read_text())
    key = next(key for key, value in content["answers"].items() if value["depends_on"] == FIELDS)
    content["answers"][key] = entry
    (tmp_path / RECORD_NAME).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert stored_answer(tmp_path, FIELDS) is None
    assert len(caplog.records) == 1
    assert stored_answer(tmp_path, {"other": 1}) == 5
