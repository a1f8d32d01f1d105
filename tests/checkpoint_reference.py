"""A small sharded model, and the dense run it is compared with: full tensors and one torch AdamW, without ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

# 11 rows and 5 columns are not divisible by 2, which gives uneven shards.
PARAMETERS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "model.embed_tokens.weight": ((11, 4), Shard(0)),
    "model.layers.0.up_proj.weight": ((5, 4), Shard(0)),
    "model.layers.0.down_proj.weight": ((4, 5), Shard(1)),
    "model.norm.weight": ((4,), Replicate()),
    "lm_head.weight": ((11, 4), Shard(0)),
}


def values(seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random full value for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _) in PARAMETERS.items()}


def mesh(dp: int = 1) -> DeviceMesh:
    return init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))["tp"]


def cut_model(weights: dict[str, Tensor], tp_mesh: DeviceMesh) -> nn.Module:
    """A module tree with `weights` as its parameters, sharded over `tp_mesh`."""
    root = nn.Module()
    for name, value in weights.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        placement = PARAMETERS[name][1] if name in PARAMETERS else Replicate()
        module.register_parameter(leaf, nn.Parameter(distribute_tensor(value, tp_mesh, [placement])))
    return root


def adamw(parameters: dict[str, nn.Parameter], *, reverse: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; `reverse` reverses the parameter order and uses three groups."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    others = [parameter for parameter in parameters.values() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if reverse:
        groups = [
            {"params": others[::-1], "weight_decay": 0.0},
            {"params": decayed[::-1][:1], "weight_decay": 0.1},
            {"params": decayed[::-1][1:], "weight_decay": 0.1},
        ]
    return torch.optim.AdamW(groups, lr=1e-2)


def train(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Take steps `first` to `last`, with gradients that are a function of the step alone."""
    for step in range(first, last + 1):
        for name, gradient in values(1000 + step).items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = gradient.clone()
        optimizer.step()


def dense_run(last: int, seed: int = 0) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """Parameters and optimizer of a run without ranks after `last` uninterrupted steps."""
    parameters = {name: nn.Parameter(value) for name, value in values(seed).items()}
    optimizer = adamw(parameters)
    train(parameters, optimizer, 1, last)
    return parameters, optimizer


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sharded tensor (collective); a plain tensor is returned unchanged."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def assert_same_run(model: nn.Module, optimizer: torch.optim.Optimizer | None, last: int, seed: int = 0) -> None:
    """Assert that parameters, and optimizer state if given, are bit-identical to the dense run's. Collective."""
    expected, reference = dense_run(last, seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), expected[name].detach()), name
        if optimizer is None:
            continue
        state, wanted = optimizer.state[parameter], reference.state[expected[name]]
        assert state.keys() == wanted.keys()
        for key, value in state.items():
            assert torch.equal(whole(value), wanted[key]), (name, key)
            assert value.dtype == wanted[key].dtype
