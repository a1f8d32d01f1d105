"""Which version of this program is running: the version number, and the commit if it is a git checkout."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import colonnade

_ROOT = Path(colonnade.__file__).resolve().parent.parent
_GIT_SECONDS = 10.0


def code_version(root: Path = _ROOT) -> dict[str, str | None]:
    """`version`, and `commit`: at least 12 hex digits, plus `-dirty` if files were changed; None if git cannot tell."""
    return {"version": colonnade.__version__, "commit": _commit(root)}


def describe_code(code: Mapping[str, str | None]) -> str:
    """`0.1.0 (3f2a...)`"""
    return f"{code.get('version')} ({code.get('commit') or 'no commit known'})"


def _commit(root: Path) -> str | None:
    # An installed package may lie inside the checkout of another project, whose commit git would report.
    if not (root / ".git").exists():
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None
