"""Which update each parameter takes: the one place where parameters are told apart for an optimizer."""

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
        hidden: matrices between two layers of activations: the projections of attention and feed-forward.
        vocabulary: embedding and head, whose rows are tokens.
        vectors: norms and biases. They take no weight decay.
    """

    hidden: list[nn.Parameter]
    vocabulary: list[nn.Parameter]
    vectors: list[nn.Parameter]


class NamedParameters(Protocol):
    """A model, as far as its parameters go."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter lies between two layers of activations: what Muon updates."""
    return dimensions == 2 and not is_vocabulary(name)


def parameter_groups(model: NamedParameters) -> ParameterGroups:
    """Sort a model's parameters by number of dimensions and by name; a tied one is told once."""
    groups = ParameterGroups([], [], [])
    for name, parameter in model.named_parameters():
        if is_hidden_matrix(name, parameter.ndim):
            groups.hidden.append(parameter)
        elif is_vocabulary(name):
            groups.vocabulary.append(parameter)
        else:
            groups.vectors.append(parameter)
    return groups
