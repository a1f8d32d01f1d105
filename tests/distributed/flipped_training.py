"""`training.py` with one bit flipped in memory after the update of a step, on one rank.

Environment variables say where: FLIP_TENSOR (a parameter, or a moment: `<parameter>.exp_avg`), FLIP_RANK, FLIP_STEP.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import training
import training_utils


def flip(model: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Flip the last bit of one element in this rank's part of a parameter or moment."""
    parameters = dict(model.named_parameters())
    parameter, _, state = (name, "", "") if name in parameters else name.rpartition(".")
    tensor = optimizer.state[parameters[parameter]][state] if state else parameters[parameter]
    assert isinstance(tensor, DTensor)
    tensor.to_local().detach().view(torch.int32).view(-1)[7] ^= 1


def main() -> None:
    train_step = training_utils.train_step

    def flipping(run: Any, batch: Any, learning_rate: float) -> Any:
        outcome = train_step(run, batch, learning_rate)
        if run.step + 1 == int(os.environ["FLIP_STEP"]) and os.environ.get("RANK", "0") == os.environ["FLIP_RANK"]:
            flip(run.model, run.optimizer, os.environ["FLIP_TENSOR"])
        return outcome

    training_utils.train_step = flipping
    training.main()
