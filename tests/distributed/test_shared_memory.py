"""Exchanges through shared memory against the same ones through sockets, and what happens where there is no memory."""

from __future__ import annotations

import errno
import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.parallel import shared_memory
from colonnade.parallel.collectives import TensorGroup
from colonnade.parallel.pending import Pending
from colonnade.parallel.shared_memory import SharedMemory
from distributed.pool import RankPool
from distributed.test_parity import CONFIG
from distributed.workers import build, loss_and_gradients


class Exchanges:
    """Those that took place, and those that did not; `SMALLEST` is 1 meanwhile, as tests have small tensors."""

    def __init__(self) -> None:
        self.made = self.refused = 0
        self._start, self._smallest = SharedMemory.start, shared_memory.SMALLEST

    def __enter__(self) -> Exchanges:
        def start(memory: SharedMemory, *args: Any) -> Pending[Tensor] | None:
            pending = self._start(memory, *args)
            self.made += pending is not None
            self.refused += pending is None
            return pending

        setattr(SharedMemory, "start", start)  # noqa: B010
        shared_memory.SMALLEST = 1
        return self

    def __exit__(self, *_: object) -> None:
        setattr(SharedMemory, "start", self._start)  # noqa: B010
        shared_memory.SMALLEST = self._smallest


# ------------------------------------------------------------------------------------------------------- whole models


def step(tp: int, *, shares_memory: bool, **options: Any) -> tuple[dict[str, Any], int]:
    with Exchanges() as seen:
        result = loss_and_gradients(CONFIG, tp, seed=5, shares_memory=shares_memory, **options)
    return result, seen.made


