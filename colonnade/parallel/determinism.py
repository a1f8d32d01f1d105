"""What the deterministic mode fixes besides the order of sums, and what its bits depend on (`docs/determinism.md`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from colonnade.errors import UsageError


def fix_arithmetic(*, compiled: bool) -> None:
    """Make every operation of this process reproducible. Call it before the first one.

    Uses one CPU thread per rank: kernels split a sum over their threads, so its order depends on the thread count.
    """
    torch.set_num_threads(1)
    # cuBLAS reads this when it creates its first handle; without it, products may differ from call to call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # That mode also fills uninitialised memory, a debugging aid that has no effect on results.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - torch defines it dynamically
    torch.backends.cudnn.benchmark = False
    if compiled:
        from torch._inductor import config

        # Otherwise inductor could choose kernels by timing them, and differently on each rank.
        config.deterministic = True


def arithmetic_of(device: torch.device, *, compiled: bool, micro_batch_size: int, **switches: bool) -> dict[str, Any]:
    """Everything that a run's bits depend on besides its fixed settings. `switches` are included only if on."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{device.type} with {torch.backends.cpu.get_cpu_capability()}"
    on = {name: True for name, is_on in switches.items() if is_on}
    return {"torch": torch.__version__, "device": kind, "compile": compiled, "micro_batch_size": micro_batch_size, **on}


def differences(recorded: Mapping[str, Any] | None, present: Mapping[str, Any]) -> list[str]:
    """The entries of `arithmetic_of` that have changed, as `name old -> new`."""
    recorded = recorded or {}
    # A switch that is not included is off.
    absent = {key: False for key, value in {**recorded, **present}.items() if value is True}
    pairs = {key: ({**absent, **recorded}.get(key), {**absent, **present}.get(key)) for key in {**recorded, **present}}
    return [f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new]


def halving_sizes(count: int) -> list[int]:
    """The data-parallel sizes that split the tree over `count` micro-batches into equal subtrees."""
    return [1 << power for power in range(count.bit_length()) if count % (1 << power) == 0]


def check_micro_batches(global_batch: int, micro_batch_size: int, dp: int) -> None:
    """Reject a batch that these data-parallel ranks cannot sum in the same order as one rank.

    Raises:
        UsageError: the global batch is not a whole number of micro-batches, or dp does not split the tree over them.
    """
    count, rest = divmod(global_batch, micro_batch_size)
    if rest:
        raise UsageError(
            f"--deterministic: the {global_batch} sequences of a step cannot be cut into micro-batches of "
            f"{micro_batch_size}; use a size that divides {global_batch}"
        )
    workable = halving_sizes(count)
    if dp not in workable:
        raise UsageError(
            f"--deterministic: {dp} data-parallel ranks cannot halve the {count} micro-batches of {micro_batch_size} "
            f"sequences that a step has; data-parallel sizes that can: {', '.join(map(str, workable))}"
        )
