"""Fingerprints of parameters and moments that do not depend on how they are sharded.

Each element contributes a 64-bit hash of its bits and its index in the whole parameter, and the contributions are added
modulo 2^64, so neither the order nor the sharding matters. Two such sums with different hashes make 128 bits. For a
given index the hash is a bijection of the value, so a change to a single element certainly changes both sums; other
changes go unnoticed with a probability of 2^-128. The hash is splitmix64's mix (Steele, Lea and Flood, OOPSLA 2014).

Every rank computes the sums of what it holds, and the sums are all-gathered. Copies must agree: those of a tensor that
is replicated over a tensor-parallel group, and those of any tensor on the data-parallel ranks (if these shard the
parameters, on the replicas).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from colonnade.errors import RunError

# Elements hashed at a time: on the CPU as many as fit into a core's cache (five times as fast as blocks of 8 MiB),
# elsewhere enough to keep the device busy.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 22
_LANES = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
FINGERPRINT_KEYS = ("fingerprint", "moments_fingerprint")
_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def float32_bits(value: float) -> str:
    """The bits of a float32 in hexadecimal. All NaNs map to one value: which NaN an addition returns is undefined."""
    return struct.pack(">f", float("nan") if value != value else value).hex()


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprints of a model and its optimizer over all ranks, in hexadecimal; the same on every rank.

    Attributes:
        tensors: 128 bits for each parameter, by name, from the first rank that holds a copy.
        moments: the same for each tensor of the optimizer's state, by `<parameter>.<state>`.
        drifted: the tensors of either kind whose copies differ, each with a phrase that names the ranks.
    """

    tensors: dict[str, str]
    moments: dict[str, str]
    drifted: dict[str, str]

    def columns(self) -> dict[str, str]:
        """One value for all parameters and one for all moments, as stored in metrics rows and manifests."""
        return dict(zip(FINGERPRINT_KEYS, (combined(self.tensors), combined(self.moments)), strict=True))

    def require_equal_copies(self, step: int) -> None:
        """Raises RunError, on all ranks, if ranks hold different copies of a tensor after `step`."""
        _require_no_drift(self.drifted, step)


def require_equal_parameters(model: nn.Module, step: int) -> None:
    """Compare the copies of those parameters of a model of `DTensor`s that several ranks hold. Collective.

    Within a tensor-parallel group these are the replicated parameters; across data-parallel ranks (or replicas), all.

    Raises:
        RunError: on all ranks, if copies differ: names the parameter and the ranks.
    """
    parameters = dict(model.named_parameters())
    first = next(iter(parameters.values()))
    assert isinstance(first, DTensor)
    replicas, shards, tp = ranks = _rank_grid(first)
    parameters = {
        name: value
        for name, value in parameters.items()
        if replicas * (1 if _is_cut(value) else tp) * (1 if _is_shared_out(value) else shards) > 1
    }
    if parameters:
        _require_no_drift(_drifted(parameters, _sums_of_ranks(parameters, first.device, ranks)), step)


def _require_no_drift(drifted: Mapping[str, str], step: int) -> None:
    if drifted:
        (name, ranks), *others = drifted.items()
        more = f" ({len(others)} other tensors differ as well)" if others else ""
        raise RunError(
            f"ranks hold different copies of {name} after step {step}: {ranks}{more}; memory or a device fails "
            "there: go on from the last checkpoint without it"
        )


def fingerprint_of(model: nn.Module, optimizer: Optimizer | None = None) -> Fingerprint:
    """Fingerprint of a model of `DTensor` parameters, and of its optimizer's state. Collective over all ranks.

    Ranks must be ordered as in `colonnade.parallel.mesh`: those of a tensor-parallel group are consecutive.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, Tensor] = {}
    if optimizer is not None:
        for name, parameter in parameters.items():
            # .get: looking a parameter up with [] would create an empty state.
            states |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    first = next(iter(parameters.values()))
    assert isinstance(first, DTensor)
    tensors = {**parameters, **states}
    by_rank = _sums_of_ranks(tensors, first.device, _rank_grid(first))
    values = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        sums = by_rank[0, :, :, index]
        sums = sums.sum(dim=0) if _is_shared_out(tensor) else sums[0]
        total = sums.sum(dim=0) if _is_cut(tensor) else sums[0]
        values[name] = "".join(f"{lane & (2**64 - 1):016x}" for lane in total.tolist())
    return Fingerprint(
        {name: values[name] for name in parameters},
        {name: values[name] for name in states},
        _drifted(tensors, by_rank),
    )


def _is_cut(tensor: Tensor) -> bool:
    """Whether tensor-parallel ranks hold different shards."""
    return isinstance(tensor, DTensor) and not tensor.placements[-1].is_replicate()


def _is_shared_out(tensor: Tensor) -> bool:
    """Whether the data-parallel ranks of a replica hold different shards."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1


