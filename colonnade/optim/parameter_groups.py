"""Which update each parameter gets: the only place that distinguishes parameters for an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from colonnade.parallel.sharding import is_vocabulary


@dataclass(frozen=True)
class ParameterGroups:
    """A model's parameters, each in one of three groups, in the order of the model.

    Attributes:
        hidden: weight matrices of hidden layers: the projections of attention and feed-forward.
        vocabulary: embedding and head, whose rows are tokens.
        vectors: norms and biases, which get no weight decay.
    """

    hidden: list[nn.Parameter]
    vocabulary: list[nn.Parameter]
    vectors: list[nn.Parameter]


class NamedParameters(Protocol):
    """The part of a model's interface that lists its parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter is the weight matrix of a hidden layer, which Muon updates."""
    return dimensions == 2 and not is_vocabulary(name)


def parameter_groups(model: NamedParameters) -> ParameterGroups:
    """Sort a model's parameters into groups by number of dimensions and by name; a tied one appears once."""
    groups = ParameterGroups([], [], [])
    for name, parameter in model.named_parameters():
        if is_hidden_matrix(name, parameter.ndim):
            groups.hidden.append(parameter)
        elif is_vocabulary(name):
            groups.vocabulary.append(parameter)
        else:
            groups.vectors.append(parameter)
    return groups
