"""Plans as objects, for tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

import plan_run

LARGE = ("--preset", "argonne-2b", "--vocab-size", "151669")


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    plan_run.main([*flags, "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer
