"""What the tests of this folder ask of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from distributed.launching import losses


def manifest(directory: Path, step: int) -> dict[str, Any]:
    text = (directory / f"streaming_checkpoint_step_{step}" / "MANIFEST.json").read_text()
    content: dict[str, Any] = json.loads(text)
    return content


def tensors(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as torch's own converter reads them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = folder / f"{checkpoint.parent.name}_{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    content: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return content


def assert_same_end(directory: Path, undisturbed: Path, step: int, folder: Path) -> None:
    """Losses of all steps, and weights, moments and data position after the last, are those of the other run."""
    assert losses(directory) == losses(undisturbed)
    name = f"streaming_checkpoint_step_{step}"
    ours, theirs = tensors(directory / name, folder), tensors(undisturbed / name, folder)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert manifest(directory, step)["run"]["data_position"] == manifest(undisturbed, step)["run"]["data_position"]
