"""Speed of an optimizer step: one way of training over another, both measured in the same processes.

    python benchmarks/step.py
    python benchmarks/step.py --json step.json --rounds 15

1. Start two tensor-parallel ranks (gloo on the CPU, one thread each).
2. Both ways keep their model in memory and take turns step by step, so that whatever else the machine does hits both.
3. A ratio is the median of the rounds' ratios, which forgets the rounds that something disturbed.

`deterministic_over_default` is the speed of the deterministic mode (V = 4 slices at tp 2) over that of the default one.
A step is all of it: forward and backward, norm, clip and AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RANKS, SLICES = 2, 4
# Large enough that matrix products set the pace, small enough for two cores: about 0.3 s a step in float32.
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 48,
    "max_position_embeddings": 256,
}
MICRO_BATCH, ACCUMULATION = 4, 1
PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of an optimizer step; the higher a ratio, the better.")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}} to this file')
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="steps of each way (11)")
    given = parser.parse_args()
    ratios = deterministic_over_default(given.rounds)
    for name, ratio in ratios.items():
        print(f"{name}  {ratio:.3f}")
    if given.json:
        Path(given.json).write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


def deterministic_over_default(rounds: int) -> dict[str, float]:
    """Speed of the deterministic mode over the default one, by precision, and the lower of the two."""
    ratios = {
        f"deterministic_over_default_{precision}": on_ranks(_compare_modes, precision, rounds)
        for precision in PRECISIONS
    }
    return {"deterministic_over_default": min(ratios.values()), **ratios}


def on_ranks(measure: Callable[..., float], *args: Any) -> float:
    """What rank 0 returns of `measure(*args)`, called on all ranks."""
    import torch.multiprocessing as multiprocessing

    results = multiprocessing.get_context("spawn").SimpleQueue()
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.spawn(_rank, args=(_free_port(), results, measure, args), nprocs=RANKS)
    value: float = results.get()
    return value


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(rank: int, port: int, results: Any, measure: Callable[..., float], args: tuple[Any, ...]) -> None:
    import torch

    from colonnade.parallel.mesh import shutdown_parallel

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    value = measure(*args)
    if rank == 0:
        results.put(value)
    shutdown_parallel()


def _compare_modes(precision: str, rounds: int) -> float:
    """Speed of the deterministic mode over the default one on this rank."""
    steps = {name: _stepper(precision, deterministic=name == "deterministic") for name in ("default", "deterministic")}
    for step in steps.values():
        step()  # allocates the gradients, the optimizer's state and the allocator's pools
    ratios = []
    for number in range(rounds):
        order = list(steps) if number % 2 else list(steps)[::-1]
        seconds = {name: steps[name]() for name in order}
        ratios.append(seconds["default"] / seconds["deterministic"])
    return statistics.median(ratios)


def _stepper(precision: str, *, deterministic: bool) -> Callable[[], float]:
    """A function that takes one optimizer step on all ranks and returns its seconds."""
    import torch
    import torch.distributed as dist

    from colonnade.optim.optimizer import create_adamw
    from colonnade.optim.step import optimizer_step
    from colonnade.parallel.determinism import fix_arithmetic
    from colonnade.parallel.mesh import init_parallel
    from model import ModelConfig, TensorParallelModel

    layout = init_parallel(RANKS, torch.device("cpu"))
    config = ModelConfig(**SIZES)
    model = TensorParallelModel(
        config,
        layout,
        slices=SLICES if deterministic else None,
        compute_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
    )
    optimizer = create_adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    block = config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    share = torch.randint(0, config.vocab_size, (MICRO_BATCH * ACCUMULATION, block + 1), generator=generator)

    def step() -> float:
        torch.use_deterministic_algorithms(False)
        if deterministic:
            fix_arithmetic(compiled=False)
        dist.barrier()
        begin = time.perf_counter()
        optimizer_step(
            model,
            optimizer,
            scaler,
            share,
            accumulation=ACCUMULATION,
            targets=share[:, 1:].numel(),
            max_grad_norm=1.0,
            deterministic=deterministic,
        )
        dist.barrier()
        return time.perf_counter() - begin

    return step


if __name__ == "__main__":
    main()
