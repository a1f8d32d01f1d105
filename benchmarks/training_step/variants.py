"""Parsing the variants of our own step that a benchmark's command line asks for."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from colonnade.errors import UsageError
from colonnade.run_settings import CHECKPOINTING
from model import TensorParallelModel


def parsed_variants(
    texts: Sequence[str], reserved: Collection[str], also: Collection[str] = (), *, device_type: str
) -> dict[str, dict[str, Any]]:
    """Keyword arguments of the model for each variant, by its name, parsed from NAME:KEY=VALUE,KEY=VALUE.

    Args:
        texts: the variants.
        reserved: names with another meaning.
        also: keys that the benchmark itself takes, with text as their value.
        device_type: cuda or cpu.

    Raises:
        UsageError: a variant has another form, a name that is taken, or a key or value that the model does not take.
    """
    variants: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, _, pairs = text.partition(":")
        if not name or name in reserved or "/" in name:
            taken = ", ".join(map(repr, reserved))
            raise UsageError(f"--variant {text!r}: the name before the colon may not be empty, {taken} or hold a /")
        if name in variants:
            raise UsageError(f"--variant {text!r}: there is one of that name already; give each its own")
        variants[name] = dict(_option(text, pair, also) for pair in pairs.split(",") if pair)
        if variants[name].get("cuda_graphs") and device_type != "cuda":
            raise UsageError(f"--variant {text!r}: cuda_graphs are for a GPU; leave them out")
    return variants


def _option(text: str, pair: str, also: Collection[str]) -> tuple[str, Any]:
    parameters = inspect.signature(TensorParallelModel).parameters.items()
    defaults = {
        key: parameter.default
        for key, parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not key.endswith("dtype")
    }
    defaults |= dict.fromkeys(also, "")
    key, equals, given = pair.partition("=")
    if key not in defaults or not equals:
        raise UsageError(f"--variant {text!r}: {pair!r} is not KEY=VALUE with a KEY of {', '.join(defaults)}")
    value = yaml.safe_load(given)
    wanted = int if defaults[key] is None else type(defaults[key])
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[wanted]
        raise UsageError(f"--variant {text!r}: {key} is {given!r}; it takes {kind}")
    if key == "activation_checkpointing" and value not in CHECKPOINTING:
        raise UsageError(f"--variant {text!r}: {key} is {given!r}; it is one of {', '.join(CHECKPOINTING)}")
    return key, value
