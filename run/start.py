"""Everything that happens before the first step: ranks, inputs, model, batch, and the state to start from.

`start_run` is for `training.py`: it starts a fresh run, or resumes its newest checkpoint exactly. `resume_run` is for
`resume_pretrain_tensor.py`: it resumes a checkpoint with changed settings. `replay_run` is for `audit_run.py`: it
restores an earlier state of a deterministic run. Each returns a `run.state.Run`.

Invalid input is detected before the first step and, where possible, before anything is built (`inputs`, `folder`,
`batch_sizes`). Each check runs on one rank or on all, and its outcome is shared (`colonnade.runtime.vote`), so that
all ranks exit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colonnade.checkpoint.discover import CheckpointInfo, find_checkpoints, run_folder_of
from colonnade.checkpoint.remote_artifacts import FOLDER_NAME, is_artifact
from colonnade.checkpoint.run_lock import RunLock
from colonnade.checkpoint.run_record import run_record
from colonnade.checkpoint.verify import newest_verified, verified
from colonnade.command_settings import ResumeSettings
from colonnade.config import check_contradictions, override
from colonnade.data.position import DataPosition
from colonnade.errors import ColonnadeError, UsageError
from colonnade.optim.shard_limits import fewest_replicas
from colonnade.parallel.determinism import halving_sizes
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from colonnade.run_settings import RunSettings
from colonnade.runtime.stopping import launchers
from colonnade.runtime.vote import on_first_rank, vote
from colonnade.telemetry.tracking import require_sinks
from run.assembly import assemble
from run.batch_sizes import batch_of_resumed, fixed_micro_batch
from run.data import resolve_data, weight_changes
from run.end import is_complete
from run.folder import (
    clear_leftovers,
    folder_of_resumed,
    newest_checkpoint,
    require_no_other_run,
    require_outside_checkpoints,
    require_own_model,
    require_steps_left,
    require_writable,
    saved_since_launch,
    with_own_settings,
)
from run.inputs import (
    arithmetic_changes,
    check_sizes,
    model_of_record,
    require_same_run,
    resolve_device_settings,
    resolve_model,
    resolve_model_settings,
    with_preset,
)
from run.model import Origin
from run.state import HANGS_NAME, Run

# ------------------------------------------------------------------------------------------------ entry points


def start_run(given: Mapping[str, Any]) -> Run | None:
    """Start a fresh run, or resume the run in the checkpoint folder exactly from its newest checkpoint.

    Args:
        given: settings by name, as `parse_training` returns them.

    Returns:
        None if the run in the folder is finished: a line says so, and nothing is trained or written.

    Raises:
        UsageError: the input is invalid, or the folder holds a run with other settings.
    """
    notes: list[str] = []
    given = with_own_settings(given, notes)
    layout = _join_ranks(given)
    settings = resolve_device_settings(with_preset(given, layout, notes), layout, notes)
    with _folder_of(settings) as lock:
        return _start(settings, layout, notes, lock)


@contextmanager
def _folder_of(settings: RunSettings) -> Iterator[RunLock]:
    """Check the run's folder and, if it exists, lock it; unlock it if the block raises. Collective."""
    directory = Path(settings.checkpoint_dir)
    lock = RunLock(directory)
    on_first_rank(lambda: require_outside_checkpoints(directory))
    on_first_rank(lambda: require_writable(directory))
    on_first_rank(lambda: require_sinks(settings))
    on_first_rank(lock.take)
    try:
        yield lock
    except ColonnadeError:
        lock.release()
        raise


