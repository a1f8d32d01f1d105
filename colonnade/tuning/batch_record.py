"""Micro-batch sizes already found, stored with the run in ``<checkpoint-dir>/micro_batch.json``.

An answer is valid only for what it depends on (device, memory, model, block size, parallel sizes, precision, ...):
the caller passes these as a mapping, and the answer is stored under a hash of it. A size that ran out of memory in
the middle of a run adds an upper bound to the answer, which the next start with the same mapping obeys.

The file is a cache: unreadable content costs one warning and a new search, never the run. Ranks that share the
folder may write at the same time: each write is a rename of a complete file, and ranks that fail together record
the same bound.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colonnade.errors import RunError, message_line
from colonnade.files import replace_file
from colonnade.setting_values import divisors

RECORD_NAME = "micro_batch.json"
RECORD_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """The outcome of one micro-batch size over all ranks.

    ``seconds`` is the time of the slowest rank, None if the size did not fit on every rank.
    """

    size: int
    fits: bool
    seconds: float | None


def micro_batch_candidates(chunks_per_rank: int, at_most: int | None = None) -> list[int]:
    """Micro-batch sizes that divide ``chunks_per_rank``, ascending, none above ``at_most``.

    ``chunks_per_rank`` is the global batch divided by dp: micro-batch x accumulation, in chunks.

    Raises:
        ValueError: an argument is below 1.
    """
    if chunks_per_rank < 1 or (at_most is not None and at_most < 1):
        raise ValueError(f"chunks per rank and the limit must be at least 1, not {chunks_per_rank} and {at_most}")
    return [size for size in divisors(chunks_per_rank) if at_most is None or size <= at_most]


def stored_answer(directory: Path, key_fields: Mapping[str, Any]) -> int | None:
    """The recorded micro-batch size for exactly these fields, capped by any bound that an out-of-memory error left.

    None if nothing is recorded. A bound without an answer (the size came from elsewhere) is itself the answer.
    """
    entry = _read_entries(directory).get(record_key(key_fields))
    if entry is None:
        return None
    return min(int(entry[name]) for name in ("size", "at_most") if name in entry)


def store_answer(directory: Path, key_fields: Mapping[str, Any], size: int, trials: Iterable[Trial] = ()) -> None:
    """Record ``size`` for these fields, with the trials that led to it. An existing bound is kept.

    Only one rank may call this (two with different answers would overwrite each other); a missing folder is created.
    """
    if size < 1:
        raise ValueError(f"a micro-batch size is at least 1, not {size}")
    entries = _read_entries(directory)
    entry = entries.setdefault(record_key(key_fields), {})
    entry.update(size=size, trials=[asdict(trial) for trial in trials], depends_on=dict(key_fields))
    _write_entries(directory, entries)


def record_out_of_memory(
    directory: Path, key_fields: Mapping[str, Any], failed_size: int, candidates: Sequence[int]
) -> int:
    """Record that ``failed_size`` ran out of memory in the middle of a run; return the size the next start uses.

    ``candidates`` are the sizes the run may use, ascending (``micro_batch_candidates``); the bound is the next one
    below ``failed_size``. Any rank may call this, even several at once.

    Raises:
        RunError: there is no smaller candidate, or the record cannot be written.
    """
    position = bisect_left(candidates, failed_size)
    if position == 0:
        raise RunError(
            f"micro-batch size {failed_size} ran out of memory and no smaller one exists: use a smaller --block-size, "
            "a larger --tensor-parallel-size or --precision bf16"
        )
    entries = _read_entries(directory)
    entry = entries.setdefault(record_key(key_fields), {"depends_on": dict(key_fields)})
    entry["at_most"] = min(candidates[position - 1], entry.get("at_most", failed_size))
    _write_entries(directory, entries)
    return int(entry["at_most"])


def record_key(key_fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields as canonical JSON: their order does not matter, every value does.

    Raises:
        TypeError: a value is not a JSON type; its `str` is no substitute, since it might differ between starts.
        ValueError: a value is NaN or infinite.
    """
    canonical = json.dumps(dict(key_fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_entries(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / RECORD_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # a damaged file: JSONDecodeError and UnicodeDecodeError are ValueErrors
        logger.warning("%s is ignored: %s", path, message_line(error))
        return {}
    if not isinstance(content, dict) or content.get("version") != RECORD_VERSION:
        logger.warning("%s is ignored: it is no micro-batch record of version %d", path, RECORD_VERSION)
        return {}
    answers = content.get("answers")
    entries = answers if isinstance(answers, dict) else {}
    usable = {key: entry for key, entry in entries.items() if _is_usable(entry)}
    if not isinstance(answers, dict) or len(usable) < len(entries):
        logger.warning("%s: entries without a valid size are ignored", path)
    return usable


def _is_usable(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    sizes = [entry[name] for name in ("size", "at_most") if name in entry]
    return bool(sizes) and all(type(size) is int and size >= 1 for size in sizes)  # type(): True is an int


def _write_entries(directory: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    content = json.dumps({"version": RECORD_VERSION, "answers": entries}, indent=2, allow_nan=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / RECORD_NAME, content + "\n")
    except OSError as error:
        raise RunError(f"{directory / RECORD_NAME} cannot be written: {error.strerror or error}") from error
