"""Fingerprints of parameters that do not depend on how they are sharded.

Each element contributes a 64-bit mix of its bits and its index in the whole parameter, and the contributions are added
modulo 2^64: the order does not matter, and neither does who holds what. Two such sums with different mixes make 128
bits. For one index a mix is a bijection of the value, so a change to a single element changes both sums for certain;
other changes go unnoticed with a probability of 2^-128. The mix is splitmix64's (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import struct

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Elements mixed at a time: on the CPU what a core's cache holds (five times as fast as blocks of 8 MiB), elsewhere
# enough to keep a device busy.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 22
_LANES = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def float32_bits(value: float) -> str:
    """The bits of a float32 in hexadecimal. All NaNs read alike: which of them an addition returns is not defined."""
    return struct.pack(">f", float("nan") if value != value else value).hex()


def tensor_fingerprints(model: nn.Module) -> dict[str, str]:
    """128 bits in hexadecimal for each `DTensor` parameter, by name; equal on all ranks of its mesh. Collective."""
    parameters = dict(model.named_parameters())
    sums = torch.stack([_local_sums(parameter) for parameter in parameters.values()])
    first = next(iter(parameters.values()))
    assert isinstance(first, DTensor)
    mesh = first.device_mesh
    if mesh.size() > 1:
        dist.all_reduce(sums, group=mesh.get_group())
    return {
        name: "".join(f"{lane & (2**64 - 1):016x}" for lane in lanes)
        for name, lanes in zip(parameters, sums.tolist(), strict=True)
    }


def combined(fingerprints: dict[str, str]) -> str:
    """128 bits in hexadecimal for all parameters together, from the fingerprint of each."""
    text = "".join(f"{name} {value}\n" for name, value in sorted(fingerprints.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def _local_sums(parameter: nn.Parameter) -> Tensor:
    """This rank's contribution to both sums of a parameter; zero where the first rank holds the same. [2], int64"""
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    local = parameter.to_local()
    sums = torch.zeros(len(_LANES), dtype=torch.int64, device=local.device)
    if placements[0].is_replicate() and mesh.get_local_rank() > 0:
        return sums
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    # A vector is a matrix of one column: row r and column c of the whole have the index r * columns + c.
    rows = local.reshape(local.shape[0], -1)
    columns = parameter.numel() // parameter.shape[0]
    first_column = offsets[1] if len(offsets) > 1 else 0
    column = torch.arange(first_column, first_column + rows.shape[1], device=local.device)
    step = max(1, (_CPU_BLOCK if local.device.type == "cpu" else _DEVICE_BLOCK) // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        bits = block.contiguous().view(_BITS_OF[block.element_size()]).to(torch.int64)
        row = torch.arange(offsets[0] + start, offsets[0] + start + block.shape[0], device=local.device)
        index = row.unsqueeze(1) * columns + column
        sums += torch.stack([_mix(bits, index, lane).sum() for lane in _LANES])
    return sums


def _mix(bits: Tensor, index: Tensor, lane: int) -> Tensor:
    """splitmix64's output function of the value at its place; int64 arithmetic wraps modulo 2^64."""
    mixed = bits + index * _signed(lane)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31)


def _shift(values: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's shift of int64 copies the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value
