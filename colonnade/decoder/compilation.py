"""Whether the segments between collectives can be compiled here."""

from __future__ import annotations

import os
import shutil

from colonnade.errors import UsageError


def cpu_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use on the CPU; None if there is none."""
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def require_compiler() -> None:
    """Raise UsageError if `torch.compile` cannot build anything for the CPU."""
    if cpu_compiler() is None:
        raise UsageError("--compile on the CPU needs a C++ compiler (g++ or clang++): install one or leave it out")
