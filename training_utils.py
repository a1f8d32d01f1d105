"""What the entry points share: the training loop, a single step, and the end of a run.

`run.start` creates a `Run`; `train` trains it to its last step. The order within a step: batch, learning rate, forward
and backward pass of each micro-batch, next batch staged, gradients summed and clipped, optimizer step, position
committed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch.distributed as dist

from colonnade.data.feed import StepBatch
from colonnade.errors import ColonnadeError, LocalRunError, PeerError, RunError
from colonnade.optim.optimizer import set_learning_rate
from colonnade.optim.step import StepOutcome, optimizer_step, targets_of_step
from colonnade.parallel.mesh import set_collective_timeout
from colonnade.runtime.stopping import SAVE_FAILED, StopVote
from colonnade.runtime.vote import on_first_rank, one_line, vote
from colonnade.runtime.watchdog import Watchdog, is_connection_lost
from colonnade.setting_values import wall_time_seconds
from colonnade.telemetry.fingerprint import Fingerprint, fingerprint_of, require_equal_parameters
from colonnade.telemetry.metrics import MetricsLog, read_metrics
from colonnade.telemetry.profiling import StepProfiler
from colonnade.telemetry.progress import ProgressReport
from colonnade.telemetry.report import METRICS_NAME
from colonnade.telemetry.sinks import Tracker
from colonnade.telemetry.tracking import open_tracker
from colonnade.tuning.batch_record import record_out_of_memory
from colonnade.tuning.memory import is_out_of_memory
from run.checks import StepGuard, check_before_save
from run.end import finish, forget_end
from run.measurements import Meter, start_row, validate
from run.samples import sampled_tokens, samples_are_due, samples_row
from run.state import HANGS_NAME, Run, save

# How long a rank that must exit waits for a save that its peers' threads are still taking part in.
SETTLE_SECONDS = 60.0
# How long a failed run waits for its sinks to close.
FAILED_CLOSE_SECONDS = 5.0
FINGERPRINTS_NAME, PROFILE_NAME = "fingerprints.jsonl", "profile"
SLOW_STORAGE = 100e6  # bytes per second that one rank writes to a slow shared file system


# ---------------------------------------------------------------------------------------------------------- the loop


def train(run: Run) -> None:
    """Train to the run's last step, or until it is asked to stop; log, validate and save on the way and at the end.

    Raises:
        RunError: a checkpoint cannot be written, data cannot be read, memory ran out, too many steps in a row were
            skipped, or parameters are not finite or differ between ranks; the last checkpoint stays valid.
    """
    loop = _Loop(run)
    try:
        with loop.watch, loop.progress:
            loop.make_up()
            while run.step < run.settings.total_steps and loop.stop_reason is None:
                with loop.profiler.recorded(run.step + 1):
                    step = loop.take_step()
                loop.commit(step)
                loop.vote()
                loop.decide_on_saving()
                fingerprint = loop.log(step)
                # Before anything that is not needed for going on, and may fail or take long.
                loop.save(fingerprint)
                loop.profile()
                loop.validate()
                loop.sample()
            loop.end()
    except ColonnadeError as error:
        loop.leave(error)
        raise
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        problem = loop.explained(error)
        loop.leave(problem)
        if problem is error:
            raise
        raise problem from error


@dataclass(frozen=True)
class _Step:
    """A step that was taken: its batch, its learning rate and its outcome."""

    batch: StepBatch
    learning_rate: float
    outcome: StepOutcome


class _Loop:
    """The phases of each step, in the order in which `train` calls them, and the state they share."""

    def __init__(self, run: Run) -> None:
        settings = run.settings
        self.run, self.settings = run, settings
        self.watch = Watchdog(run.directory / HANGS_NAME, on_cuda=run.layout.device.type == "cuda")
        set_collective_timeout(run.model.layout, settings.startup_timeout)  # on the CPU, expires after the watchdog
        self.progress = ProgressReport(
            settings.total_steps, initial_step=run.step, enabled=run.layout.is_main, bar=settings.progress_bar
        )
        self.stop_reason: str | None = None
        self._stopping = StopVote(
            self.watch, None if settings.wall_time is None else wall_time_seconds(settings.wall_time)
        )
        self._first_step, self._longest_step = run.step + 1, 0.0
        self._longest_validation = self._longest_sampling = 0.0
        self._voted_at: float | None = None
        self._elsewhere = 0.0  # seconds since that vote that no step took: validating, sampling, saving
        self._is_saved = self._owes_save = False
        self._meter = Meter(run)
        self._guard = StepGuard(run, self.progress.message)
        self._saved_step = run.step if run.resumed_from is not None else -1
        for note in run.notes:
            self.progress.message(note)
        self.profiler = _profiler(run, self.progress)
        with vote():
            has_fingerprints = settings.fingerprint_interval or settings.deterministic
            self._fingerprints = _open_log(run, FINGERPRINTS_NAME) if has_fingerprints else None
            self.tracker = _open_tracker(run, self.progress)
        self.tracker.write(start_row(run))

    def take_step(self) -> _Step:
        run = self.run
        # The first step compiles: it gets the startup limit, and its duration does not predict that of the others.
        is_first = run.step + 1 == self._first_step
        limit = self.settings.startup_timeout if is_first else self.settings.step_timeout
        self.watch.enter(f"reading the data of step {run.step + 1}", limit, is_step=True, is_first=is_first)
        batch = run.feed.take()
        self._meter.data_wait += batch.wait_seconds
        learning_rate = run.schedule(run.step)
        self.watch.enter(f"step {run.step + 1}", limit, is_step=True, is_first=is_first)
        step = _Step(batch, learning_rate, _train_or_tell(run, batch, learning_rate))
        if is_first:
            # The record of an earlier end (stopped or complete) no longer holds: the run has moved on.
            if run.layout.is_main:
                forget_end(run.directory)
            set_collective_timeout(run.model.layout, self.settings.step_timeout)
        return step

    def commit(self, step: _Step) -> None:
        """Count the step, even if it was skipped, and advance the data position."""
        run = self.run
        run.step += 1
        run.tokens_seen += run.tokens_per_step
        before, run.position = run.position, step.batch.position
        self._guard.note(step.outcome, before)

    def vote(self) -> None:
        """All ranks vote after the same step: whether to stop, and whether a save has failed."""
        saver, now = self.run.saver, time.monotonic()
        assert saver is not None
        # From vote to vote, because the host launches a step long before the device has taken it; not the first one.
        if self._voted_at is not None:
            self._longest_step = max(self._longest_step, now - self._voted_at - self._elsewhere)
        self._voted_at, self._elsewhere = now, 0.0
        # In async mode, an earlier save may still be in progress when the last one is due.
        saves = 2 if self.settings.checkpoint_mode == "async" else 1
        reserve = 2 * self._longest_step + saves * max(_expected_save_seconds(self.run), saver.longest_save)
        if _is_due(self.run.step, self.settings.validation_interval):
            reserve += self._longest_validation
        if samples_are_due(self.run.step, self.settings.sample_interval):
            reserve += self._longest_sampling
        self.stop_reason = self._stopping.reason(reserve, save_failed=saver.has_failed)
        if self.stop_reason == SAVE_FAILED:
            saver.wait()

    def decide_on_saving(self) -> None:
        """Decide whether to save this step. A save that is due at a skipped step waits until a step has been taken.

        After skipped steps the parameters are those from before the first of them, and may be what makes the steps bad:
        such a checkpoint would become the newest, and the last good one could be pruned.
        """
        self._owes_save |= _is_due(self.run.step, self.settings.checkpoint_interval)
        must = self._is_last or self.stop_reason is not None
        if self._owes_save or must:
            self._guard.settle()
        self._is_saved = must or (self._owes_save and self.run.skipped_in_row == 0)
        self._owes_save &= not self._is_saved

    def log(self, step: _Step) -> Fingerprint | None:
        """Log the step's metrics if they are due, with a fingerprint if one is due; return that fingerprint."""
        run, settings = self.run, self.settings
        with_fingerprint = _is_due(run.step, settings.fingerprint_interval or 0)
        # So that no drifted replica reaches a checkpoint unnoticed, and an audit can verify its starting point.
        with_fingerprint |= self._is_saved and settings.deterministic
        is_logged = _is_due(run.step, settings.log_interval) or self._is_last or with_fingerprint
        fingerprint = None
        if is_logged or self._is_saved:
            self._guard.settle()
        if is_logged:
            row = self._meter.row(step.outcome, step.learning_rate, step.batch.epoch)
            if with_fingerprint:
                fingerprint = self._take_fingerprint()
                row |= fingerprint.columns()
                self._meter.restart()
            run.loss = row["loss"]
            self.tracker.write(row)
        elif self._is_saved:
            run.loss = float(step.outcome.loss)
        self.progress.update(run.step, run.loss)
        # In a deterministic run, the fingerprint has just compared all copies.
        if _is_due(run.step, settings.drift_check_interval) and not (settings.deterministic and with_fingerprint):
            require_equal_parameters(run.model, run.step)
            self._meter.restart()
        return fingerprint

    def _take_fingerprint(self) -> Fingerprint:
        """Fingerprint parameters and moments after this step; write that of each tensor to the log. Collective.

        Raises:
            RunError: in the deterministic mode: on all ranks, if copies of a tensor differ; on the first one, if the
                log cannot be written. Otherwise the run goes on without the log.
        """
        run = self.run
        taken = fingerprint_of(run.model, run.optimizer)
        if self.settings.deterministic:
            taken.require_equal_copies(run.step)
        if self._fingerprints is not None:
            row = {"step": run.step, **taken.columns(), "tensors": taken.tensors, "moments": taken.moments}
            try:
                self._fingerprints.append(row)
            except RunError as error:
                if self.settings.deterministic:
                    raise
                self.progress.message(f"warning: {error}; the run goes on without it")
                self._fingerprints = None
        return taken

    def profile(self) -> None:
        """Write the profile after its last step; where the run is about to stop, only at its end."""
        if self.stop_reason is None and self.profiler.is_complete(self.run.step):
            self.watch.enter(f"writing the profile after step {self.run.step}", self.settings.startup_timeout)
            began = time.monotonic()
            self.profiler.close(self.run.step)
            self._leave_out(began)
            self._meter.restart()

    def validate(self) -> None:
        run = self.run
        is_due = self._is_last or (self.stop_reason is None and _is_due(run.step, self.settings.validation_interval))
        if is_due:
            self._validate()

    def _validate(self) -> None:
        run = self.run
        if run.validation is None:
            return
        self.watch.enter(f"the validation after step {run.step}", self.settings.startup_timeout)
        began = time.monotonic()
        held_out = validate(run, run.validation)
        self._longest_validation = max(self._longest_validation, self._leave_out(began))
        run.validation_loss = held_out["validation_loss"]
        self.tracker.write({"step": run.step, **held_out, "tokens_seen": run.tokens_seen})
        self._meter.restart()

    def sample(self) -> None:
        """Generate samples of the model's text, if they are due."""
        is_due = samples_are_due(self.run.step, self.settings.sample_interval) and self.stop_reason is None
        if is_due or self._is_last:
            self._sample()

    def _sample(self) -> None:
        run, settings = self.run, self.settings
        if run.sample_prompts is None:
            return
        self.watch.enter(f"the samples after step {run.step}", settings.startup_timeout)
        began = time.monotonic()
        rows = sampled_tokens(run.model, run.sample_prompts, settings)
        if run.tokenizer is not None:
            self.tracker.write({"step": run.step, "samples": samples_row(run.sample_prompts, rows, run.tokenizer)})
        self._longest_sampling = max(self._longest_sampling, self._leave_out(began))
        self._meter.restart()

    def make_up(self) -> None:
        """Take the validation and the samples that were due at the step this start goes on from and are missing.

        A stop after that step leaves no time for them, and a run that was interrupted in one of them has no row of it.
        """
        run, settings = self.run, self.settings
        if run.step == 0 or run.resumed_from is None or run.resumed_from.parent != run.directory or not settings.jsonl:
            return
        validates = self._is_last or _is_due(run.step, settings.validation_interval)
        samples = self._is_last or samples_are_due(run.step, settings.sample_interval)
        if not (validates or samples):
            return
        rows = on_first_rank(lambda: read_metrics(run.directory / METRICS_NAME))
        taken = {key for row in rows if row.get("step") == run.step for key in row}
        if validates and "validation_loss" not in taken:
            self._validate()
        if samples and "samples" not in taken:
            self._sample()

    def _leave_out(self, began: float) -> float:
        """The seconds since `began`, which are no part of a step's."""
        seconds = time.monotonic() - began
        self._elsewhere += seconds
        return seconds

    def save(self, fingerprint: Fingerprint | None) -> None:
        run = self.run
        if not self._is_saved:
            return
        self.watch.enter(f"saving step {run.step}", self.settings.startup_timeout)
        began = time.monotonic()
        check_before_save(run)
        save(run, fingerprint)
        self._leave_out(began)
        self._saved_step = run.step
        self._meter.restart()

    def end(self) -> None:
        run = self.run
        assert run.saver is not None
        self.watch.enter("ending the run", self.settings.startup_timeout)
        run.saver.wait()
        self.profiler.close(run.step)
        if self._fingerprints is not None:
            self._fingerprints.close()
        # A run that has taken its last step is complete, even if it was asked to stop meanwhile.
        reason = None if self._is_last else self.stop_reason
        finish(run, self._saved_step, self.tracker, reason, self.progress.message)
        run.saver.close()
        if run.lock is not None:
            run.lock.release()

    def explained(self, error: RuntimeError | MemoryError) -> BaseException:
        """What to raise for an error of a phase: where it is a bug in a step, the error itself, with its traceback."""
        phase = self.watch.phase
        if is_out_of_memory(error):  # first, as NCCL may be what found no memory
            return LocalRunError(
                f"out of memory in {phase.what}; the last checkpoint stands: go on from it with a smaller micro-batch "
                "(--initial-batch-size, and more --gradient-accumulation-steps), or fewer and shorter samples"
            )
        if is_connection_lost(error):
            return PeerError("another rank is gone")
        if phase.is_step:
            return error
        return LocalRunError(f"{phase.what} failed ({one_line(error)}); the last checkpoint stands")

    def leave(self, error: BaseException) -> None:
        """End what is under way before `error` ends this rank; tell the other ranks if they cannot know of it.

        They may be blocked in a collective that this rank will never reach. One that finds its peer gone tells nobody:
        it has nothing to add to what that peer, or the launcher, reports, and may interrupt the report of a third.
        """
        # A save in progress is of an earlier step and may become the last good checkpoint: let it finish. If a peer is
        # gone it cannot.
        if self.run.saver is not None and not isinstance(error, PeerError):
            self.run.saver.settle(SETTLE_SECONDS)
        if isinstance(error, LocalRunError) or not isinstance(error, ColonnadeError):
            self.watch.announce_failure()
        self.tracker.close(FAILED_CLOSE_SECONDS, failed=True)

    @property
    def _is_last(self) -> bool:
        return self.run.step == self.settings.total_steps


