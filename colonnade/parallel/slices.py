"""This rank's part of a parameter."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a `DTensor` parameter, as a plain tensor that autograd follows."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
