"""Inputs of the runs that get faults, and the undisturbed run they are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.launching import make_inputs
from forked_commands import start

STEPS = 24


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a deterministic run, which is bit-identical on one and on two ranks."""
    return [
        *make_inputs(tmp_path_factory.mktemp("inputs")),
        *("--deterministic", "--initial-batch-size", "4", "--tensor-slices", "2"),
        *("--total-steps", str(STEPS), "--checkpoint-interval", "6", "--fingerprint-interval", "6"),
    ]


@pytest.fixture(scope="session")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    (outcome,) = start("training", [*flags, "--checkpoint-dir", str(directory)])
    assert outcome.code == 0, outcome.errors
    return directory
