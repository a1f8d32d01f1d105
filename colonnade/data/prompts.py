"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path

from colonnade.errors import UsageError


def prompts_in(path: Path, flag: str) -> list[str]:
    """The prompts of a file: its non-blank lines, or the `prompt` of each object in a `.jsonl` file.

    In a text file `\\n` is two characters; a multi-line prompt needs a `.jsonl` file.

    Raises:
        UsageError: the file cannot be read, has no prompts or has a bad line; the message names `flag` and the line.
    """
    try:
        # Not `splitlines`: U+2028 and others may stand in a line of JSON. A byte order mark is not part of the text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is not UTF-8 text (byte {error.start})") from error
    if path.suffix == ".jsonl":
        prompts = [
            _prompt_of(line, f"{flag} {path} line {number}") for number, line in enumerate(lines, 1) if line.strip()
        ]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{flag} {path} holds no prompts; give one a line")
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UsageError(f"{place} has no text under the key 'prompt'")
    return str(row["prompt"])
