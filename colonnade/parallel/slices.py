"""This rank's part of a parameter, and its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def pieces(tensor: Tensor, count: int, dim: int = 0) -> Sequence[Tensor]:
    """`tensor` cut into `count` equal pieces; a single piece is `tensor` itself, since `chunk` copies in backward."""
    return [tensor] if count == 1 else tensor.chunk(count, dim)


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a `DTensor` parameter, as a plain tensor that autograd tracks."""
    assert isinstance(parameter, DTensor)
    part: Tensor = _LocalPart.apply(parameter)
    return part


class _LocalPart(torch.autograd.Function):
    """`DTensor.to_local`, with a gradient that reuses the parameter's `DTensor` specification.

    `to_local` creates a new specification for each gradient, which takes longer than computing a small gradient.
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
        # Contiguous, as the specification says: autograd relies on its strides when it keeps the gradient.
        return DTensor(gradient.contiguous(), ctx.specification, requires_grad=False)