def _start(settings: RunSettings, layout: ParallelLayout, notes: list[str], lock: RunLock) -> Run | None:
    found, damaged = newest_checkpoint(lock.directory, settings)
    if found is None:
        fixed_micro_batch(settings, {})
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: resolve_model(settings))
    settings = resolve_model_settings(settings, config)

    def check() -> Mapping[str, Any]:
        with vote():
            check_sizes(settings, config, layout)
            return {} if found is None else require_same_run(found, settings, config, layout)

    record = check()
    # Only once the run in the folder is known to be this one: leftovers of another run are not ours to delete.
    if on_first_rank(lambda: clear_leftovers(lock)):
        found, damaged = newest_checkpoint(lock.directory, settings)
        record = check()
    if found is None:
        if settings.init_from is not None:
            notes.append(f"weights from {settings.init_from}")
        return assemble(settings, config, layout, notes, Origin(), lock)
    step = found.step or 0
    owes_end = step == settings.total_steps and not on_first_rank(lambda: is_complete(lock.directory))
    if step >= settings.total_steps and not owes_end:
        _say_finished(found, settings, layout)
        lock.release()
        return None
    notes.append(f"going on from {found.path} (step {step}), exactly as it stopped")
    origin = Origin(
        found.path,
        record,
        step,
        keep_optimizer=True,
        global_batch=record["global_batch"],
        libraries=found.manifest.libraries if found.manifest is not None else {},
        damaged=damaged,
        owes_end=owes_end,
    )
    return assemble(settings, config, layout, notes, origin, lock)


def resume_run(resume: ResumeSettings, given: Mapping[str, Any]) -> Run | None:
    """Resume the run of a checkpoint, with the given settings overriding its own.

    Returns:
        None if the run is finished and was to be resumed exactly (--keep-optimizer): a line says so.

    Raises:
        UsageError: there is no usable checkpoint, or the settings do not work with it.
    """
    if is_artifact(resume.checkpoint_path):
        # A downloaded checkpoint does not lie in a run's folder, so this run gets a folder of its own.
        given = {"checkpoint_dir": RunSettings().checkpoint_dir, **given}
    layout = _join_ranks(given, resume)
    notes: list[str] = []
    resume, found, damaged = _checkpoint_meant(resume, given)
    with vote():
        record = run_record(found)
        if not record and resume.keep_optimizer:
            raise UsageError(f"--keep-optimizer: {found.path} holds no optimizer state; leave the flag out")
        own = {**record.get("settings", {}), "checkpoint_dir": str(folder_of_resumed(resume, None))}
        own["tensor_parallel_size"] = None  # all ranks of this launch, unless given
        if record:
            require_own_model(found.path, own, given)
            settings = check_contradictions(RunSettings(**override(own, given)))
            trained_by = RunSettings(**own).optimizer
            if resume.keep_optimizer and settings.optimizer != trained_by:
                raise UsageError(
                    f"--keep-optimizer: {found.path} holds the state of {trained_by}, which --optimizer "
                    f"{settings.optimizer} has no use for; leave out one of them"
                )
        else:
            settings = with_preset(override(own, given), layout, notes)
    settings = resolve_device_settings(settings, layout, notes)
    if found.step == settings.total_steps and resume.keep_optimizer:
        _say_finished(found, settings, layout)
        return None
    with vote():
        require_steps_left(found.path, found.step or 0, settings)
    with _folder_of(settings) as lock:
        return _resume(resume, given, settings, layout, notes, _Chosen(found, record, damaged), lock)


def _checkpoint_meant(
    resume: ResumeSettings, given: Mapping[str, Any]
) -> tuple[ResumeSettings, CheckpointInfo, tuple[Path, ...]]:
    """The checkpoint to resume from, how to, and the damaged ones that were passed over. Collective.

    In a later attempt of the same launch that is what an earlier one has saved, and nothing is reset again.
    """
    compare_hashes = given.get("checkpoint_hash", True)
    directory = folder_of_resumed(resume, given.get("checkpoint_dir"))
    names = launchers()
    began = on_first_rank(lambda: saved_since_launch(directory, names))
    if began is not None:
        newest, passed_over = newest_verified(directory, compare_hashes=compare_hashes)
        if newest is not None and (newest.step or 0) > began:
            again = replace(resume, checkpoint_path=str(directory), keep_optimizer=True, rewarmup_steps=0)
            return again, newest, tuple(item.path for item in passed_over)
    beside = directory.absolute().parent / FOLDER_NAME
    return resume, *verified(Path(resume.checkpoint_path), compare_hashes=compare_hashes, downloads=beside)


