"""How far two sets of tensors by one name are apart, as relative norms, and which tensor is the worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Norms(NamedTuple):
    """L2 norms, summed in float64: of what a tensor differs by, and of what was expected; and its elements."""

    difference: float
    expected: float
    elements: int


@dataclass(frozen=True)
class Difference:
    """A relative difference, and the tensor it is that of."""

    value: float
    name: str


def differences(tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, Tensor] | None) -> dict[str, Norms]:
    """The norms of each tensor; infinite where nothing is expected by its name.

    Every tensor is gone through, since gathering it may be collective: also where `expected` is None, on ranks that
    compare nothing. Those get an empty answer.
    """
    found = {}
    for name, tensor in tensors:
        if expected is not None:
            wanted = expected.get(name)
            if wanted is None:
                found[name] = Norms(math.inf, 0.0, tensor.numel())
            else:
                wanted = wanted.to(tensor.device)
                found[name] = Norms(_norm(tensor - wanted), _norm(wanted), tensor.numel())
    return found


def worst_of(found: Mapping[str, Norms], *, at_least_average: bool = False) -> Difference:
    """The largest of the differences, each over the norm of what was expected.

    Args:
        at_least_average: over no less than the tensor would have if its elements were of the average size of all. For
            parameters: a bias that began at 0 is nothing but its first updates.
    """
    average = 0.0
    if at_least_average:
        squares = sum(norms.expected**2 for norms in found.values())
        average = math.sqrt(squares / sum(norms.elements for norms in found.values()))
    ratios = {
        name: _ratio(norms.difference, max(norms.expected, average * math.sqrt(norms.elements)))
        for name, norms in found.items()
    }
    # A NaN is worse than any number, and no comparison finds it.
    name = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
    return Difference(ratios[name], name)


def relative(expected: float, actual: float) -> float:
    """The difference of two numbers over the expected one; 0 for equal ones, infinite for another than 0."""
    return _ratio(abs(actual - expected), abs(expected))


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _norm(tensor: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
