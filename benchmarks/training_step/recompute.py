"""Passes whose activations are kept, computed again or shared out, for `benchmarks/activation_checkpointing.py`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.training_step.delays import timed
from benchmarks.training_step.peers import Contender
from benchmarks.training_step.ranks import step_memory
from benchmarks.training_step.work import PRECISIONS, work
from colonnade.parallel.mesh import init_parallel
from model import TensorParallelModel

# Small, so that the layers set time and memory and not the loss.
VOCABULARY = 4096


def measure(
    variants: dict[str, dict[str, Any]], precision: str, block: int, micro_batches: int, rounds: int
) -> dict[str, Any]:
    """Time and memory of forward and backward passes of models that take turns in one process. Collective.

    Args:
        variants: keyword arguments of `TensorParallelModel`, and "keeps_weights" (True).
        micro_batches: into which the four sequences are cut.

    Returns:
        bytes: the most that a pass allocates above parameters and gradients on this rank, by variant.
        seconds: of a pass by variant, of each round.
    """
    job = dataclasses.replace(work(VOCABULARY, precision), block=block)
    layout = init_parallel(int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    share = job.share(layout.device)

    def contender(keeps_weights: bool = True, **options: Any) -> Contender:
        own = TensorParallelModel(job.config, layout, compute_dtype=PRECISIONS[precision], **options)
        return Contender(_step(own, share, micro_batches, keeps_weights), list)

    contenders = {name: contender(**options) for name, options in variants.items()}
    for one in contenders.values():
        one.step()  # gradients are there from now on
    found = {name: step_memory(one, layout.device) for name, one in contenders.items()}
    seconds: list[dict[str, float]] = []
    for number in range(rounds):
        names = list(contenders)[:: -1 if number % 2 else 1]
        seconds.append({name: timed(contenders[name].step) for name in names})
    return {"bytes": found, "seconds": seconds}


def _step(own: TensorParallelModel, share: Tensor, micro_batches: int, keeps_weights: bool) -> Callable[[], Tensor]:
    def passes() -> Tensor:
        total = torch.zeros(())
        for ids in share.chunk(micro_batches):
            loss = own(ids[:, :-1], ids[:, 1:], scale=1 / share[:, 1:].numel())
            loss.backward()
            total += loss.detach()
        return total

    def step() -> Tensor:
        if not keeps_weights:
            return passes()
        with own.weights_kept():
            return passes()

    return step