@dataclass(frozen=True)
class _Chosen:
    """The checkpoint to resume from, its record, and the damaged checkpoints that were skipped."""

    found: CheckpointInfo
    record: Mapping[str, Any]
    damaged: tuple[Path, ...]


def _resume(
    resume: ResumeSettings,
    given: Mapping[str, Any],
    settings: RunSettings,
    layout: ParallelLayout,
    notes: list[str],
    chosen: _Chosen,
    lock: RunLock,
) -> Run:
    found, record = chosen.found, chosen.record

    def require_own_folder() -> None:
        require_no_other_run(found, lock.directory, chosen.damaged)

    on_first_rank(require_own_folder)
    if on_first_rank(lambda: clear_leftovers(lock)):
        on_first_rank(require_own_folder)
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: model_of_record(found.path, record) if record else resolve_model(settings))
    settings = resolve_model_settings(settings, config)
    with vote():
        check_sizes(settings, config, layout)
        global_batch = batch_of_resumed(record, settings, given, layout)
    notes.append(f"resuming from {found.path}" + (f" (step {found.step})" if found.step is not None else ""))
    actions = []
    if not resume.keep_optimizer:
        actions.append(f"optimizer state reset; learning rate warmed up again over {resume.rewarmup_steps} steps")
    if not record:
        actions.append("weights only: the data starts from its beginning")
    exact = (
        resume.keep_optimizer
        and settings.identity() == RunSettings(**record["settings"]).identity()
        and global_batch == record["global_batch"]
        and not arithmetic_changes(record, settings, layout)
        and not weight_changes(record, settings)
    )
    origin = Origin(
        found.path,
        record,
        found.step or 0,
        keep_optimizer=resume.keep_optimizer,
        rewarmup_steps=resume.rewarmup_steps,
        global_batch=global_batch,
        began_at=None if exact else found.step or 0,
        allow_data_change=resume.allow_data_change,
        libraries=found.manifest.libraries if found.manifest is not None else {},
        actions=tuple(actions),
        damaged=chosen.damaged,
    )
    return assemble(settings, config, layout, notes, origin, lock)


def _join_ranks(given: Mapping[str, Any], resume: ResumeSettings | None = None) -> ParallelLayout:
    """Set up the process group. Uses the given settings only; a checkpoint's settings are not known yet."""
    defaults = RunSettings(**given)
    folder = Path(defaults.checkpoint_dir)
    if resume is not None:
        folder = folder_of_resumed(resume, given.get("checkpoint_dir"))
    return init_parallel(
        defaults.tensor_parallel_size, timeout=defaults.startup_timeout, trace_folder=folder / HANGS_NAME
    )


