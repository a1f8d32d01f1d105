"""Everything that is decided before step one: ranks, inputs, the model, the batch, and the state to start from.

`start_run` serves `training.py`: a fresh run, or exactly where its newest checkpoint stands. `resume_run` serves
`resume_pretrain_tensor.py`: a checkpoint, with settings changed. `replay_run` serves `audit_run.py`: a deterministic
run as it once stood. All end in a `run.state.Run`.

Bad input is found before the first step, and where it can be before anything is built (`inputs`, `folder`,
`batch_sizes`). Each check runs on one rank or on all, and its outcome is shared (`colonnade.parallel.vote`), so that
all ranks leave together.
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
from colonnade.parallel.determinism import halving_sizes
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from colonnade.parallel.stopping import launchers
from colonnade.parallel.vote import on_first_rank, vote
from colonnade.run_settings import RunSettings
from colonnade.telemetry.tracking import require_sinks
from run.assembly import assemble
from run.batch_sizes import batch_of_resumed, fixed_micro_batch
from run.data import resolve_data, weight_changes
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

# ------------------------------------------------------------------------------------------------ the ways in


def start_run(given: Mapping[str, Any]) -> Run | None:
    """A fresh run, or the one in the checkpoint folder exactly where its newest checkpoint stands.

    Args:
        given: settings by name, as `parse_training` returns them.

    Returns:
        None where the folder's run is finished: one line has said so, and nothing is read or written.

    Raises:
        UsageError: input that cannot work, or the folder holds a run with other settings.
    """
    layout = _join_ranks(given)
    notes: list[str] = []
    settings = resolve_device_settings(with_preset(given, layout, notes), layout, notes)
    with _folder_of(settings) as lock:
        return _start(settings, layout, notes, lock)


@contextmanager
def _folder_of(settings: RunSettings) -> Iterator[RunLock]:
    """The run's folder, locked for the block where it exists, and given back where the block fails. Collective."""
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
    # Not before the run is known to be this one: what lies in another's folder is not ours to clear away.
    if on_first_rank(lambda: clear_leftovers(lock)):
        found, damaged = newest_checkpoint(lock.directory, settings)
        record = check()
    if found is None:
        return assemble(settings, config, layout, notes, Origin(), lock)
    step = found.step or 0
    if step >= settings.total_steps:
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
    )
    return assemble(settings, config, layout, notes, origin, lock)


def resume_run(resume: ResumeSettings, given: Mapping[str, Any]) -> Run | None:
    """The run of a checkpoint, its settings overridden by those given.

    Returns:
        None where the run is finished and was to go on exactly: one line has said so.

    Raises:
        UsageError: no usable checkpoint, or settings that cannot work with it.
    """
    if is_artifact(resume.checkpoint_path):
        # What was downloaded is nobody's run: this one gets a folder of its own.
        given = {"checkpoint_dir": RunSettings().checkpoint_dir, **given}
    layout = _join_ranks(given, resume)
    notes: list[str] = []
    resume, found, damaged = _checkpoint_meant(resume, given)
    with vote():
        record = run_record(found)
        if not record and resume.keep_optimizer:
            raise UsageError(f"--keep-optimizer: {found.path} holds no optimizer state; leave the flag out")
        own = {**record.get("settings", {}), "checkpoint_dir": str(folder_of_resumed(resume, None))}
        own["tensor_parallel_size"] = None  # as many ranks as this launch has, unless it says otherwise
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
    """The checkpoint to resume from, its record, and the damaged ones that were passed over."""

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
    """Before anything is known but the settings given: a checkpoint's own come too late for this."""
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
    """The deterministic run of a folder as it stood at its newest checkpoint up to step `first`, or at its beginning.

    Nothing is written. The settings are those under which the steps up to `last` were trained, as the next checkpoint
    says; `data_glob` and `tokenizer_path` say where the run's data are now, if they have moved. What was restored is
    not compared with its fingerprint.

    Raises:
        UsageError: the run is not deterministic, was changed in this stretch, needs another machine or other ranks, or
            has no complete checkpoint; or the data are not those it was trained on.
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
            data_parallel_replicate_size=1,  # whatever the run had: on these ranks the least memory
            checkpoint_dir=str(directory),
            validation_glob=None,
            cuda_graphs=False,  # the same kernels, on a machine that may have no graphs, or parameters shared out
            trust_remote_code=trust_remote_code,
            **{name: value for name, value in moved.items() if value is not None},
        )
        _require_replayable(directory, begin, record, settings, layout)
    settings = resolve_device_settings(settings, layout, notes)
    settings = on_first_rank(lambda: resolve_data(settings, notes))
    config = on_first_rank(lambda: model_of_record(told_by.path, record))
    with vote():
        check_sizes(settings, config, layout)
    path = None if start is None else start.path
    # Other data are refused here, in an audit's own words, and from the beginning too, where there is no position.
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
    """Refuse a stretch of a run, from step `begin` on, that does not have the same bits on these ranks."""
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
    """The first checkpoint of a run from step `last` on, else the newest."""
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
