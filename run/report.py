"""The line printed at a start that lists how the run differs from the checkpoint it resumes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colonnade.checkpoint.manifest import library_versions
from colonnade.data.position import DataPosition
from colonnade.optim.schedule import schedule_of
from colonnade.run_settings import RunSettings
from colonnade.telemetry.code_version import describe_code
from run.data import weight_changes
from run.inputs import arithmetic_changes
from run.state import Run

# Settings about where a run is, not what it is; changed numbers of ranks are reported separately.
_QUIET = {"tensor_parallel_size", "checkpoint_dir"}


def resume_report(
    run: Run, record: Mapping[str, Any], libraries: Mapping[str, str], actions: tuple[str, ...] = ()
) -> str:
    """One line with everything that differs from the checkpoint, as `name old -> new`, or that says nothing does.

    Args:
        record: the checkpoint's record (`run_record`); empty for a single file, which has nothing to compare with.
        libraries: library versions that the checkpoint was written with.
        actions: other changes that this start makes.
    """
    changes = [*_changes(run, record, libraries), *actions] if record else [*actions]
    return "changed since the checkpoint: " + ("; ".join(changes) if changes else "nothing")


def _changes(run: Run, record: Mapping[str, Any], libraries: Mapping[str, str]) -> list[str]:
    settings, layout = run.settings, run.layout
    # Settings that did not exist when the checkpoint was written had the effect of their defaults.
    before = RunSettings(**record["settings"])
    old, new = before.to_dict(), settings.to_dict()
    pairs: list[tuple[str, Any, Any]] = [(name, old[name], new[name]) for name in new if name not in _QUIET]
    pairs += [
        ("ranks", record["tp"] * record["dp"], layout.tp * layout.dp),
        ("tp", record["tp"], layout.tp),
        ("dp", record["dp"], layout.dp),
        ("sequences a step", record["global_batch"], run.global_batch),
        ("micro-batch", record["micro_batch_size"] or run.batch.micro_batch_size, run.batch.micro_batch_size),
        ("tokenizer backend", record["tokenizer_backend"], run.tokenizer_backend.label),
    ]
    # Compares the schedules alone; a second warm-up is reported as an action.
    rate, rate_now = (f"{schedule_of(each)(run.step):.4g}" for each in (before, settings))
    pairs.append((f"scheduled learning rate of step {run.step + 1}", rate, rate_now))
    if record["code"] is not None:
        pairs.append(("code", describe_code(record["code"]), describe_code(run.code)))
    present = library_versions()
    pairs += [(name, libraries.get(name), present.get(name)) for name in sorted({*libraries, *present})]
    lines = [f"{name} {then} -> {now}" for name, then, now in pairs if then != now]
    # These are already reported above, for every run.
    told = ("torch ", "micro_batch_size ", "overlap_collectives ", "sequence_parallel ")
    lines += [line for line in arithmetic_changes(record, settings, layout) if not line.startswith(told)]
    return lines + weight_changes(record, settings) + _data_changes(run, record)


def _data_changes(run: Run, record: Mapping[str, Any]) -> list[str]:
    """Differences of files and tokenizer from the checkpoint's, by digest; empty on ranks that do not read."""
    if run.stream is None:
        return []
    before = DataPosition.from_dict(record["data_position"])
    names = [[shard.name for shard in units.shards] for units in run.stream.units]
    head = run.stream.start.head
    return before.head.differences(
        head, {corpus.name: files for corpus, files in zip(head.corpora, names, strict=True)}
    )
