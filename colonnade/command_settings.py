"""The tables of what `evaluate.py` and `check_parity.py` are told beside a run's settings; flags are made from them.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from colonnade.run_settings import _setting


@dataclass(frozen=True)
class ParitySettings:
    """What `check_parity.py` is told beside the run's own settings."""

    checkpoint_path: str | None = _setting(
        None,
        "parity",
        "a run's folder or one of its checkpoints: its settings and its weights (default weights of the seed)",
        unit="PATH",
    )
    steps: int = _setting(5, "parity", "optimizer steps to compare", minimum=1, maximum=1000, unit="STEPS")
    tolerance: float | None = _setting(
        None,
        "parity",
        "relative difference allowed in fp32 (default 1e-4; with --deterministic 0)",
        minimum=0.0,
        maximum=1.0,
    )
    low_precision_tolerance: float | None = _setting(
        None,
        "parity",
        "relative difference allowed in the run's --precision, where that is another (default 0.05; with "
        "--deterministic 0)",
        minimum=0.0,
        maximum=1.0,
        unit="TOLERANCE",
    )
    json: str | None = _setting(None, "parity", "write the comparison to this file as well", unit="FILE")
