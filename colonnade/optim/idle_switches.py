"""Switches without effect on the ranks of a run: allowed, since the next run may have other ranks, and reported."""

from __future__ import annotations

from colonnade.optim.shard_limits import shard_count
from colonnade.run_settings import RunSettings


def idle_switches(settings: RunSettings, tp: int, dp: int, micro_batch: int) -> list[str]:
    """One line for each switch that has no effect at tp x dp ranks, with the reason."""
    found = []
    if settings.data_parallel_shard != "none" and shard_count(settings, dp) == 1:
        found.append(_nothing_to_share(settings, tp, dp))
    # With a fixed order of sums, one rank computes in halves and shares too, to give the same bits as many.
    if tp == 1 and not settings.deterministic and settings.tensor_slices is None:
        if settings.sequence_parallel:
            found.append("--sequence-parallel changes nothing at tp 1: there is no rank to divide the tokens with")
        if settings.overlap_collectives:
            found.append("--overlap-collectives changes nothing at tp 1: there is no rank to wait for")
        if settings.replicate_embeddings:
            found.append("--replicate-embeddings changes nothing at tp 1: one rank holds them whole anyway")
    elif settings.overlap_collectives and micro_batch == 1:
        found.append("--overlap-collectives changes nothing at a micro-batch of one sequence, which has no halves")
    return found


def _nothing_to_share(settings: RunSettings, tp: int, dp: int) -> str:
    if dp > 1:
        advice = f"a --data-parallel-replicate-size below {settings.data_parallel_replicate_size} makes larger ones"
    elif tp > 1:
        advice = "a smaller --tensor-parallel-size, or more ranks, would leave some"
    else:
        advice = "it takes more ranks"
    return (
        f"--data-parallel-shard {settings.data_parallel_shard} has nothing to share out: at tp {tp} x dp {dp} each "
        f"group is one data-parallel rank; {advice}"
    )