def _rank_grid(parameter: DTensor) -> tuple[int, int, int]:
    """(replicas, data-parallel ranks that shard one replica's parameters, tp); their product is the world size."""
    mesh = parameter.device_mesh
    tp, held = mesh.size(mesh.ndim - 1), mesh.size()
    return dist.get_world_size() // held, held // tp, tp


def _sums_of_ranks(tensors: Mapping[str, Tensor], device: torch.device, ranks: tuple[int, int, int]) -> Tensor:
    """Every rank's sums over what it holds of each tensor, in CPU memory on every rank: [*ranks, tensors, lanes]."""
    sums = torch.stack([_local_sums(tensor).to(device) for tensor in tensors.values()])
    held = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(held, sums)
    return torch.stack(held).cpu().unflatten(0, ranks)


def _drifted(tensors: Mapping[str, Tensor], by_rank: Tensor) -> dict[str, str]:
    """The tensors whose copies differ, each with a phrase that names the ranks."""
    found = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        sums = by_rank[:, :, :, index]
        copies = sums[:1] if _is_shared_out(tensor) else sums[:1, :1]
        if not (sums == (copies if _is_cut(tensor) else copies[:, :, :1])).all():
            found[name] = _who_differs(sums, _groups_of_copies(tensor, sums.shape))
    return found


def _groups_of_copies(tensor: Tensor, ranks: Sequence[int]) -> list[list[int]]:
    """For each distinct shard of a tensor, the ranks that hold it. `ranks`: (replicas, shards, tp, ...)"""
    numbers = torch.arange(ranks[0] * ranks[1] * ranks[2]).view(*ranks[:3])
    groups = [numbers] if not _is_shared_out(tensor) else list(numbers.split(1, dim=1))
    if _is_cut(tensor):
        groups = [part for group in groups for part in group.split(1, dim=2)]
    return [group.flatten().tolist() for group in groups]


def _who_differs(sums: Tensor, groups: Iterable[Iterable[int]]) -> str:
    """A phrase that names the ranks whose copies differ from the majority's. `sums`: [replicas, shards, tp, lanes]"""
    of_rank = sums.flatten(0, 2).tolist()
    parts = []
    for group in groups:
        copies = {rank: tuple(of_rank[rank]) for rank in group}
        (most, count), *others = Counter(copies.values()).most_common()
        if not others:
            continue
        if count == others[0][1]:
            parts.append(f"{_ranks(copies)} differ, and no majority tells which is right")
        else:
            odd = [rank for rank, copy in copies.items() if copy != most]
            parts.append(f"{_ranks(odd)} {'differ' if len(odd) > 1 else 'differs'} from the {count} others")
    return "; ".join(parts)


def _ranks(ranks: Iterable[int]) -> str:
    listed = [str(rank) for rank in ranks]
    return f"rank {listed[0]}" if len(listed) == 1 else f"ranks {', '.join(listed[:-1])} and {listed[-1]}"


def combined(fingerprints: Mapping[str, str]) -> str:
    """128 bits in hexadecimal for all tensors together, computed from their fingerprints."""
    text = "".join(f"{name} {value}\n" for name, value in sorted(fingerprints.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def _local_sums(tensor: Tensor) -> Tensor:
    """Both sums over what this rank holds of a tensor: [2], int64. A tensor other than a `DTensor` is held whole."""
    local, offsets = tensor, (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    sums = torch.zeros(len(_LANES), dtype=torch.int64, device=local.device)
    # Treats a vector as a matrix with one column; row r and column c of the whole have the index r * columns + c.
    rows = local.reshape(local.shape[0], math.prod(local.shape[1:])) if local.ndim else local.reshape(1, 1)
    first_row, first_column, *_ = (*offsets, 0, 0)
    columns = tensor.numel() // (tensor.shape[0] if tensor.ndim else 1)
    column = torch.arange(first_column, first_column + rows.shape[1], device=local.device)
    step = max(1, (_CPU_BLOCK if local.device.type == "cpu" else _DEVICE_BLOCK) // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        bits = block.contiguous().view(_BITS_OF[block.element_size()]).to(torch.int64)
        row = torch.arange(first_row + start, first_row + start + block.shape[0], device=local.device)
        index = row.unsqueeze(1) * columns + column
        sums += torch.stack([_mix(bits, index, lane).sum() for lane in _LANES])
    return sums


def _mix(bits: Tensor, index: Tensor, lane: int) -> Tensor:
    """splitmix64's output function of the value and its index; int64 arithmetic wraps modulo 2^64."""
    mixed = bits + index * _signed(lane)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31)


def _shift(values: Tensor, by: int) -> Tensor:
    """Logical right shift; torch's right shift of int64 is arithmetic (copies the sign bit)."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value
