"""Restoring a model and its optimizer from a checkpoint folder, at any world size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from colonnade.checkpoint.manifest import Manifest, read_complete_manifest
from colonnade.checkpoint.safe_reader import SafeFileSystemReader
from colonnade.checkpoint.save import failure_line
from colonnade.checkpoint.state import (
    MODEL_PREFIX,
    OPTIMIZER_PREFIX,
    empty_state_tensor,
    model_tensors,
    optimized_parameters,
)
from colonnade.errors import RunError, UsageError
from colonnade.runtime.vote import vote

_Stored = Mapping[str, TensorStorageMetadata]
_States = dict[str, dict[str, Tensor]]  # parameter name -> state name -> tensor


def load_model_and_optimizer(
    checkpoint: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Restore `model`, and `optimizer` if given, in place, into the shards of the current mesh. Collective.

    The world size may differ from that of the save. With an optimizer, the restored state is bitwise equal to the saved
    one, even if the optimizer has not taken a step yet. Its hyperparameters (`param_groups`) are left unchanged.
    Without an optimizer, only the model is read, and stored values are converted to the dtype of its parameters.

    Args:
        checkpoint: a checkpoint's folder.
        model: its parameters are `DTensor`s.
        optimizer: over the model's parameters; None to read the model only.
        group: the ranks that load together; None for all.

    Raises:
        UsageError: the checkpoint is damaged, would run code, or does not fit (the message names the parameter and both
            shapes). Model and optimizer are unchanged.
        RunError: reading failed on some rank after the checks; the model may hold part of the checkpoint.
    """
    states: _States = {}
    tensors: dict[str, Tensor] = {}
    with vote(group):
        manifest = read_complete_manifest(checkpoint)
        reader = SafeFileSystemReader(checkpoint, manifest.files)
        stored = reader.read_checked_metadata()
        tensors = model_tensors(model)
        _check_model(checkpoint, stored, tensors, exact=optimizer is not None)
        if optimizer is not None:
            _check_optimizer(checkpoint, manifest, optimizer)
            states = _optimizer_states(checkpoint, stored, model, optimizer)
    for name, state in states.items():
        tensors |= {f"{OPTIMIZER_PREFIX}{key}.{name}": tensor for key, tensor in state.items()}
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise RunError(f"{checkpoint} could not be read: {_why_unreadable(error)}") from error
    if optimizer is not None:
        for name, (parameter, _) in optimized_parameters(model, optimizer).items():
            optimizer.state.pop(parameter, None)
            if name in states:
                optimizer.state[parameter] = states[name]


def _why_unreadable(error: BaseException) -> str:
    """As `failure_line`, but without torch's advice to load a damaged file of tensors with `weights_only=False`."""
    if isinstance(error, CheckpointException):
        for rank, (cause, _) in sorted(error.failures.items()):
            if isinstance(cause, UnpicklingError):
                return f"rank {rank}: a file of tensors is damaged, or holds something else"
    return failure_line(error)


def _check_model(checkpoint: Path, stored: _Stored, tensors: Mapping[str, Tensor], *, exact: bool) -> None:
    for key, tensor in tensors.items():
        name = key.removeprefix(MODEL_PREFIX)
        entry = stored.get(key)
        if entry is None:
            raise UsageError(
                f"{checkpoint} has no parameter {name!r}, which this model has with {_shape(tensor.shape)}"
            )
        if entry.size != tensor.shape:
            raise UsageError(
                f"parameter {name!r} has {_shape(entry.size)} in {checkpoint} and {_shape(tensor.shape)} in this model"
            )
        if exact and entry.properties.dtype != tensor.dtype:
            raise UsageError(
                f"parameter {name!r} is {entry.properties.dtype} in {checkpoint} and {tensor.dtype} in this model; "
                "an exact continuation needs the same dtype"
            )
    for key, entry in stored.items():
        if key.startswith(MODEL_PREFIX) and key not in tensors:
            name = key.removeprefix(MODEL_PREFIX)
            raise UsageError(f"{checkpoint} has a parameter {name!r} with {_shape(entry.size)}, this model has none")


def _check_optimizer(checkpoint: Path, manifest: Manifest, optimizer: Optimizer) -> None:
    present = type(optimizer).__name__
    if manifest.optimizer is None:
        raise UsageError(f"{checkpoint} holds no optimizer state; load the model alone and start a fresh {present}")
    if manifest.optimizer != present:
        raise UsageError(
            f"{checkpoint} holds the state of {manifest.optimizer}, this run uses {present}; "
            "load the model alone and start a fresh optimizer"
        )


def _optimizer_states(checkpoint: Path, stored: _Stored, model: nn.Module, optimizer: Optimizer) -> _States:
    """A tensor to read into for each stored optimizer state: the live one if it fits, else a new one.

    New tensors are not attached to the optimizer yet. They are not created by taking a step, because it would count.
    """
    parameters = optimized_parameters(model, optimizer)
    states: _States = {}
    for key, entry in stored.items():
        if not key.startswith(OPTIMIZER_PREFIX):
            continue
        state, _, name = key.removeprefix(OPTIMIZER_PREFIX).partition(".")
        if name not in parameters:
            raise UsageError(f"{checkpoint} has optimizer state {state!r} of {name!r}, which this optimizer lacks")
        parameter, group = parameters[name]
        if entry.size not in (parameter.shape, torch.Size([])):
            raise UsageError(
                f"optimizer state {state!r} of {name!r} has {_shape(entry.size)} in {checkpoint}, "
                f"its parameter has {_shape(parameter.shape)}"
            )
        live: Any = optimizer.state.get(parameter, {}).get(state)
        if not (isinstance(live, Tensor) and live.shape == entry.size and live.dtype == entry.properties.dtype):
            live = empty_state_tensor(state, entry.size, entry.properties.dtype, parameter, group)
        states.setdefault(name, {})[state] = live
    return states


def _shape(size: torch.Size) -> str:
    return f"shape {tuple(size)}"
