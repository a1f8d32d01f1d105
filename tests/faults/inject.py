"""Faults to put into a command before it starts (`forked_commands.begin(prepare=...)`); `RANK` says where one is."""

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
    """Rank 1 does not get the data of step 5."""
    from colonnade.data.feed import BatchFeed

    take = BatchFeed.take
    calls: list[int] = []

    def hanging(feed: Any) -> Any:
        calls.append(1)
        if len(calls) == 5 and is_rank(1):
            time.sleep(600)
        return take(feed)

    BatchFeed.take = hanging  # type: ignore[assignment,method-assign]


def short_grace() -> None:
    from colonnade.parallel import watchdog

    watchdog.STOP_GRACE_SECONDS = 1.0


def step_3_for_ever() -> None:
    at_step(3, lambda: time.sleep(600))


def rank_1_has_no_time() -> None:
    """The clock of rank 1 says that the run began an hour ago."""
    from colonnade.parallel import stopping

    launched_at = stopping.launched_at
    stopping.launched_at = lambda: launched_at() - (3600 if is_rank(1) else 0)


def first_attempt_dies_in_step_15() -> None:
    """Under torchrun, rank 1 of the first attempt is killed."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and is_rank(1):
        at_step(15, lambda: os.kill(os.getpid(), signal.SIGKILL))


def first_attempt_aborts_at_its_exit() -> None:
    """Under torchrun, rank 1 of the first attempt finishes the run, and aborts where it should exit with 0."""
    from colonnade.parallel import launch

    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and is_rank(1):
        leave_group = launch._leave_group

        def aborting() -> None:
            leave_group()
            os.abort()

        launch._leave_group = aborting


def step_9_for_ever() -> None:
    at_step(9, lambda: time.sleep(600))


def rank_1_has_no_room_at_step_12() -> None:
    """The system refuses rank 1 files of more than 4 KiB from step 12 on."""
    if is_rank(1):
        at_step(12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))


def rank_1_has_no_room_at_the_end() -> None:
    """The same, in the last step."""
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
    """SIGKILL a rank as it makes the `call`-th call of `owner.name`."""
    real = getattr(owner, name)
    calls: list[int] = []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call and is_rank(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def dies_in_the_middle_of_a_shard() -> None:
    """In the second save, after some of its writes."""
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
    """One file of the checkpoint that is pruned is gone, the others are not."""
    from colonnade.checkpoint import prune

    def dying(path: Any, *args: Any, **kwargs: Any) -> None:
        next(path.glob("*.distcp")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    prune.shutil.rmtree = dying  # type: ignore[assignment]


def first_step_takes_long() -> None:
    """As compiling does; what a stop leaves a later step is over by then."""
    short_grace()
    at_step(1, lambda: time.sleep(6))


def rank_1_runs_out_of_memory() -> None:
    """In the forward pass of the fourth micro-batch above two sequences, while rank 0 waits in the layer's sum."""
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
