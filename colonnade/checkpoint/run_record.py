"""The run record in a checkpoint's manifest, checked before anything relies on it."""

from __future__ import annotations

import math
from typing import Any

from colonnade.checkpoint.discover import CheckpointInfo
from colonnade.checkpoint.manifest import MANIFEST_NAME
from colonnade.config import check_settings
from colonnade.errors import UsageError
from colonnade.run_settings import MAX_TOKENS_PER_STEP

_KINDS: dict[str, tuple[type, ...]] = {
    "settings": (dict,),
    "model_config": (dict,),
    "schedule": (dict,),
    "rng": (dict,),
    "global_batch": (int,),
    "tokens_seen": (int,),
    "tp": (int,),
    "dp": (int,),
    "loss": (float, int, type(None)),
    "scaler": (dict, type(None)),
    "data_position": (dict,),
    "arithmetic": (dict, type(None)),
    "began_at": (int,),
    "tokenizer_backend": (str,),
}
# Entries that checkpoints of earlier versions lack.
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "fingerprint": (str, type(None)),
    "moments_fingerprint": (str, type(None)),
    "micro_batch_size": (int, type(None)),
    "loss_window": (list, type(None)),
    "skipped_steps": (int, type(None)),
    "skipped_in_row": (int, type(None)),
    "code": (dict, type(None)),
}
_SCHEDULE = ("rewarmup_start", "rewarmup_steps")


def run_record(info: CheckpointInfo) -> dict[str, Any]:
    """The record of the run a checkpoint belongs to, as written by `run.state.manifest_of`; empty for a single file.

    Raises:
        UsageError: an entry is missing, of the wrong type or out of range, so the manifest is damaged or was written by
            another version.
    """
    if info.manifest is None:
        return {}
    record, source = dict(info.manifest.run), f"{info.path / MANIFEST_NAME}"
    record = {**dict.fromkeys(_OPTIONAL), "tokenizer_backend": "hf", **record}
    for name, kinds in (_KINDS | _OPTIONAL).items():
        if name not in record or type(record[name]) not in kinds:
            raise _unusable(source, name, record.get(name))
    for name in _SCHEDULE:
        if type(record["schedule"].get(name)) is not int:
            raise _unusable(source, f"schedule.{name}", record["schedule"].get(name))
    for name, least in {"global_batch": 1, "tokens_seen": 0, "tp": 1, "dp": 1}.items():
        if record[name] < least:
            raise _unusable(source, name, record[name])
    skipped, in_row = record["skipped_steps"] or 0, record["skipped_in_row"] or 0
    if not 0 <= in_row <= skipped <= (info.step or 0):
        raise _unusable(source, "skipped_in_row", f"{in_row} of {skipped} skipped steps")
    for loss in record["loss_window"] or []:
        if type(loss) is not float or not math.isfinite(loss):
            raise _unusable(source, "loss_window", f"a list with {loss!r:.80}")
    for name, value in (record["code"] or {}).items():
        if not isinstance(value, str | None):
            raise _unusable(source, f"code.{name}", value)
    record["settings"] = check_settings(record["settings"], f"{source}: run.settings")
    # Only the user who starts the program may allow a tokenizer's code to run, not a file that may come from elsewhere.
    record["settings"]["trust_remote_code"] = False
    if record["global_batch"] * (record["settings"].get("block_size") or 1) > MAX_TOKENS_PER_STEP:
        raise _unusable(source, "global_batch", record["global_batch"])
    return record


def _unusable(source: str, name: str, value: Any) -> UsageError:
    shown = "missing" if value is None else repr(value)[:80]
    return UsageError(
        f"{source} is damaged or was written by another version: run.{name} is {shown}; use another checkpoint"
    )
