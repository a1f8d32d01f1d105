"""The tensors of a model and its optimizer, under the flat names used in checkpoints.

    model.<parameter name>                  the parameter
    optimizer.<state>.<parameter name>      exp_avg, exp_avg_sq, step, ...

Optimizer state is keyed by the name of its parameter, so neither the order nor the number of parameter groups matters.
Only tensors are stored; values that are not tensors belong in the manifest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from colonnade.errors import RunError

MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."


def named_parameters(model: nn.Module) -> dict[str, DTensor]:
    """Parameters by name, each once: a tied one under its first name, those of a compiled module without `_orig_mod.`.

    Raises:
        RunError: a parameter is not a `DTensor` (its value could differ between ranks, and a checkpoint stores one
            value per name), or the model has persistent buffers, which a checkpoint does not store.
    """
    # torch.compile wraps a module in another one, which holds the original as _orig_mod.
    aliases = {name.replace("_orig_mod.", "") for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict():
        if name.replace("_orig_mod.", "") not in aliases:
            raise RunError(f"buffer {name!r} would be lost in a checkpoint; register it with persistent=False")
    parameters: dict[str, DTensor] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise RunError(f"parameter {name!r} is not a DTensor; a checkpoint cannot tell its ranks' values apart")
        parameters[name.replace("_orig_mod.", "")] = parameter
    return parameters


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def parameter_aliases(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter to its name in `named_parameters` (tied parameters have several names).

    A model without its own head ties it to the embedding: files of other programs may hold it under both names.
    """
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace("_orig_mod.", "")
        aliases[name] = first.setdefault(id(parameter), name)
    if EMBEDDING in aliases:
        aliases.setdefault(HEAD, aliases[EMBEDDING])
    return aliases


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, detached, by their names in a checkpoint; they share memory with the model."""
    return {MODEL_PREFIX + name: parameter.detach() for name, parameter in named_parameters(model).items()}


def optimized_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, tuple[DTensor, dict[str, object]]]:
    """The parameters that an optimizer updates, by name, each with its parameter group.

    Raises:
        RunError: the optimizer holds a parameter that is not in the model.
    """
    parameters = named_parameters(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise RunError(f"the optimizer updates a parameter of shape {tuple(parameter.shape)} not in the model")
            found[name] = (parameters[name], group)
    return found


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by its names in a checkpoint, sharing memory with it; empty before the first step.

    Raises:
        RunError: the state holds something other than tensors.
    """
    tensors = {}
    for name, (parameter, _) in optimized_parameters(model, optimizer).items():
        # .get, because looking up a parameter with [] would create an empty state.
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise RunError(f"optimizer state {key!r} of {name!r} is a {type(value).__name__}, not a tensor")
            tensors[f"{OPTIMIZER_PREFIX}{key}.{name}"] = value
    return tensors


def empty_state_tensor(
    key: str, shape: torch.Size, dtype: torch.dtype, parameter: DTensor, group: dict[str, object]
) -> Tensor:
    """A zero tensor for the optimizer state `key` of `parameter`, placed where torch's optimizers create it.

    A state of the parameter's shape has the parameter's device and placements. Any other state is a plain tensor that
    is equal on all ranks, on the parameter's device if the update reads it there (fused or capturable) and on the CPU
    otherwise (`torch.optim.Adam._init_group`).
    """
    if key != "step" and shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if key == "step" and group.get("fused"):
        dtype = torch.float32
    on_device = group.get("fused") or group.get("capturable")
    return torch.zeros(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