def _expected_save_seconds(run: Run) -> float:
    """How long the first save may take: weights and two moments in float32, split over ranks, on slow storage."""
    return 12 * run.model.num_parameters() / dist.get_world_size() / SLOW_STORAGE


def _profiler(run: Run, progress: ProgressReport) -> StepProfiler:
    return StepProfiler(
        run.settings.profile_start,
        run.settings.profile_steps,
        step=run.step,
        folder=run.directory / PROFILE_NAME,
        rank=dist.get_rank(),
        on_cuda=run.layout.device.type == "cuda",
        tell=progress.message,
    )


def _open_tracker(run: Run, progress: ProgressReport) -> Tracker:
    """The run's sinks on the main rank; a tracker without sinks on the others."""
    if not run.layout.is_main:
        return Tracker(run.step, progress, None)
    entropy = run.validation.unigram_entropy if run.validation is not None else None
    tracker, run.uploads = open_tracker(
        run.settings, run.step, progress, retention=run.retention, unigram_entropy=entropy
    )
    return tracker


def _open_log(run: Run, name: str) -> MetricsLog | None:
    """A log of the run on the main rank, without the steps that are about to be repeated; None on other ranks."""
    if not run.layout.is_main:
        return None
    log = MetricsLog(run.directory / name)
    log.truncate_after(run.step)
    return log


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


