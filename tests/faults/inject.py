"""Faults to inject into a command before it starts (`forked_commands.begin(prepare=...)`).

The variable `RANK` tells a fault which rank it is on.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from typing import Any


def is_rank(number: int) -> bool:
    return os.environ.get("RANK", "0") == str(number)


def at_step(step: int, fault: Any) -> None:
    """Call `fault` just before optimizer step `step` is taken."""
    import training_utils

    train_step = training_utils.train_step

    def failing(run: Any, batch: Any, learning_rate: float) -> Any:
        if run.step + 1 == step:
            fault()
        return train_step(run, batch, learning_rate)

    training_utils.train_step = failing


def rank_1_reads_for_ever() -> None:
    """Rank 1 hangs while waiting for the data of step 5."""
    from colonnade.data.feed import BatchFeed

    take = BatchFeed.take
    calls: list[int] = []

    def hanging(feed: Any) -> Any:
        calls.append(1)
        if len(calls) == 5 and is_rank(1):
            time.sleep(600)
        return take(feed)

    BatchFeed.take = hanging  # type: ignore[assignment,method-assign]


def reads_for_ever_at_the_end() -> None:
    """The thread that reads ahead of step 24, the last one, never comes back from its file."""
    from colonnade.data import prefetch
    from colonnade.data.lane import Lane

    prefetch._JOIN_SECONDS = 0.5
    next_block = Lane.next_block
    calls: list[int] = []

    def for_ever() -> Any:
        time.sleep(600)
        yield

    def hanging(lane: Any) -> Any:
        calls.append(1)
        if len(calls) > 24 * 4 + 2:
            lane._source = for_ever()
            next(lane._source)
        return next_block(lane)

    Lane.next_block = hanging  # type: ignore[assignment,method-assign]


def short_grace() -> None:
    from colonnade.runtime import watchdog

    watchdog.STOP_GRACE_SECONDS = 1.0


def step_3_for_ever() -> None:
    at_step(3, lambda: time.sleep(600))


def rank_1_has_no_time() -> None:
    """On rank 1, the launch appears to be an hour earlier."""
    from colonnade.runtime import stopping

    launched_at = stopping.launched_at
    stopping.launched_at = lambda: launched_at() - (3600 if is_rank(1) else 0)


def hangups_are_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def first_attempt_dies_in_step_15() -> None:
    """Under torchrun, rank 1 of the first attempt is killed just before step 15."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and is_rank(1):
        at_step(15, lambda: os.kill(os.getpid(), signal.SIGKILL))


def first_attempt_aborts_at_its_exit() -> None:
    """Under torchrun, rank 1 of the first attempt finishes the run, but aborts instead of exiting with 0."""
    from colonnade.runtime import launch

    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and is_rank(1):
        leave_group = launch._leave_group

        def aborting() -> None:
            leave_group()
            os.abort()

        launch._leave_group = aborting


def step_9_for_ever() -> None:
    at_step(9, lambda: time.sleep(600))


def rank_1_has_no_room_at_step_12() -> None:
    """From step 12 on, the system lets rank 1 write no file larger than 4 KiB."""
    if is_rank(1):
        at_step(12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))


def rank_1_has_no_room_at_the_end() -> None:
    """The same, from the last step on."""
    if is_rank(1):
        at_step(24, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))


def nothing_can_be_pruned() -> None:
    from colonnade.checkpoint import prune

    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    prune.move_aside = refuse


def room_for_a_ledger_beside_two_checkpoints() -> None:
    """The disk is full while there are three checkpoints, and for the second ledger in any case."""
    from colonnade.telemetry import data_ledger

    replace_file = data_ledger.replace_file
    calls: list[int] = []

    def full(path: Any, content: Any) -> None:
        calls.append(1)
        if len(calls) == 2 or len(list(path.parent.glob("streaming_checkpoint_step_*"))) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace_file(path, content)

    data_ledger.replace_file = full


