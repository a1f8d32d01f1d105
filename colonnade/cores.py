"""The processor cores that a process may use."""

from __future__ import annotations

import psutil


def usable_cores() -> int:
    """Number of cores that this process may run on; other processes of the machine may share them."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # not on macOS
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1
