"""How far apart two sets of named tensors are, as relative norms, and which tensor differs the most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Norms(NamedTuple):
    """L2 norms, accumulated in float64, of a tensor's difference and of its expected value; and its element count."""

    difference: float
    expected: float
    elements: int


@dataclass(frozen=True)
class Difference:
    """A relative difference, and the name of the tensor that has it."""

    value: float
    name: str


def differences(tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, Tensor] | None) -> dict[str, Norms]:
    """The norms of each tensor; the difference is infinite if `expected` has no tensor of that name.

    Always iterates over every tensor, since producing it may be a collective. Ranks that compare nothing pass None as
    `expected` and get an empty answer.
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
    """The largest of the differences, each divided by the norm of what was expected.

    Args:
        at_least_average: divide by at least the norm the tensor would have if its elements had the root-mean-square
            size of all elements. For parameters: a bias that started at 0 consists of nothing but its first updates.
    """
    average = 0.0
    if at_least_average:
        squares = sum(norms.expected**2 for norms in found.values())
        average = math.sqrt(squares / sum(norms.elements for norms in found.values()))
    ratios = {
        name: _ratio(norms.difference, max(norms.expected, average * math.sqrt(norms.elements)))
        for name, norms in found.items()
    }
    # A NaN counts as worse than any number; max() alone would miss it, since comparisons with NaN are false.
    name = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
    return Difference(ratios[name], name)


def relative(expected: float, actual: float) -> float:
    """The difference of two numbers relative to the expected one; 0 if they are equal, infinite if only it is 0."""
    return _ratio(abs(actual - expected), abs(expected))


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _norm(tensor: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