# ---------------------------------------------------------------------------------------------------------- one step


def train_step(run: Run, batch: StepBatch, learning_rate: float) -> StepOutcome:
    """One optimizer step on this rank's share of the global batch; appends its loss to the run's loss window."""
    settings = run.settings
    set_learning_rate(run.optimizer, learning_rate)
    mask = settings.document_mask
    # Without a document mask, blocks of concatenated documents are full and all their targets count.
    varies = mask or settings.packing != "concat"
    before = run.losses.statistics(settings.spike_sigma) if settings.spike_sigma > 0 else None
    outcome = optimizer_step(
        run.model,
        run.optimizer,
        run.scaler,
        batch.tokens,
        accumulation=run.batch.gradient_accumulation_steps,
        targets=targets_of_step(batch.host_tokens, run.layout, document_mask=mask) if varies else run.tokens_per_step,
        max_grad_norm=settings.max_grad_norm,
        document_mask=mask,
        deterministic=settings.deterministic,
        plain=settings.plain_step,
        skip_above=before.limit if before is not None and settings.spike_action == "skip" else None,
        # While the device is busy with the launched kernels, the host can wait for the next batch.
        after_backward=run.feed.stage if run.step + 1 < settings.total_steps else None,
    )
    run.losses.append(outcome.loss, outcome.skipped)
    return replace(outcome, losses_before=before)


def _train_or_tell(run: Run, batch: StepBatch, learning_rate: float) -> StepOutcome:
    """Take a step. If it runs out of memory, record a smaller micro-batch and raise LocalRunError.

    The deterministic mode records nothing, because its micro-batch is fixed. This rank cannot recover, because the
    other ranks are blocked in a collective of this step.
    """
    try:
        return train_step(run, batch, learning_rate)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        if run.settings.deterministic:
            raise LocalRunError(
                f"out of memory in step {run.step + 1} with micro-batch size {run.batch.micro_batch_size}, which "
                "--deterministic keeps: go on from the last checkpoint with a larger --tensor-parallel-size"
            ) from error
        key, size = run.batch.plan.key_fields(run.batch_depends_on), run.batch.micro_batch_size
        try:
            smaller = record_out_of_memory(run.directory, key, size, run.batch.plan.candidates)
        except RunError as problem:  # no smaller size, or it cannot be recorded; only this rank knows
            raise LocalRunError(str(problem)) from error
        raise LocalRunError(
            f"out of memory in step {run.step + 1} with micro-batch size {size}; {smaller} is recorded in "
            f"{run.directory}: the same command uses it, with the same global batch, and goes on from the last "
            "checkpoint if there is one"
        ) from error
