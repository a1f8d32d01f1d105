"""Passes whose activations are kept, recomputed or sharded, for `benchmarks/activation_checkpointing.py`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.training_step.delays import timed
from benchmarks.training_step.peers import Contender
from benchmarks.training_step.ranks import step_memory
from benchmarks.training_step.work import PRECISIONS, work
from colonnade.parallel.mesh import init_parallel
from model import TensorParallelModel

# Small, so that the layers dominate time and memory, not the loss.
VOCABULARY = 4096


def measure(
    variants: dict[str, dict[str, Any]], precision: str, block: int, micro_batches: int, rounds: int
) -> dict[str, Any]:
    """Time and memory of forward and backward passes, for models that take turns in the same process. Collective.

    Args:
        variants: keyword arguments of `TensorParallelModel`, plus "keeps_weights" (default True), by name.
        micro_batches: the number into which the four sequences are split.

    Returns:
        bytes: by variant, the peak of what a pass allocates above parameters and gradients on this rank.
        seconds: for each round, the time of a pass by variant.
    """
    job = dataclasses.replace(work(VOCABULARY, precision), block=block)
    layout = init_parallel(int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    share = job.share(layout.device)

    def contender(keeps_weights: bool = True, **options: Any) -> Contender:
        own = TensorParallelModel(job.config, layout, compute_dtype=PRECISIONS[precision], **options)
        return Contender(_step(own, share, micro_batches, keeps_weights), list)

    contenders = {name: contender(**options) for name, options in variants.items()}
    for one in contenders.values():
        one.step()  # allocates the gradients
    found = {name: step_memory(one, layout.device) for name, one in contenders.items()}
    seconds: list[dict[str, float]] = []
    for number in range(rounds):
        names = list(contenders)[:: -1 if number % 2 else 1]
        seconds.append({name: timed(contenders[name].step) for name in names})
    return {"bytes": found, "seconds": seconds}


def _step(own: TensorParallelModel, share: Tensor, micro_batches: int, keeps_weights: bool) -> Callable[[], Tensor]:
    def step() -> Tensor:
        total = torch.zeros(())
        with own.weights_kept() if keeps_weights else nullcontext():
            for ids in share.chunk(micro_batches):
                loss = own(ids[:, :-1], ids[:, 1:], scale=1 / share[:, 1:].numel())
                loss.backward()
                total += loss.detach()
        return total

    return step
