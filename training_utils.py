"""What both entry points share: the loop, one optimizer step, validation, and what is logged of a step.

A `Run` is made by `run_setup`; `train` takes it to its last step. The order of a step: batch, learning rate, forward
and backward of each micro-batch, next batch staged, gradients summed and clipped, optimizer, position committed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from colonnade.data.feed import StepBatch
from colonnade.errors import LocalRunError, PeerError, RunError
from colonnade.optim.optimizer import set_learning_rate
from colonnade.optim.step import StepOutcome, optimizer_step, targets_of_step
from colonnade.parallel.mesh import set_collective_timeout
from colonnade.parallel.stopping import SAVE_FAILED, StopVote
from colonnade.parallel.watchdog import Watchdog, is_connection_lost
from colonnade.setting_values import wall_time_seconds
from colonnade.telemetry.data_ledger import data_summary
from colonnade.telemetry.fingerprint import Fingerprint, fingerprint_of, require_equal_parameters
from colonnade.telemetry.metrics import MetricsLog
from colonnade.telemetry.plots import plot_loss
from colonnade.telemetry.progress import ProgressReport
from colonnade.tuning.batch_record import record_out_of_memory
from colonnade.tuning.memory import is_out_of_memory
from run_checks import StepGuard, check_before_save
from run_measurements import Meter, validate
from run_state import HANGS_NAME, LEDGER_NAME, Run, record_end, save, whole_position

# How long a rank that must leave waits for the save that its peers' threads are still in.
SETTLE_SECONDS = 60.0
METRICS_NAME, PLOT_NAME, FINGERPRINTS_NAME = "metrics.jsonl", "loss.png", "fingerprints.jsonl"
SLOW_STORAGE = 100e6  # bytes a second that a rank writes, on a file system that many share


# ---------------------------------------------------------------------------------------------------------- the loop


def train(run: Run) -> None:
    """Train to the run's last step, or until it is asked to stop: log, validate and save on the way, and at the end.

    Raises:
        RunError: a checkpoint cannot be written, data cannot be read, memory ran out, too many steps in a row were
            skipped, or parameters are not what they should be; the last checkpoint stands.
    """
    assert run.saver is not None
    settings, total = run.settings, run.settings.total_steps
    watch = Watchdog(run.directory / HANGS_NAME, on_cuda=run.layout.device.type == "cuda")
    stopping = StopVote(watch, None if settings.wall_time is None else wall_time_seconds(settings.wall_time))
    # The first step compiles; validations and saves are many steps long.
    limit, long_limit = settings.startup_timeout, settings.startup_timeout
    first_step = run.step + 1
    save_seconds = expected_save_seconds(run)
    stop_reason: str | None = None
    progress = ProgressReport(total, initial_step=run.step, enabled=run.layout.is_main)
    metrics = _open_log(run, METRICS_NAME)
    fingerprints = None
    if settings.fingerprint_interval or settings.deterministic:
        fingerprints = _open_log(run, FINGERPRINTS_NAME)
    meter = Meter(run)
    guard = StepGuard(run, progress.message)
    saved_step = run.step if run.resumed_from is not None else -1
    for note in run.notes:
        progress.message(note)
    with watch, progress:
        while run.step < total and stop_reason is None:
            # -- one optimizer step
            watch.enter(f"reading the data of step {run.step + 1}", limit, is_step=True)
            batch = run.feed.take()
            meter.data_wait += batch.wait_seconds
            rate = run.schedule(run.step)
            watch.enter(f"step {run.step + 1}", limit, is_step=True)
            outcome = _step_or_leave(run, batch, rate, watch)

            # -- commit: from here on the step has happened, be it skipped
            run.step += 1
            run.tokens_seen += run.tokens_per_step
            before, run.position = run.position, batch.position
            guard.note(outcome, before)
            if run.step == first_step:
                limit, watch.longest_step = settings.step_timeout, 0.0
                set_collective_timeout(run.layout, limit)

            # -- stop: every rank comes to this vote after the same step
            stop_reason = stopping.reason(
                2 * watch.longest_step + max(save_seconds, run.saver.longest_save), save_failed=run.saver.has_failed
            )
            if stop_reason == SAVE_FAILED:
                run.saver.wait()

            # -- log
            is_last = run.step == total
            is_saved = is_last or stop_reason is not None or _is_due(run.step, settings.checkpoint_interval)
            with_fingerprint = _is_due(run.step, settings.fingerprint_interval or 0)
            # No drifted replica reaches a checkpoint unnoticed, and an audit can tell what it starts from.
            with_fingerprint |= is_saved and settings.deterministic
            fingerprint = None
            is_logged = run.step % settings.log_interval == 0 or is_last or with_fingerprint
            if is_logged or is_saved:
                guard.settle()
            if is_logged:
                row = meter.row(outcome, rate, batch.epoch)
                run.loss = row["loss"]
                if with_fingerprint:
                    fingerprint = take_fingerprint(run, fingerprints)
                    row |= fingerprint.columns()
                    meter.restart()
                _report(progress, metrics, row)
            progress.update(run.step, run.loss)
            # A deterministic run's fingerprint has just compared them.
            if _is_due(run.step, settings.drift_check_interval) and not (settings.deterministic and with_fingerprint):
                require_equal_parameters(run.model, run.step)
                meter.restart()

            # -- validate
            is_validated = is_last or (stop_reason is None and _is_due(run.step, settings.validation_interval))
            if run.validation is not None and is_validated:
                watch.enter(f"the validation after step {run.step}", long_limit)
                held_out = validate(run, run.validation)
                run.validation_loss = held_out["validation_loss"]
                _report(progress, metrics, {"step": run.step, **held_out, "tokens_seen": run.tokens_seen})
                meter.restart()

            # -- save
            if is_saved:
                if not is_logged:
                    run.loss = float(outcome.loss)
                watch.enter(f"saving step {run.step}", long_limit)
                check_before_save(run)
                save(run, fingerprint)
                saved_step = run.step
                meter.restart()
        watch.enter("ending the run", long_limit)
        run.saver.wait()
        if fingerprints is not None:
            fingerprints.close()
        # A run that has come to its end is complete, whatever asked it to stop meanwhile.
        finish(run, saved_step, metrics, None if run.step == total else stop_reason)
        run.saver.close()
        if run.lock is not None:
            run.lock.release()


def _open_log(run: Run, name: str) -> MetricsLog | None:
    """A log of the run, without the steps that are about to be taken again; on the rank that writes."""
    if not run.layout.is_main:
        return None
    log = MetricsLog(run.directory / name)
    log.truncate_after(run.step)
    return log


def take_fingerprint(run: Run, log: MetricsLog | None) -> Fingerprint:
    """The fingerprint of parameters and moments after this step; that of each tensor goes to `log`. Collective.

    Raises:
        RunError: in the deterministic mode, on all ranks, where copies of a tensor differ.
    """
    taken = fingerprint_of(run.model, run.optimizer)
    if run.settings.deterministic:
        taken.require_equal_copies(run.step)
    if log is not None:
        log.append({"step": run.step, **taken.columns(), "tensors": taken.tensors, "moments": taken.moments})
    return taken


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _report(progress: ProgressReport, metrics: MetricsLog | None, row: Mapping[str, Any]) -> None:
    progress.log_line(row)
    if metrics is not None:
        metrics.append(row)


def expected_save_seconds(run: Run) -> float:
    """How long the first save may take: weights and two moments in float32, shared out, on slow storage."""
    return 12 * run.model.num_parameters() / dist.get_world_size() / SLOW_STORAGE


def finish(run: Run, saved_step: int, metrics: MetricsLog | None, stop_reason: str | None) -> None:
    """Close what is open, draw the plot, and say and write down how the run ended. Collective."""
    position = whole_position(run)
    run.feed.close()
    if run.stream is not None:
        run.stream.close()
    if metrics is None:
        return
    metrics.close()
    entropy = run.validation.unigram_entropy if run.validation is not None else None
    drawn = plot_loss(run.directory / METRICS_NAME, run.directory / PLOT_NAME, unigram_entropy=entropy)
    record_end(run, stop_reason, saved_step)
    lines = [f"finished at step {run.step} after {run.tokens_seen:,} tokens"]
    if stop_reason is not None:
        lines = [f"stopped after step {run.step} of {run.settings.total_steps} ({stop_reason}); it goes on from there"]
    if position is not None:
        lines += [f"  data        {line}" for line in data_summary(position)]
    if run.validation is not None and run.validation_loss is not None:
        lines.append(
            f"  held out    {_with_perplexity(run.validation_loss)}; "
            f"knowing the token frequencies alone: {_with_perplexity(run.validation.unigram_entropy)}"
        )
    if saved_step >= 0:
        lines.append(f"  checkpoint  {run.directory / f'streaming_checkpoint_step_{saved_step}'}")
    lines.append(f"  metrics     {run.directory / METRICS_NAME}")
    if saved_step >= 0:
        lines.append(f"  data ledger {run.directory / LEDGER_NAME}")
    if drawn:
        lines.append(f"  plot        {run.directory / PLOT_NAME}")
    print("\n".join(lines))


def _with_perplexity(loss: float) -> str:
    return f"loss {loss:.4f} (perplexity {math.exp(min(loss, 700.0)):.1f})"


# ---------------------------------------------------------------------------------------------------------- one step


def train_step(run: Run, batch: StepBatch, learning_rate: float) -> StepOutcome:
    """One optimizer step on this rank's share of the global batch; its loss goes into the run's window."""
    settings = run.settings
    set_learning_rate(run.optimizer, learning_rate)
    mask = settings.document_mask
    # Blocks of documents laid end to end are full, and every one of their targets counts.
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
        skip_above=before.limit if before is not None and settings.spike_action == "skip" else None,
        # The device is busy with what was launched; the next batch can be waited for meanwhile.
        after_backward=run.feed.stage if run.step + 1 < settings.total_steps else None,
    )
    run.losses.append(outcome.loss, outcome.skipped)
    return replace(outcome, losses_before=before)


def _step_or_leave(run: Run, batch: StepBatch, learning_rate: float, watch: Watchdog) -> StepOutcome:
    """A step; where it runs out of memory, record a smaller micro-batch, tell the other ranks, and leave.

    The error cannot be mended here: the other ranks stand in a collective of this step. One that finds its peer gone
    has nothing to add to what that peer, or the launcher, says of it.
    """
    try:
        return train_step(run, batch, learning_rate)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if is_connection_lost(error):
            raise PeerError("another rank is gone") from error
        if run.saver is not None:
            run.saver.settle(SETTLE_SECONDS)
        watch.announce_failure()
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
        except RunError as problem:  # no smaller one, or no way to record it: this rank alone knows
            raise LocalRunError(str(problem)) from error
        raise LocalRunError(
            f"out of memory in step {run.step + 1} with micro-batch size {size}; {smaller} is recorded in "
            f"{run.directory}: the same command goes on from the last checkpoint with it and the same global batch"
        ) from error
