"""How much of the collectives' time a training step hides behind computation: two ranks, one core each.

    python benchmarks/overlap.py --json overlap.json

Collectives on one machine take almost no time, so each gets an artificial delay: `wait` sleeps until at least that long
after the start. Passes with and without overlap, at each delay, take turns.

1. `tp`: forward and backward pass of a micro-batch at tp 2, with `overlap_collectives`. Delays are fractions of the
   time that the shorter segment (attention or feed-forward of half the micro-batch, forward) takes in the same run.

       hidden = 1 - (seconds at the delay - seconds without delay) / (collectives of a pass * delay)
       not_slept = 1 - (seconds of the delays still left when the collectives were waited for) / (the same)

   `not_slept` is robust against a machine whose speed changes between two passes.

   Two more cases: only the collectives of the head's loss are delayed; and all are delayed without overlap, where the
   computation of weight gradients hides part of them.
2. `tp/sequence_parallel`: the same with `sequence_parallel`.
3. `dp`: backward pass at dp 2 with the all-reduces of its gradients, started during it (`OverlappedSum`) or after it.
   They run one after the other and together take a fraction of the backward pass's time.

A reported fraction is the median over the rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import names, require_at_least_one
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

RANKS = 2
DELAYS = (0.25, 0.5, 1.0)
LINK_SHARES = (0.25, 0.5)
CASES = ("tp", "tp/sequence_parallel", "dp")


def main() -> None:
    parser = OneLineParser(description="Share of the collectives' time that is hidden; the higher, the better.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="passes of each kind (7)")
    parser.add_argument("--only", default=",".join(CASES), metavar="CASES", help=f"of {','.join(CASES)} (all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the shares and seconds there")
    options = parser.parse_args()
    require_at_least_one("--rounds", options.rounds)
    require_place("--json", options.json)
    chosen = names("--only", options.only, CASES)

    from benchmarks.training_step.delays import measure_data_parallel, measure_tensor_parallel
    from benchmarks.training_step.ranks import on_ranks

    ratios: dict[str, float] = {}
    measured: dict[str, Any] = {}
    for case in chosen:
        if case == "dp":
            found = on_ranks(RANKS, measure_data_parallel, LINK_SHARES, options.rounds)
            own = data_parallel_shares(found)
        else:
            is_sharded = case == "tp/sequence_parallel"
            found = on_ranks(RANKS, measure_tensor_parallel, DELAYS, options.rounds, is_sharded)
            own = tensor_parallel_shares(found)
        prefix = "" if case == "tp" else f"{case}/"
        ratios |= {f"{prefix}{name}": share for name, share in own.items()}
        measured[case] = found
        report(case, found, own)
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios, "measured": measured}, indent=1) + "\n")


def shares_of(rounds: list[dict[str, tuple[float, float]]], name: str, delayed: float) -> dict[str, float]:
    """The fractions of `delayed` seconds by which a pass did not get longer, and that were not spent asleep."""
    way, fraction = name.split("/", 1)
    suffix = fraction if way == "overlap" else f"{fraction}/without_overlap"
    hidden = statistics.median(1 - (row[name][0] - row[f"{way}/0"][0]) / delayed for row in rounds)
    not_slept = statistics.median(1 - row[name][1] / delayed for row in rounds)
    return {f"hidden/{suffix}": hidden, f"not_slept/{suffix}": not_slept}


def tensor_parallel_shares(found: dict[str, Any]) -> dict[str, float]:
    """Hidden fractions by delay; at the largest delay also those of the head's collectives, and without overlap."""
    shares: dict[str, float] = {}
    for name, started in found["started"].items():
        _, fraction, *place = name.split("/")
        count = sum(started[one] for one in (place or started))
        if float(fraction):
            shares |= shares_of(found["rounds"], name, count * float(fraction) * found["delay"])
    return shares


def data_parallel_shares(found: dict[str, Any]) -> dict[str, float]:
    """Hidden fractions, by the fraction of the backward pass's time that the all-reduces take."""
    shares: dict[str, float] = {}
    for name in found["rounds"][0]:
        if fraction := float(name.split("/")[1]):
            shares |= shares_of(found["rounds"], name, fraction * found["backward"])
    return shares


def report(case: str, found: dict[str, Any], shares: dict[str, float]) -> None:
    medians = {name: statistics.median(row[name][0] for row in found["rounds"]) for name in found["rounds"][0]}
    print(f"{case}: " + "  ".join(f"{name} {value:.3f} s" for name, value in medians.items()))
    for name in ("segments", "backward"):
        if name in found:
            print(f"  {name}: {json.dumps(found[name])}")
    for name, share in shares.items():
        print(f"  {name:34}{share:6.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    launch(main)
