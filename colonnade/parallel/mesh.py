"""Processes, devices and the ("dp", "tp") mesh that all other modules use.

The mesh is row-major: global rank = dp_rank * tp + tp_rank, so the ranks of one tensor-parallel group are
adjacent (on one node, where the links are fast).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colonnade.errors import LocalRunError, PeerError, UsageError, message_line
from colonnade.setting_values import divisors

STARTUP_SECONDS = 1800.0
"""How long ranks wait for each other at startup: longer than the slowest reads a checkpoint or compiles."""

# Means "no limit" where torch requires a timeout.
_FOREVER = timedelta(days=365)
# Collectives on the CPU time out this much later than the watchdog, whose report is more informative.
_BEHIND_WATCHDOG = timedelta(minutes=1)
JOIN_POLL_SECONDS = 0.1
# Elements of the sums with which devices connect: NCCL takes different algorithms for small and for large tensors.
CONNECTING_SIZES = (1, 2**23)
TRACE_PREFIX = "nccl_trace_rank_"


@dataclass(frozen=True)
class ParallelLayout:
    """This process's device and its position on the ("dp", "tp") mesh.

    Values read from the mesh are cached: torch creates a new submesh on each access, which takes the host 0.2 ms.

    Attributes:
        shard_mesh: the mesh if data-parallel ranks shard the parameters: ("dp", "tp"), or ("dp_replicate", "dp_shard",
            "tp") over the same ranks in the same order. None if they do not.
        startup_seconds: how long collectives wait for a rank until `set_collective_timeout` changes it.
    """

    mesh: DeviceMesh
    device: torch.device
    shard_mesh: DeviceMesh | None = None
    startup_seconds: float = STARTUP_SECONDS

    @cached_property
    def tp(self) -> int:
        return self.mesh["tp"].size()

    @cached_property
    def dp(self) -> int:
        return self.mesh["dp"].size()

    @cached_property
    def tp_rank(self) -> int:
        return self.mesh["tp"].get_local_rank()

    @cached_property
    def dp_rank(self) -> int:
        return self.mesh["dp"].get_local_rank()

    @cached_property
    def tp_mesh(self) -> DeviceMesh:
        return (self.mesh if self.shard_mesh is None else self.shard_mesh)["tp"]

    @cached_property
    def tp_group(self) -> dist.ProcessGroup:
        return self.tp_mesh.get_group()

    @cached_property
    def dp_group(self) -> dist.ProcessGroup:
        return self.mesh["dp"].get_group()

    @cached_property
    def replica_mesh(self) -> DeviceMesh:
        """The data-parallel ranks that shard one replica's parameters; requires `shard_mesh`."""
        assert self.shard_mesh is not None
        return self.shard_mesh["dp" if self.shard_mesh.ndim == 2 else "dp_shard"]

    @cached_property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same shard in each replica; None with one replica or without `shard_mesh`."""
        if self.shard_mesh is None or self.shard_mesh.ndim == 2:
            return None
        return self.shard_mesh["dp_replicate"].get_group()

    def sharded(self, replicas: int) -> ParallelLayout:
        """This layout with the data-parallel ranks split into `replicas`, each of which holds the parameters once.

        Collective over all ranks. Adjacent ranks shard a replica, so that a node can hold whole replicas. With one rank
        per replica there is nothing to shard, and the layout is returned unchanged.

        Args:
            replicas: a divisor of dp. With dp 1 any number is accepted, so that a single rank can take the settings of
                the ranks it is compared with.
        """
        if self.dp in (1, replicas):
            return self
        if replicas == 1:
            return replace(self, shard_mesh=self.mesh)
        sizes, names = (replicas, self.dp // replicas), ("dp_replicate", "dp_shard")
        shard_mesh = self.mesh._unflatten(0, sizes, names)
        _set_timeout(shard_mesh.get_all_groups(), self.startup_seconds, self.device)
        return replace(self, shard_mesh=shard_mesh)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes what belongs to the whole run."""
        return dist.get_rank() == 0


