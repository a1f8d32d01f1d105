"""Helpers to run commands with faults and to examine the resulting runs."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from distributed.launching import ROOT, command, finish, losses, start


def manifest(directory: Path, step: int) -> dict[str, Any]:
    text = (directory / f"streaming_checkpoint_step_{step}" / "MANIFEST.json").read_text()
    content: dict[str, Any] = json.loads(text)
    return content


def tensors(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, in full, as read by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = folder / f"{checkpoint.parent.name}_{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    content: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return content


def assert_same_end(directory: Path, undisturbed: Path, step: int, folder: Path) -> None:
    """Assert that all losses, and final weights, moments and data position, are bit-identical to the other run's."""
    assert losses(directory) == losses(undisturbed)
    name = f"streaming_checkpoint_step_{step}"
    ours, theirs = tensors(directory / name, folder), tensors(undisturbed / name, folder)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert manifest(directory, step)["run"]["data_position"] == manifest(undisturbed, step)["run"]["data_position"]


def restarting(script: str, fault: str, flags: list[str], folder: Path) -> str:
    """Run a script with an injected fault, under torchrun with one restart; return its output."""
    driver = folder / "driver.py"
    driver.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            import {script}
            from colonnade.runtime.launch import launch
            from faults import inject
            inject.{fault}()
            launch({script}.main)
            """
        )
    )
    line = command(str(driver), flags, 2)
    line.insert(line.index("--standalone") + 1, "--max-restarts=1")
    return finish(start(str(driver), [], command_line=line))
