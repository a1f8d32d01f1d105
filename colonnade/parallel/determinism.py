"""What the deterministic mode fixes beside the order of sums, and what its bits depend on (`docs/determinism.md`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from colonnade.errors import UsageError


def fix_arithmetic(*, compiled: bool) -> None:
    """Make every operation of this process repeat itself. Call it before the first one.

    One thread a rank on the CPU: kernels share out a sum over their threads, so that its order is the thread count's.
    """
    torch.set_num_threads(1)
    # cuBLAS reads it when its first handle is made; without it products may differ from call to call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # That mode also fills memory that is about to be overwritten, which is a debugging aid and no part of the result.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - torch defines it dynamically
    torch.backends.cudnn.benchmark = False
    if compiled:
        from torch._inductor import config

        # Kernels that it would choose by timing them could differ from rank to rank.
        config.deterministic = True


def arithmetic_of(device: torch.device, *, compiled: bool, micro_batch_size: int, **switches: bool) -> dict[str, Any]:
    """Everything that a run's bits depend on besides the settings that are fixed for it. `switches` stand if on."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{device.type} with {torch.backends.cpu.get_cpu_capability()}"
    on = {name: True for name, is_on in switches.items() if is_on}
    return {"torch": torch.__version__, "device": kind, "compile": compiled, "micro_batch_size": micro_batch_size, **on}


def differences(recorded: Mapping[str, Any] | None, present: Mapping[str, Any]) -> list[str]:
    """What of `arithmetic_of` is not as it was, as `name old -> new`."""
    recorded = recorded or {}
    # A switch that does not stand there is off.
    absent = {key: False for key, value in {**recorded, **present}.items() if value is True}
    pairs = {key: ({**absent, **recorded}.get(key), {**absent, **present}.get(key)) for key in {**recorded, **present}}
    return [f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new]


def halving_sizes(count: int) -> list[int]:
    """The data-parallel sizes that cut the tree over `count` micro-batches."""
    return [1 << power for power in range(count.bit_length()) if count % (1 << power) == 0]


def check_micro_batches(global_batch: int, micro_batch_size: int, dp: int) -> None:
    """Refuse a batch that these data-parallel ranks cannot sum as one rank would.

    Raises:
        UsageError: the global batch is not made of whole micro-batches, or dp does not cut the tree over them.
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
