"""Keys and values of the tokens a model has seen, so that each new token is computed alone.

Shapes: B rows of a batch, S places (the longest row, with room for what is generated), T new tokens, k key/value heads
of one slice, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class KeyValueCache:
    """The keys and values of every layer and local slice, and how far they are filled.

    Rows of unequal length end at the same place and begin after padding on the left.

    Args:
        places: S, the tokens there is room for.
        padding: int64 [B], places at the beginning of each row that hold no token.
        keeps_weights: hold the weights as slices need them from the first token on. Not where data-parallel ranks share
            out the parameters: each would soon hold them all.
    """

    def __init__(self, places: int, padding: Tensor, *, keeps_weights: bool = True) -> None:
        self.places, self.padding = places, padding
        self.filled = 0
        self._is_padded = bool(padding.any())
        self._stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._keeps_weights = keeps_weights
        self._weights: dict[object, Any] = {}

    def once(self, part: object, cut: Callable[[], T]) -> T:
        """The weights of a part of the model as its slices need them; where they are kept, cut and cast once."""
        if not self._keeps_weights:
            return cut()
        if part not in self._weights:
            self._weights[part] = cut()
        return cast(T, self._weights[part])

    def positions(self, count: int) -> Tensor:
        """int64 [B, T]: each new token's distance from the beginning of its row; 0 for padding."""
        index = torch.arange(self.filled, self.filled + count, device=self.padding.device)
        return (index - self.padding.unsqueeze(1)).clamp_min_(0)

    def visible(self, count: int) -> Tensor | None:
        """bool [B, 1, T, filled + T], which places each new token attends to; None: to all up to its own."""
        if not self._is_padded and (count == 1 or self.filled == 0):
            return None
        end = self.filled + count
        place = torch.arange(end, device=self.padding.device)
        causal = place <= place[self.filled :, None]
        seen = causal & (place >= self.padding[:, None, None])
        # A row of padding that saw nothing would be NaN: let it see itself.
        itself = place == place[self.filled :, None]
        return (seen | itself).unsqueeze(1)

    def extend(self, layer: int, slice_: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, k, T, D] behind what is there, and return all of it: [B, k, filled + T, D].

        `advance` moves on, after all layers have stored theirs.
        """
        batch, heads, count, size = key.shape
        if (layer, slice_) not in self._stored:
            shape = (batch, heads, self.places, size)
            self._stored[layer, slice_] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._stored[layer, slice_]
        end = self.filled + count
        keys[:, :, self.filled : end] = key
        values[:, :, self.filled : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """`count` tokens are stored in every layer."""
        self.filled += count