def _die_at(owner: Any, name: str, rank: int, call: int) -> None:
    """Make a rank send itself SIGKILL at its `call`-th call of `owner.name`."""
    real = getattr(owner, name)
    calls: list[int] = []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call and is_rank(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def dies_in_the_middle_of_a_shard() -> None:
    """Rank 1 dies in the second save, at its 100th write."""
    from colonnade.checkpoint import hashing, save

    write_data = save.CommittingWriter.write_data
    saves: list[int] = []

    def counting(*args: Any) -> Any:
        saves.append(1)
        if len(saves) == 2:
            _die_at(hashing.HashedFile, "write", rank=1, call=100)
        return write_data(*args)

    save.CommittingWriter.write_data = counting  # type: ignore[assignment,method-assign]


def dies_before_the_metadata() -> None:
    from colonnade.checkpoint import save

    _die_at(save.CommittingWriter, "finish", rank=0, call=2)


def dies_before_the_manifest() -> None:
    from colonnade.checkpoint import save

    _die_at(save, "write_manifest", rank=0, call=2)


def dies_before_the_rename() -> None:
    from colonnade.checkpoint import save

    _die_at(save, "commit", rank=0, call=2)


def dies_in_the_middle_of_a_prune() -> None:
    """Dies after deleting only one file of the checkpoint being pruned."""
    from colonnade.checkpoint import prune

    def dying(path: Any, *args: Any, **kwargs: Any) -> None:
        next(path.glob("*.distcp")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    prune.shutil.rmtree = dying  # type: ignore[assignment]


def first_step_takes_long() -> None:
    """As with compilation: longer than the grace period that a stop gives a later step."""
    short_grace()
    at_step(1, lambda: time.sleep(6))


def rank_1_runs_out_of_memory() -> None:
    """In the fourth forward pass of more than two sequences, while rank 0 waits in the layer's all-reduce."""
    import torch

    from model import TensorParallelModel

    forward = TensorParallelModel.forward
    calls: list[int] = []

    def failing(model: Any, input_ids: Any, *others: Any, **options: Any) -> Any:
        if model.group.communicates and input_ids.shape[0] > 2:
            calls.append(1)
            if len(calls) == 4 and is_rank(1):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, input_ids, *others, **options)

    TensorParallelModel.forward = failing  # type: ignore[assignment,method-assign]


def _in_phase(name: str, fault: Any) -> None:
    """Call `fault` as a rank enters `training_utils.NAME`, a phase between two steps."""
    import training_utils

    real = getattr(training_utils, name)

    def failing(*args: Any) -> Any:
        fault()
        return real(*args)

    setattr(training_utils, name, failing)


def rank_1_dies_in_a_validation() -> None:
    if is_rank(1):
        _in_phase("validate", lambda: os.kill(os.getpid(), signal.SIGKILL))


def _no_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def rank_1_has_no_memory_for_a_validation() -> None:
    if is_rank(1):
        _in_phase("validate", _no_memory)


def samples_fail() -> None:
    def fault() -> None:
        raise RuntimeError("probability tensor contains either `inf`, `nan`\nor element < 0")

    _in_phase("sampled_tokens", fault)


def many_open_files() -> None:
    """As many as a mixture of many corpora opens: new descriptors are above 1023."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
    for _ in range(1100):
        os.open(os.devnull, os.O_RDONLY)


def no_room_for_fingerprints() -> None:
    """The file of fingerprints is on a disk that is full."""
    from colonnade.telemetry.metrics import MetricsLog

    append = MetricsLog.append

    def failing(log: Any, row: Any) -> None:
        if log.path.name == "fingerprints.jsonl":
            log._file = open("/dev/full", "wb")  # noqa: SIM115 - lives as long as the process
        append(log, row)

    MetricsLog.append = failing  # type: ignore[assignment,method-assign]


def device_takes_long() -> None:
    """Half a second passes from step 2 on until the host learns of a step's outcome; each vote's reserve is printed."""
    import training_utils
    from colonnade.runtime.stopping import StopVote

    note, reason = training_utils.StepGuard.note, StopVote.reason

    def waiting(guard: Any, *args: Any) -> None:
        if guard._run.step > 1:
            time.sleep(0.5)
        note(guard, *args)

    def printing(votes: Any, reserve: float, **options: Any) -> Any:
        print(f"reserve {reserve}")
        return reason(votes, reserve, **options)

    training_utils.StepGuard.note = waiting  # type: ignore[assignment,method-assign]
    StopVote.reason = printing  # type: ignore[assignment,method-assign]


def saves_and_validations_take_long() -> None:
    """Three seconds each; each vote's reserve is printed."""
    device_takes_long()
    _in_phase("save", lambda: time.sleep(3))
    _in_phase("validate", lambda: time.sleep(3))


def stopped_at_step_8() -> None:
    """As by a signal that comes in step 8."""
    at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
