"""What is gained and lost by recomputing activations, by sharding them, and by keeping weights across micro-batches.

    python benchmarks/activation_checkpointing.py --json checkpointing.json

Forward and backward pass of four sequences; the variants of a group take turns in the same processes:

1. `none`, `selective` and `full` of `activation_checkpointing`, in one process.
2. `sequence_parallel` off and on, at tp 2.
3. Weights joined and cast for each of four micro-batches, or once for all of them, in one process.

Time is the median of the rounds' ratios; memory is the peak that torch allocates in a pass above parameters and
gradients. In float32, weights need no cast: the third group measures the cast only with `--precision bf16`, which needs
a processor with bf16 instructions.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import require_at_least_one
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

BLOCK = 256
# Name of the group: (processes, micro-batches, baseline variant, all variants).
GROUPS: dict[str, tuple[int, int, str, dict[str, dict[str, Any]]]] = {
    "checkpointing": (
        1,
        1,
        "none",
        {kind: {"activation_checkpointing": kind} for kind in ("none", "selective", "full")},
    ),
    "tp2": (2, 1, "replicated", {"replicated": {}, "sequence_parallel": {"sequence_parallel": True}}),
    "weights": (1, 4, "kept", {"kept": {}, "not_kept": {"keeps_weights": False}}),
}


def main() -> None:
    parser = OneLineParser(description="Time and memory relative to keeping everything.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="passes of each variant (5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of products (fp32)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the ratios there")
    options = parser.parse_args()
    require_at_least_one("--rounds", options.rounds)
    require_place("--json", options.json)

    from benchmarks.training_step.ranks import on_ranks
    from benchmarks.training_step.recompute import measure

    ratios: dict[str, float] = {}
    measured: dict[str, Any] = {}
    print(f"{options.precision:32}  time  memory     MiB")
    for group, (ranks, micro_batches, base, variants) in GROUPS.items():
        found = on_ranks(ranks, measure, variants, options.precision, BLOCK, micro_batches, options.rounds)
        measured[group] = found
        for name in variants:
            time = statistics.median(row[name] / row[base] for row in found["seconds"])
            memory = found["bytes"][name] / found["bytes"][base]
            print(f"{group + '/' + name:32}{time:6.2f}{memory:8.2f}{found['bytes'][name] / 2**20:8.0f}", flush=True)
            if name != base:
                ratios |= {f"{group}/{name}/time": time, f"{group}/{name}/memory": memory}
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    launch(main)
