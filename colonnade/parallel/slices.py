"""This rank's part of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def pieces(tensor: Tensor, count: int, dim: int = 0) -> Sequence[Tensor]:
    """`tensor` cut into `count` equal pieces. One piece is the tensor itself: the backward pass of a cut copies."""
    return [tensor] if count == 1 else tensor.chunk(count, dim)


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a `DTensor` parameter, as a plain tensor that autograd follows."""
    assert isinstance(parameter, DTensor)
    part: Tensor = _LocalPart.apply(parameter)
    return part


class _LocalPart(torch.autograd.Function):
    """`DTensor.to_local`, whose gradient takes over the parameter's specification.

    `to_local` makes a new one for each gradient, which takes longer than all that is computed for a small one.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.specification = parameter._spec
        ctx.set_materialize_grads(False)
        local = parameter._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> DTensor | None:
        if gradient is None:
            return None
        # The specification says how its memory is laid out, too: autograd goes by that when it keeps the gradient.
        return DTensor(gradient.contiguous(), ctx.specification, requires_grad=False)