def replay_run(
    layout: ParallelLayout,
    directory: Path,
    first: int,
    last: int,
    *,
    data_glob: str | None = None,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Restore a folder's deterministic run from its newest checkpoint at or before step `first`, or its initial state.

    Nothing is written. The settings are those under which the steps up to `last` were trained, as recorded by the
    first checkpoint from `last` on (else the newest). `data_glob` and `tokenizer_path` are the current locations of the
    run's data and tokenizer, if they have moved. The restored tensors are not compared with their fingerprint here.

    Raises:
        UsageError: the run is not deterministic, was changed within these steps, needs another machine or other numbers
            of ranks, or has no complete checkpoint; or the data is not what it was trained on.
    """
    told_by = on_first_rank(lambda: _checkpoint_from(directory, last))
    start, _ = newest_verified(directory, up_to=first)
    begin = 0 if start is None else start.step or 0
    notes: list[str] = []
    with vote():
        own = run_record(start) if start is not None else {}
        record = run_record(told_by)
        moved = {"data_glob": data_glob, "tokenizer_path": tokenizer_path}
        settings = RunSettings(**record["settings"]).replace(
            tensor_parallel_size=layout.tp,
            data_parallel_replicate_size=1,  # settled below for these ranks, whatever the run had
            checkpoint_dir=str(directory),
            validation_glob=None,
            data_lanes=DataPosition.from_dict(record["data_position"]).head.lanes,  # not today's default
            cuda_graphs=False,  # same kernels; graphs may be unavailable here, or not work with sharded parameters
            trust_remote_code=trust_remote_code,
            **{name: value for name, value in moved.items() if value is not None},
        )
        _require_replayable(directory, begin, record, settings, layout)
    settings = resolve_device_settings(settings, layout, notes)
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: model_of_record(told_by.path, record))
    settings = settings.replace(data_parallel_replicate_size=fewest_replicas(settings, config, layout))
    with vote():
        check_sizes(settings, config, layout)
    path = None if start is None else start.path
    # Changed data is rejected below, with a message for audits; that also covers a start without a data position.
    origin = Origin(path, own, begin, keep_optimizer=True, global_batch=record["global_batch"], allow_data_change=True)
    run = assemble(settings, config, layout, notes, origin, None)
    with vote():
        if run.stream is not None:
            differences = DataPosition.from_dict(record["data_position"]).head.differences(run.stream.start.head)
            if differences:
                raise UsageError(f"--data-glob or --tokenizer-path: not the run's data: {'; '.join(differences)}")
    return run


def _require_replayable(
    directory: Path, begin: int, record: Mapping[str, Any], settings: RunSettings, layout: ParallelLayout
) -> None:
    """Raise UsageError if the run's steps after `begin` cannot be bit-identical on these ranks."""
    if not settings.deterministic:
        raise UsageError(f"--run {directory} was not trained with --deterministic: its bits depend on its ranks")
    _require_workable_ranks(record, settings, layout)
    changed = arithmetic_changes(record, settings, layout) + weight_changes(record, settings)
    if changed:
        raise UsageError(f"--run {directory} cannot be audited here, where other bits are right: {'; '.join(changed)}")
    if begin <= record["began_at"] and record["began_at"] > 0:
        raise UsageError(
            f"--run {directory} was changed with resume_pretrain_tensor.py at step {record['began_at']}: audit it up "
            "to that step, or from a later checkpoint on"
        )


def _require_workable_ranks(record: Mapping[str, Any], settings: RunSettings, layout: ParallelLayout) -> None:
    tensor_sizes = halving_sizes(settings.tensor_slices or 1)
    data_sizes = halving_sizes(record["global_batch"] // (fixed_micro_batch(settings, record) or 1))
    if layout.tp not in tensor_sizes or layout.dp not in data_sizes:
        counts = sorted({tensor * data for tensor in tensor_sizes for data in data_sizes})
        raise UsageError(
            f"{layout.tp} tensor-parallel x {layout.dp} data-parallel ranks cannot take this run's steps; numbers of "
            f"ranks that can: {', '.join(map(str, counts))}, with --tensor-parallel-size one of "
            f"{', '.join(map(str, tensor_sizes))} and {', '.join(map(str, data_sizes))} times as many ranks"
        )


def _checkpoint_from(directory: Path, last: int) -> CheckpointInfo:
    """The run's first checkpoint at or after step `last`, otherwise its newest."""
    found = [info for info in find_checkpoints(directory) if info.manifest is not None]
    if not found:
        raise UsageError(f"--run {directory} holds no complete checkpoint; give a run's folder")
    later = [info for info in found if (info.step or 0) >= last]
    return later[-1] if later else found[0]


def _say_finished(found: CheckpointInfo, settings: RunSettings, layout: ParallelLayout) -> None:
    if layout.is_main:
        folder = run_folder_of(found.path)
        print(
            f"{found.path} is at the last of {settings.total_steps} steps: the run is finished, nothing was changed; "
            f"resume_pretrain_tensor.py --checkpoint-path {folder} --total-steps N trains it for longer"
        )
