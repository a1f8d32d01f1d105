"""Speed of attention within documents relative to causal attention over whole blocks, on one CPU thread.

    python benchmarks/document_mask.py

1. Make the queries, keys and values of a micro-batch, and documents that begin at random places, with a given mean
   length in tokens.
2. Run the forward and backward pass of causal attention, and of each kernel of `colonnade/decoder/attention.py` that
   the CPU uses: `documents` one by one (eager) and the `masked` call (compiled graphs). They take turns.
3. A ratio is the median of the rounds' ratios; above 1 the kernel is faster than causal attention.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import require_at_least_one
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

ROWS, HEADS, HEAD_DIM = 4, 4, 64
BLOCKS, MEANS = (256, 1024, 2048), (32, 128, 512)
KERNELS: tuple[Literal["documents", "masked"], ...] = ("documents", "masked")


def main() -> None:
    parser = OneLineParser(description="Speed of attention within documents; the higher, the better.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="passes of each way (7)")
    rounds = parser.parse_args().rounds
    require_at_least_one("--rounds", rounds)
    import torch

    torch.set_num_threads(1)
    print("block size  tokens a document  documents  masked")
    for block in BLOCKS:
        for mean in MEANS:
            ratios = speed(block, mean, rounds)
            print(f"{block:10d}{mean:19d}{ratios['documents']:11.2f}{ratios['masked']:8.2f}")


def speed(block: int, mean: int, rounds: int) -> dict[str, float]:
    """Seconds of causal attention divided by those of each kernel, in float32."""
    import torch

    from colonnade.decoder.attention import attend, document_layout

    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, block, HEADS, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3))
    starts = torch.rand(ROWS, block, generator=generator) < 1 / mean
    masks: dict[str, Any] = {"causal": None}
    for kernel in KERNELS:
        masks[kernel] = document_layout(starts, kernel).mask

    def seconds(mask: Any) -> float:
        begin = time.perf_counter()
        out = attend(query, key, value, mask)
        out.backward(torch.ones_like(out))
        return time.perf_counter() - begin

    for mask in masks.values():
        seconds(mask)
    measured = [{name: seconds(mask) for name, mask in masks.items()} for _ in range(rounds)]
    return {kernel: statistics.median(row["causal"] / row[kernel] for row in measured) for kernel in KERNELS}


if __name__ == "__main__":
    launch(main)
