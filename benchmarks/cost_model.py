"""Predicted memory of a training step over what torch allocates, for one rank of several parallel layouts.

    python benchmarks/cost_model.py --json cost.json
    python benchmarks/cost_model.py --preset argonne-2b --block 4096 --micro-batch 2 --device cuda

Each parallel layout runs in its own process, with torch's fake process group in place of the other ranks. Allocated
bytes come from the profiler on the CPU, and from `torch.cuda.max_memory_allocated` on CUDA. Steps are eager, with one
and with two micro-batches. The ratio is of the totals: parameters, moments and the peak of the step above them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import counts, names, require_at_least_one
from colonnade.config import load_preset
from colonnade.errors import UsageError
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.model_config import ModelConfig
from colonnade.runtime.launch import launch

PARALLEL_CONFIGS: dict[str, dict[str, Any]] = {
    "none/tp1": {"activation_checkpointing": "none"},
    "selective/tp1": {"activation_checkpointing": "selective"},
    "full/tp1": {},
    "none/tp8": {"tp": 8, "activation_checkpointing": "none"},
    "full/tp8": {"tp": 8},
    "sequence_parallel/none/tp8": {"tp": 8, "activation_checkpointing": "none", "sequence_parallel": True},
    "sequence_parallel/full/tp8": {"tp": 8, "sequence_parallel": True},
    "overlap/full/tp8": {"tp": 8, "overlap_collectives": True},
    "zero2/full/dp8": {"dp": 8, "data_parallel_shard": "zero2"},
    "zero3/full/dp8": {"dp": 8, "data_parallel_shard": "zero3"},
    "tied/full/tp1": {"tied": True},
    "tied/zero3/full/dp8": {"tied": True, "dp": 8, "data_parallel_shard": "zero3"},
    "zero3/none/dp4/tp2": {"dp": 4, "tp": 2, "data_parallel_shard": "zero3", "activation_checkpointing": "none"},
}
SMALL = ModelConfig(
    vocab_size=8000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=4096,
)


def main() -> None:
    parser = OneLineParser(description="Predicted memory of a step over what torch allocates.")
    parser.add_argument("--preset", metavar="NAME", help="sizes of the model (a small one)")
    parser.add_argument("--vocab-size", type=int, default=151_936, metavar="N", help="where a preset has none (151936)")
    parser.add_argument("--block", type=int, default=256, metavar="T", help="tokens a sequence (256)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences at once (4)")
    parser.add_argument("--accumulations", default="1,2", metavar="N,N", help="micro-batches of a step (1,2)")
    parser.add_argument("--precisions", default="fp32,bf16", metavar="NAME,NAME", help="fp32, bf16 (both)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}, ...} to this file')
    given = parser.parse_args()

    import torch

    from benchmarks.training_step.allocated import allocated
    from benchmarks.training_step.ranks import on_ranks
    from colonnade.tuning.cost_model import ParallelConfig, step_memory

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = SMALL if given.preset is None else _preset(given.preset, given.vocab_size)
    accumulations, precisions = _checked(given, device, config)
    ratios: dict[str, float] = {}
    found: dict[str, Any] = {}
    print(f"{'micro-batches/precision/...':<38} {'predicted':>12} {'allocated':>12} {'ratio':>6}   MiB a rank")
    for count, precision, (name, options) in product(accumulations, precisions, PARALLEL_CONFIGS.items()):
        known = {key: value for key, value in options.items() if key != "tied"}
        parallel = replace(ParallelConfig(**known), precision=precision, on_cpu=device == "cpu")
        own = replace(config, tie_word_embeddings=True) if "tied" in options else config
        measured = on_ranks(1, allocated, own, parallel, given.micro_batch, given.block, count, device)
        memory = step_memory(own, parallel, given.micro_batch, given.block, count)
        row = f"{count}/{precision}/{name}"
        key = f"predicted_over_allocated/{row}"
        ratios[key] = memory.total / measured.total
        found[key] = {"predicted": memory.to_dict(), "allocated": measured.total}
        mib = f"{memory.total / 2**20:12.1f} {measured.total / 2**20:12.1f}"
        print(f"{row:<38} {mib} {ratios[key]:6.3f}", flush=True)
    if given.json:
        device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        report = {"ratios": ratios, "found": found, "device": device_name, "torch": torch.__version__}
        Path(given.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _checked(given: argparse.Namespace, device: str, config: ModelConfig) -> tuple[list[int], list[str]]:
    """The numbers of micro-batches and the precisions to measure. Raises UsageError for flags that cannot be used."""
    import torch

    require_at_least_one("--micro-batch", given.micro_batch)
    require_at_least_one("--block", given.block)
    if given.block > config.max_position_embeddings:
        raise UsageError(f"--block {given.block} is above the model's context of {config.max_position_embeddings}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU; use --device cpu")
    require_place("--json", given.json)
    accumulations = counts("--accumulations", given.accumulations)
    return accumulations, names("--precisions", given.precisions, ("fp32", "bf16"))


def _preset(name: str, vocab_size: int) -> ModelConfig:
    return ModelConfig.from_dict(load_preset(name)[0], vocab_size=vocab_size)


if __name__ == "__main__":
    launch(main)