def world_size_from_environment() -> int:
    """Number of processes that torchrun started; 1 without torchrun. Needs no process group."""
    return _from_environment("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank_from_environment() -> int:
    """Global rank that torchrun gave this process; 0 without torchrun. Needs no process group."""
    return _from_environment("RANK", 0)


def local_world_size_from_environment() -> int:
    """Number of processes that torchrun started on this machine; 1 without torchrun. Needs no process group."""
    return _from_environment("LOCAL_WORLD_SIZE", 1)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment, not a number: start with torchrun, or unset it")
    return int(text)


def resolve_tensor_parallel_size(world_size: int, requested: int | None) -> int:
    """The tensor-parallel size for `world_size` processes; all of them if `requested` is None.

    Raises:
        UsageError: the world size is not a multiple of the requested size.
    """
    tp = world_size if requested is None else requested
    if tp < 1 or world_size % tp:
        raise UsageError(
            f"--tensor-parallel-size {tp} does not divide the {world_size} ranks of this launch; "
            f"sizes that do: {', '.join(map(str, divisors(world_size)))}"
        )
    return tp


def pick_device() -> torch.device:
    """The accelerator of this local rank, or the CPU if there is none."""
    if torch.cuda.is_available():
        local_rank = _from_environment("LOCAL_RANK", 0)
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible; "
                "start at most that many processes a node"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def init_parallel(
    tensor_parallel_size: int | None,
    device: torch.device | None = None,
    *,
    timeout: float = STARTUP_SECONDS,
    trace_folder: Path | None = None,
) -> ParallelLayout:
    """Join the process group and create the ("dp", "tp") mesh over it.

    Works without torchrun as well: a single process gets a 1 x 1 mesh with a process group of its own, so
    that later code never has to check whether it is distributed.

    Args:
        tensor_parallel_size: number of ranks that a model is sharded over; None for all of them.
        device: where parameters live; None for the local accelerator, or the CPU if there is none.
        timeout: seconds to wait for the other ranks, here and in every collective; 0 for no limit.
        trace_folder: where NCCL's flight recorder writes when a collective hangs; None to leave NCCL's settings alone.

    Raises:
        UsageError: the size does not divide the world size, or a local rank has no GPU.
        RunError: a rank did not join in time; the message names it.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else world_size_from_environment()
    tp = resolve_tensor_parallel_size(world_size, tensor_parallel_size)
    device = device or pick_device()
    if not dist.is_initialized():
        # In a CUDA run, gloo carries object collectives and votes without touching the CUDA streams.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if trace_folder is not None:
            record_collectives(trace_folder)
        rank, limit = rank_from_environment(), time_limit(timeout)
        store = _rendezvous_store(limit) if "RANK" in os.environ else dist.HashStore()
        await_all_ranks(store, rank, world_size, limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    mesh = init_device_mesh(device.type, (world_size // tp, tp), mesh_dim_names=("dp", "tp"))
    # The groups of a mesh start with torch's default timeout.
    _set_timeout([group for group in mesh.get_all_groups() if group is not dist.group.WORLD], timeout, device)
    return ParallelLayout(mesh=mesh, device=device, startup_seconds=timeout)


def first_rank_alone(device: torch.device) -> ParallelLayout:
    """A 1 x 1 mesh of the first rank, for a whole model that it holds in addition to the sharded one. Collective.

    The other ranks get a layout that does not contain them, and must not use it.
    """
    return ParallelLayout(mesh=DeviceMesh(device.type, [[0]], mesh_dim_names=("dp", "tp")), device=device)


def time_limit(seconds: float) -> timedelta:
    """`seconds` as a timeout for torch; 0 means no limit."""
    return timedelta(seconds=seconds) if seconds else _FOREVER


def record_collectives(folder: Path) -> None:
    """Have NCCL record its last collectives and write them to `folder` when one hangs (its flight recorder).

    Environment variables that are already set stay. `python -m torch.distributed.flight_recorder.fr_trace` reads the
    files.
    """
    prefix = str(folder.absolute() / TRACE_PREFIX)
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,  # its name up to torch 2.11
    }.items():
        os.environ.setdefault(name, value)


def _groups_of(layout: ParallelLayout) -> list[dist.ProcessGroup | None]:
    groups = [dist.group.WORLD, *layout.mesh.get_all_groups()]
    if layout.shard_mesh is not None:
        groups += layout.shard_mesh.get_all_groups()
    return groups


def connect_devices(layout: ParallelLayout) -> None:
    """Have every group of more than one rank sum once between devices. Collective; a no-op on the CPU.

    NCCL creates a group's communicator in its first collective, and the buffers of an algorithm when that is first
    used. They take memory of the device, without this after the tuner has measured how much there is. What other
    collectives than sums need still comes later, out of the margin that the tuner leaves free.

    Raises:
        LocalRunError: NCCL cannot connect the ranks.
    """
    if layout.device.type != "cuda":
        return
    try:
        for group in dict.fromkeys(_groups_of(layout)):
            if dist.get_world_size(group) > 1:
                for size in CONNECTING_SIZES:
                    dist.all_reduce(torch.zeros(size, device=layout.device), group=group)
        torch.cuda.synchronize(layout.device)
    except dist.DistBackendError as error:
        raise LocalRunError(
            f"NCCL cannot connect the ranks ({message_line(error)}); NCCL_DEBUG=INFO prints more"
        ) from error


def set_collective_timeout(layout: ParallelLayout, seconds: float) -> None:
    """Change how long the collectives of a step wait for a rank; 0 for no limit. Those in flight keep their limit."""
    _set_timeout(_groups_of(layout), seconds, layout.device)


def _set_timeout(groups: Iterable[dist.ProcessGroup | None], seconds: float, device: torch.device) -> None:
    limit = time_limit(seconds)
    if device.type != "cuda":
        limit += _BEHIND_WATCHDOG
    for group in groups:
        if dist.get_backend(group) != "fake":  # its ranks do not exist, so nothing waits for them
            dist.distributed_c10d._set_pg_timeout(limit, group)


def await_all_ranks(store: dist.Store, rank: int, world_size: int, limit: timedelta) -> None:
    """Return once all ranks have joined the store.

    Raises:
        LocalRunError, PeerError: some ranks did not join in time. The lowest rank that did raises a LocalRunError that
            names them, and the others a PeerError, which is not printed.
    """
    keys = [f"colonnade/joined/{number}" for number in range(world_size)]
    deadline = time.monotonic() + limit.total_seconds()
    try:
        store.set(keys[rank], "")
        # Polled, because a wait that times out prints pages of torch's own stack.
        while not store.check(keys):
            if time.monotonic() > deadline:
                missing = [number for number, key in enumerate(keys) if not store.check([key])]
                break
            time.sleep(JOIN_POLL_SECONDS)
        else:
            return
    except dist.DistError as error:  # the rank that hosted the store has named them and exited
        raise PeerError("other ranks did not join") from error
    if rank != min(set(range(world_size)) - set(missing)):
        raise PeerError("other ranks did not join")
    named = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    raise LocalRunError(
        f"{len(missing)} of {world_size} ranks did not join within {limit.total_seconds():g} s: rank {named}; look at "
        "what they printed and at their nodes, or give more time with --startup-timeout"
    )


def _rendezvous_store(limit: timedelta) -> dist.Store:
    """The store that torchrun gives its ranks, with keys separate from those of an earlier, failed attempt.

    torchrun may keep one store across `--max-restarts`, and ranks of a new attempt then read addresses of dead ones
    (seen on torch 2.13 with gloo). On one node, the attempt's number separates the keys. On several nodes the agents
    count differently, so torchrun has to be told to create a new store there (`docs/scaling.md`).
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:  # only RANK is set, as some schedulers do
        raise UsageError(
            f"RANK is set, and no way to the other ranks (MASTER_ADDR {host!r}, MASTER_PORT {port!r}): start with "
            "torchrun, or unset it"
        )
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: dist.Store = dist.TCPStore(
            host,
            int(port),
            is_master=not is_hosted and rank_from_environment() == 0,
            timeout=limit,
            wait_for_workers=False,  # `await_all_ranks` waits, and names missing ranks
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise LocalRunError(
            f"the rendezvous at {host}:{port} could not be reached within {limit.total_seconds():g} s; is rank 0's "
            "node up, and the port open?"
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def shutdown_parallel() -> None:
    """Leave the process group after every rank has arrived, so that no peer is cut off in a collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
