"""`training.py` with a fault in chosen steps.

Environment variables select it: POISON_STEPS (comma-separated, counted from 1), POISON_KIND, and POISON_RANK for a
fault on one rank only. Kinds:

- gradient: the rank's gradient of the final norm gets a NaN.
- loss: all ranks' losses are multiplied by POISON_FACTOR.
- parameter: after the update, POISON_ADD is added to one element of POISON_TENSOR on the rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor import DTensor

import training
import training_utils


@contextmanager
def poisoned(run: Any, kind: str) -> Iterator[None]:
    """Inject the fault into the model during the block."""
    if kind == "gradient":

        def spoil(parameter: Any) -> None:
            parameter.grad.to_local()[3] = float("nan")

        handle = run.model.model.norm.weight.register_post_accumulate_grad_hook(spoil)
        yield
        handle.remove()
    elif kind == "loss":
        forward, factor = run.model.forward, float(os.environ["POISON_FACTOR"])
        run.model.forward = lambda *arguments, **named: forward(*arguments, **named) * factor
        yield
        run.model.forward = forward
    else:
        yield
        parameter = dict(run.model.named_parameters())[os.environ["POISON_TENSOR"]]
        assert isinstance(parameter, DTensor)
        parameter.to_local().detach().view(-1)[7] += float(os.environ["POISON_ADD"])


def main() -> None:
    train_step, kind = training_utils.train_step, os.environ["POISON_KIND"]
    steps = {int(step) for step in os.environ["POISON_STEPS"].split(",")}
    is_here = os.environ.get("POISON_RANK", rank := os.environ.get("RANK", "0")) == rank

    def poisoning(run: Any, batch: Any, learning_rate: float) -> Any:
        if run.step + 1 not in steps or not is_here:
            return train_step(run, batch, learning_rate)
        with poisoned(run, kind):
            return train_step(run, batch, learning_rate)

    training_utils.train_step = poisoning
    training.main()