@pytest.mark.parametrize(
    ("tp", "options"),
    [
        (2, {}),
        (2, {"overlap_collectives": True}),
        (2, {"sequence_parallel": True, "overlap_collectives": True, "activation_checkpointing": "full"}),
        (4, {"slices": 4, "sequence_parallel": True}),
        (2, {"slices": 4, "compute_dtype": torch.bfloat16}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_same_bits_as_through_sockets(rank_pool: RankPool, tp: int, options: dict[str, Any]) -> None:
    """Two addends have one order, and four slices have the tree's. Sums of four ranks go through sockets."""
    through_memory = rank_pool.run(tp, step, tp, shares_memory=True, **options)
    through_sockets = rank_pool.run(tp, step, tp, shares_memory=False, **options)
    for (found, exchanges), (expected, none) in zip(through_memory, through_sockets, strict=True):
        assert exchanges > 15
        assert none == 0
        assert torch.equal(found["loss"], expected["loss"])
        assert torch.equal(found["norm"], expected["norm"])
    for kind in ("gradients", "parameters"):
        for name, value in through_sockets[0][0][kind].items():
            assert torch.equal(through_memory[0][0][kind][name], value), name


# ------------------------------------------------------------------------------------------------ buffers used again


def interleaved(seed: int, count: int) -> tuple[int, int]:
    """Sums, gathers and scattered sums, up to four under way at a time, on ranks that dawdle in their own ways.

    Returns how many took place, and the buffers they needed.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    common, own = random.Random(seed), random.Random(1000 * seed + rank)
    with Exchanges() as seen:
        memory = SharedMemory(dist.group.WORLD)
        group = TensorGroup(dist.group.WORLD, memory=memory)
        under_way: list[tuple[Pending[Tensor], Tensor]] = []
        for number in range(count):
            rows = size * common.randrange(1, 40)
            # Whole numbers: every order of sums gives the same. No two exchanges show the same values.
            shown = torch.arange(rows, dtype=torch.float64) + 1000 * number
            partial, total = shown * (rank + 1), shown * (size * (size + 1) // 2)
            kind = common.choice(("gather", "sum_part", "sum") if size == 2 else ("gather", "sum_part"))
            time.sleep(own.choice((0, 0, 0.002)))
            if kind == "sum":
                under_way.append((group.start_sum(partial.clone()), total))
            elif kind == "gather":
                under_way.append((group.start_gather(partial), torch.cat([shown * (r + 1) for r in range(size)])))
            else:
                under_way.append((group.start_sum_part(partial), total.chunk(size)[rank]))
            while len(under_way) > common.randrange(4):
                pending, expected = under_way.pop(common.randrange(len(under_way)))
                time.sleep(own.choice((0, 0, 0.002)))
                assert torch.equal(pending.wait(), expected), (number, kind)
        for pending, expected in under_way:
            assert torch.equal(pending.wait(), expected)
        return seen.made, len(memory._buffers)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_room_is_written_before_all_have_read_it(rank_pool: RankPool, ranks: int, seed: int) -> None:
    for made, buffers in rank_pool.run(ranks, interleaved, seed, 150):
        assert made == 150
        assert buffers < 40, "buffers are used again"


# ------------------------------------------------------------------------------------------------------ where it ends


def no_such_function(*_: str) -> None:
    raise AttributeError("memfd_create")


def no_memory(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sums_without(what: str) -> tuple[int, int, bool]:
    """Exchanges made and refused, and whether the sums were right, where one rank lacks something."""
    rank = dist.get_rank()
    spoiled: dict[str, tuple[Any, str, Any]] = {
        "memory": (os, "posix_fallocate", no_memory),
        "such system": (os, "memfd_create", no_such_function),
        "network in common": (shared_memory, "_network", lambda: rank),
        "process in common": (os, "getpid", lambda: 1),
        "room": (shared_memory, "LIMIT", 0),
    }
    owner, name, value = spoiled[what]
    before = getattr(owner, name)
    if rank == 1 or what == "room":  # the limit is the same for all
        setattr(owner, name, value)
    try:
        with Exchanges() as seen:
            group = TensorGroup(dist.group.WORLD, memory=SharedMemory(dist.group.WORLD))
            sums = [group.sum_(torch.full((100,), float(rank + 1))) for _ in range(3)]
    finally:
        setattr(owner, name, before)
    return seen.made, seen.refused, all(bool((found == 3).all()) for found in sums)


@pytest.mark.parametrize("what", ["memory", "such system", "network in common", "process in common", "room"])
def test_sockets_serve_where_one_rank_has_no(rank_pool: RankPool, what: str) -> None:
    assert rank_pool.run(2, sums_without, what) == [(0, 3, True)] * 2


def small_and_large() -> list[bool]:
    group = SharedMemory(dist.group.WORLD)
    return [
        (pending := group.start(torch.zeros(count), lambda views: views[0].clone())) is not None
        and pending.wait() is not None
        for count in (shared_memory.SMALLEST // 4 - 1, shared_memory.SMALLEST // 4)
    ]


def test_small_tensors_go_through_sockets(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, small_and_large) == [[False, True]] * 2


def with_a_rank_that_leaves() -> str:
    """Rank 1 does not take part in the third exchange."""
    with Exchanges():
        _, model = build(CONFIG, 2)
        group, values = model.group, torch.ones(10)
        for _ in range(2):
            group.sum_(values.clone())
        if dist.get_rank() == 1:
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            return "left"
        began = time.monotonic()
        try:
            group.sum_(values.clone())
        except RuntimeError as error:
            assert time.monotonic() - began < 30
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            return type(error).__name__
    return "nothing was noticed"


def test_a_rank_that_is_gone_ends_the_wait(rank_pool: RankPool) -> None:
    found, left = rank_pool.run(2, with_a_rank_that_leaves)
    assert left == "left"
    assert found != "nothing was noticed"


def out_of_step() -> str:
    """Rank 1 takes part in an exchange of its own first, as after an error that only it has met."""
    with Exchanges():
        memory, values = SharedMemory(dist.group.WORLD), torch.ones(10)
        for _ in range(3):
            pending = memory.start(values, lambda views: views[0] + views[1])
            assert pending is not None
            pending.wait()
        if dist.get_rank() == 1:
            memory._clock += 2
        pending = memory.start(values, lambda views: views[0] + views[1])
        assert pending is not None
        try:
            pending.wait()
        except RuntimeError as error:
            return str(error)
    return "nothing was noticed"


def test_ranks_that_are_out_of_step_are_told(rank_pool: RankPool) -> None:
    for said in rank_pool.run(2, out_of_step):
        assert "different orders" in said


def test_nothing_has_a_name_that_could_be_left_behind(rank_pool: RankPool) -> None:
    before = set(os.listdir("/dev/shm"))
    assert rank_pool.run(2, small_and_large) == [[False, True]] * 2
    assert set(os.listdir("/dev/shm")) - before == set()
