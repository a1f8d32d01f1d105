"""Variants of our own step, as the command line of a benchmark names them."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import yaml

from colonnade.errors import UsageError
from model import TensorParallelModel

HELP = "ours with these keyword arguments of TensorParallelModel; may be given again"


def parsed_variant(text: str, reserved: Collection[str], also: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments of the model) from NAME:KEY=VALUE,KEY=VALUE.

    Args:
        reserved: names that mean something else.
        also: keys that the benchmark itself takes.

    Raises:
        UsageError: it is not of that form, or names what is not known.
    """
    name, _, pairs = text.partition(":")
    if not name or name in reserved or "/" in name:
        raise UsageError(
            f"--variant {text!r}: the name before the colon may not be empty, {', '.join(map(repr, reserved))} or hold "
            "a /"
        )
    parameters = inspect.signature(TensorParallelModel).parameters.items()
    known = [
        key
        for key, parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not key.endswith("dtype")
    ]
    known += also
    options = {}
    for pair in filter(None, pairs.split(",")):
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            raise UsageError(f"--variant {text!r}: {pair!r} is not KEY=VALUE with a KEY of {', '.join(known)}")
        options[key] = yaml.safe_load(value)
    return name, options
