"""Loading weights from a Hugging Face folder (safetensors); each rank reads only its shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from colonnade.checkpoint.state import named_parameters, parameter_aliases
from colonnade.errors import UsageError
from colonnade.parallel.sharding import is_vocabulary
from colonnade.runtime.vote import one_line

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
"""Buffers that older Hugging Face versions write; they are derived from the configuration."""

_DTYPES = ("F64", "F32", "F16", "BF16")


def load_hugging_face(folder: Path, *, model: nn.Module, vocabulary_size: int) -> None:
    """Read the weights of a Hugging Face folder into `model`. Each rank reads independently, without collectives.

    Values are converted to the parameters' dtype. Rows of embedding and head beyond the vocabulary are set to zero. If
    the model ties its head to the embedding, a head in the file is ignored, as in `transformers`.

    Args:
        folder: holds `model.safetensors`, or several files with an index.
        model: its parameters are `DTensor`s.
        vocabulary_size: number of rows that embedding and head have in the file.

    Raises:
        UsageError: a file is missing or damaged, or a parameter (named in the message) is missing, unknown or of
            another shape or kind. Names and shapes are checked before anything is changed.
    """
    places, files = _places(folder)
    parameters = named_parameters(model)
    tied = parameter_aliases(model).keys() - parameters.keys()
    sources = {name: file for name, file in places.items() if name not in tied and not name.endswith(DERIVED_BUFFERS)}
    for name, file in sources.items():
        if name not in parameters:
            raise UsageError(f"{file} has a parameter {name!r}, the model of this config.json has none")
    missing = sorted(parameters.keys() - sources.keys())
    if missing:
        raise UsageError(f"{folder} has no parameter {missing[0]!r}, the model of its config.json has one")
    for name, file in sources.items():
        _check(file, name, files[file], parameters[name], vocabulary_size)
    with torch.no_grad():
        for name, file in sources.items():
            try:
                copy_part(files[file].get_slice(name), parameters[name])
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{file} is damaged at {name!r}: {one_line(error)[:200]}") from error


def _places(folder: Path) -> tuple[dict[str, Path], dict[Path, Any]]:
    """The file that holds each tensor, and the opened files."""
    index, single = folder / INDEX_NAME, folder / WEIGHTS_NAME
    if single.exists():
        opened = _opened(single)
        return dict.fromkeys(opened.keys(), single), {single: opened}
    if not index.exists():
        others = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.safetensors")])
        found = f"; it holds {', '.join(others[:3])}, which is not read" if others else ""
        raise UsageError(f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}{found}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): folder / file for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is damaged: {one_line(error)[:200]}") from error
    files = {}
    for file in set(places.values()):
        if file.parent != folder:
            raise UsageError(f"{index} names {file}, which is not in its folder")
        files[file] = _opened(file)
        present = set(files[file].keys())
        lost = next((name for name, place in places.items() if place == file and name not in present), None)
        if lost is not None:
            raise UsageError(f"{file} lacks {lost!r}, which {INDEX_NAME} says it holds")
    return places, files


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged, or missing: {one_line(error)[:200]}") from error


def _check(file: Path, name: str, opened: Any, parameter: DTensor, vocabulary_size: int) -> None:
    part = opened.get_slice(name)
    shape, expected = tuple(part.get_shape()), tuple(parameter.shape)
    if is_vocabulary(name):
        expected = (vocabulary_size, *expected[1:])
    if shape != expected:
        raise UsageError(f"parameter {name!r} has shape {shape} in {file} and {expected} by its config.json")
    if part.get_dtype() not in _DTYPES:
        raise UsageError(f"parameter {name!r} is {part.get_dtype()} in {file}; only {', '.join(_DTYPES)} are read")


def copy_part(source: Any, parameter: DTensor) -> None:
    """Copy this rank's shard of `source` into `parameter`; rows that `source` lacks become zero.

    Args:
        source: a full tensor, or a slice of a safetensors file, which reads only what is indexed.
    """
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    rows = source.shape[0] if isinstance(source, Tensor) else source.get_shape()[0]
    local = parameter.to_local()
    filled = max(0, min(shape[0], rows - offset[0]))
    if filled:
        places = [slice(start, start + length) for start, length in zip(offset, shape, strict=True)]
        places[0] = slice(offset[0], offset[0] + filled)
        local[:filled].copy_(source[tuple(places)])
    local[filled:].zero_()
