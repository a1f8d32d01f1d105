"""Checking one setting's value against its field's metadata, and reading YAML files strictly."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from colonnade.errors import UsageError

MAX_MICRO_BATCH = 2**16

_KINDS = {"int": "a whole number", "float": "a finite number", "str": "text", "bool": "true or false"}
# Shortens a value in error messages: a file may hold megabytes where a number was expected.
brief = reprlib.Repr()
brief.maxstring = brief.maxother = brief.maxlong = 100
brief.maxlevel = 2


# In abfs:// URLs, what stands before the @ is the container.
_USERINFO = re.compile(r"\b((?!abfss?:|wasbs?:)[a-z][a-z0-9+.-]*://)[^/,\s]*@", re.IGNORECASE)
# A question mark stands for any character, unless an equals sign or a single word follows. The weight of a corpus may
# come behind it.
_QUERY = re.compile(
    r"(https?://[^\s,#=]*?)(?:\?(?=[^\s,]*=|[^\s,.*/]+(?:[\s,]|$))|#)[^\s,]*?(?=(?::[0-9.]+)?(?:[\s,]|$))",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """`text`, such as a data pattern, without the user names, passwords and query strings of the URLs in it."""
    return _QUERY.sub(r"\1", _USERINFO.sub(r"\1", text))


def check_field(spec: dataclasses.Field[Any], value: Any, source: str) -> Any:
    """Check one value and convert it to its field's type. `source` is the flag or key the user wrote.

    Raises:
        UsageError: names `source`, the value and the limit.
    """
    kind = str(spec.type).split(" | ")[0]
    if value is None and "None" in str(spec.type):
        return None
    if spec.name == "initial_batch_size":
        return _check_batch_size(value, source)
    if spec.name == "wall_time":
        return _check_wall_time(value, source)
    try:
        value = _convert(kind, value, _SUFFIXES if spec.name in _COUNTS_OF_TOKENS else {})
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{source} is {brief.repr(value)}; it must be {_KINDS[kind]}") from None
    limits = spec.metadata
    value = limits.get("aliases", {}).get(value, value) if kind == "str" else value
    for broken, limit in (
        (kind == "str" and not value.strip(), "some text, or left out"),
        ("minimum" in limits and value < limits["minimum"], f"at least {limits.get('minimum')}"),
        (
            "minimum_above_zero" in limits and 0 < value < limits["minimum_above_zero"],
            f"0, or at least {limits.get('minimum_above_zero')}",
        ),
        ("above" in limits and value <= limits["above"], f"above {limits.get('above')}"),
        ("below" in limits and value >= limits["below"], f"below {limits.get('below')}"),
        ("maximum" in limits and value > limits["maximum"], f"at most {limits.get('maximum')}"),
        ("choices" in limits and value not in limits["choices"], f"one of {', '.join(limits.get('choices', ()))}"),
    ):
        if broken:
            raise UsageError(f"{source} is {brief.repr(value)}; it must be {limit}")
    return value


def _convert(kind: str, value: Any, suffixes: Mapping[str, int]) -> Any:
    if kind == "bool":
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind == "str":
        if not isinstance(value, str) or "\0" in value:
            raise TypeError
        return value
    # Text may be a number: YAML 1.1 reads 1e-3 as text, and flags are always text. In Python a bool is an int, so it is
    # excluded.
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TypeError
    if kind == "int":
        return _whole_number(value, suffixes)
    number = float(value)
    if not abs(number) < float("inf"):
        raise ValueError
    return number


# What a count of tokens may end in. A block's size may not: there K could mean 1024.
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNTS_OF_TOKENS = ("tokens", "tokens_per_step", "max_tokens")
# No setting allows a number with so many digits, and to write out 1e999999999 would take for ever.
_MOST_DIGITS = 100


def _whole_number(value: str | float, suffixes: Mapping[str, int]) -> int:
    """The whole number that is written, as 2000000, 2e6, 2000000.0 or 2M, exactly. Raises ValueError."""
    factor = 1
    if isinstance(value, str) and value[-1:].upper() in suffixes:
        value, factor = value[:-1], suffixes[value[-1:].upper()]
    try:
        written = Decimal(value)
    except InvalidOperation:
        raise ValueError from None
    if not written.is_finite() or abs(written.adjusted()) > _MOST_DIGITS:
        raise ValueError
    number = Fraction(written) * factor  # exact, where a product of Decimals is rounded
    if number.denominator != 1:
        raise ValueError
    return int(number)


def _check_batch_size(value: Any, source: str) -> str:
    text = str(value) if isinstance(value, str | int) else ""
    if text == "auto":
        return text
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MAX_MICRO_BATCH):
        raise UsageError(
            f"{source} is {brief.repr(value)}; it must be auto or a number of sequences from 1 to {MAX_MICRO_BATCH}"
        )
    return str(int(text))


_WALL_TIME = re.compile(r"(?:([0-9]{1,3})-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])")
_SHORT_TIME = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _check_wall_time(value: Any, source: str) -> str:
    # YAML 1.1 reads 04:00:00 as a base-60 integer.
    seconds = value if type(value) is int else None
    if isinstance(value, str) and (short := _SHORT_TIME.fullmatch(value)):
        seconds = int(short[1]) * _SECONDS[short[2]]
    if seconds is not None and seconds >= 0:
        days = f"{seconds // 86400}-" if seconds >= 86400 else ""
        value = f"{days}{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    if not (isinstance(value, str) and _WALL_TIME.fullmatch(value) and wall_time_seconds(value) > 0):
        raise UsageError(f"{source} is {brief.repr(value)}; it must be a time above zero as [DAYS-]HH:MM:SS, 30m or 2h")
    return value


def wall_time_seconds(text: str) -> int:
    """A validated `--wall-time` in seconds."""
    match = _WALL_TIME.fullmatch(text)
    assert match is not None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def divisors(number: int) -> list[int]:
    """All divisors of a number >= 1, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def multiples_near(value: int, step: int) -> list[int]:
    """The multiples of `step` just below and above `value`, which is not one itself; 0 is left out."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple]


class _Loader(yaml.SafeLoader):
    """Loads YAML's plain types only and rejects duplicate keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, source: str) -> dict[Any, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"{source} {path}: cannot be read ({error.strerror})") from error
    # PyYAML raises ValueError for impossible dates and numbers; text that is not UTF-8 raises one as well.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{source} {path}: not YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{source} {path}: holds no mapping of setting names to values")
    return values


def flag_of(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def useless_alone(name: str, needed: str) -> UsageError:
    """The error to raise if `name` was given but has no effect without `needed`."""
    return UsageError(f"{flag_of(name)} does nothing without {flag_of(needed)}: give both, or neither")
