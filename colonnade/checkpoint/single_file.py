"""Loading weights from one `.pth` file with full tensors; each rank takes only its shard."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colonnade.checkpoint.hugging_face import DERIVED_BUFFERS, copy_part
from colonnade.checkpoint.state import named_parameters, parameter_aliases
from colonnade.errors import UsageError
from colonnade.parallel.sharding import is_vocabulary
from colonnade.runtime.vote import one_line

WEIGHTS_KEY = "model_state_dict"
_REMEDY = "give the --preset or --model-config these weights belong to"


def load_single_file(path: Path, *, model: nn.Module, vocabulary_size: int | None = None) -> int | None:
    """Read the weights of a `.pth` file with a `model_state_dict` into `model`. Each rank reads independently, without
    collectives.

    Tensors are full (not sharded) and have Hugging Face names, possibly prefixed with `_orig_mod.` or `module.`. The
    file is memory-mapped, so a rank touches only the pages of its own shards. Values are converted to the parameters'
    dtype. Embedding and head may have fewer rows than the parameter (a vocabulary without padding); the remaining rows
    are set to zero.

    Args:
        path: the file.
        model: its parameters are `DTensor`s.
        vocabulary_size: minimum number of rows of embedding and head; None accepts any number.

    Returns:
        The file's `global_step` or `step`; None if it has neither.

    Raises:
        UsageError: the file cannot be read without running code, is damaged or has no weights, or a parameter is
            missing, unknown or of another shape (the message gives both shapes). The model is then unchanged.
    """
    content = _load(path)
    weights = content.get(WEIGHTS_KEY)
    if not isinstance(weights, Mapping):
        raise UsageError(
            f"{path} has no {WEIGHTS_KEY!r}; it has {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
        )
    parameters = named_parameters(model)
    sources = _match(path, weights, parameters, parameter_aliases(model), vocabulary_size)
    with torch.no_grad():
        for name, source in sources.items():
            copy_part(source, parameters[name])
    return next((content[key] for key in ("global_step", "step") if type(content.get(key)) is int), None)


def _load(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            # torch 2.11 warns about every sparse tensor; here they are refused with a one-line error.
            warnings.filterwarnings("ignore", message="Sparse invariant checks")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{named.group(1)}, which could run code" if named else "objects that are not tensors or plain values"
        raise UsageError(f"{path} is refused: it asks for {what}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is damaged, or was not written by torch.save: {one_line(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a mapping with {WEIGHTS_KEY!r}")
    return content


def _match(
    path: Path,
    weights: Mapping[Any, Any],
    parameters: Mapping[str, DTensor],
    aliases: Mapping[str, str],
    vocabulary_size: int | None,
) -> dict[str, Tensor]:
    """For each parameter the file's tensor, after a check of every name and shape."""
    sources: dict[str, Tensor] = {}
    for raw_name, tensor in weights.items():
        name = _without_wrappers(str(raw_name))
        if name.endswith(DERIVED_BUFFERS):
            continue
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UsageError(f"{path}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}, not of plain numbers")
        target = aliases.get(name)
        if target is None:
            raise UsageError(
                f"{path} has a parameter {name!r} with shape {tuple(tensor.shape)}, this model has none; {_REMEDY}"
            )
        earlier = sources.setdefault(target, tensor)
        if earlier is not tensor and not torch.equal(earlier, tensor):
            raise UsageError(f"{path}: {name!r} differs from {target!r}, with which this model ties it; {_REMEDY}")
    for name, parameter in parameters.items():
        source = sources.get(name)
        if source is None:
            raise UsageError(
                f"{path} has no parameter {name!r}, this model has it with shape {tuple(parameter.shape)}; {_REMEDY}"
            )
        if not _fits(name, source, parameter, vocabulary_size):
            raise UsageError(
                f"parameter {name!r} has shape {tuple(source.shape)} in {path} "
                f"and {tuple(parameter.shape)} in this model; {_REMEDY}"
            )
    return sources


def _without_wrappers(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _fits(name: str, source: Tensor, parameter: DTensor, vocabulary_size: int | None) -> bool:
    if source.shape == parameter.shape:
        return True
    if not is_vocabulary(name) or source.shape[1:] != parameter.shape[1:]:
        return False
    return (vocabulary_size or 1) <= source.shape[0] < parameter.shape[0]
