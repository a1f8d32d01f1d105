"""Settings without effect in a run: allowed, since a file of settings may serve other runs too, and reported."""

from __future__ import annotations

from colonnade.optim.shard_limits import shard_count
from colonnade.run_settings import RunSettings
from colonnade.setting_values import flag_of

# A setting, and those that do nothing without it.
_NEEDED = {
    "sample_interval": ("sample_prompts", "sample_tokens", "sample_temperature"),
    "validation_glob": ("validation_interval", "validation_chunks"),
    "spike_sigma": ("spike_window",),
    "checkpoint_interval": ("keep_every",),
    "profile_start": ("profile_steps",),
}


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


def idle_settings(settings: RunSettings) -> list[str]:
    """One line for each setting that has no effect because another is off, whatever the ranks are."""
    defaults = RunSettings()
    found = []
    for needed, names in _NEEDED.items():
        if getattr(settings, needed):
            continue
        for name in names:
            value = getattr(settings, name)
            if value != getattr(defaults, name):
                found.append(f"{flag_of(name)} {value} does nothing without {flag_of(needed)}")
    if settings.memory_limit_gib is not None and settings.deterministic:
        found.append(
            f"--memory-limit-gib {settings.memory_limit_gib:g} does nothing with --deterministic, which keeps the "
            "micro-batch"
        )
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
