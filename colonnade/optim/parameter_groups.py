"""Which update each parameter takes: the one place where parameters are told apart for an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

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


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Sort a model's parameters by number of dimensions and by name; a tied one is told once."""
    groups = ParameterGroups([], [], [])
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            groups.vectors.append(parameter)
        elif is_vocabulary(name):
            groups.vocabulary.append(parameter)
        else:
            groups.hidden.append(parameter)
    return groups
