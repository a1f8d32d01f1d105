"""This rank's part of a parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor


def pieces(tensor: Tensor, count: int, dim: int = 0) -> Sequence[Tensor]:
    """`tensor` cut into `count` equal pieces. One piece is the tensor itself: the backward pass of a cut copies."""
    return [tensor] if count == 1 else tensor.chunk(count, dim)


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a `DTensor` parameter, as a plain tensor that autograd follows."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
