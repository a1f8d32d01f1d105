"""Keys and values of the tokens a model has seen, so that only new tokens have to be computed.

Shapes: B rows of a batch, S places (the longest row plus room for generated tokens), T new tokens, k key/value heads of
one slice, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class KeyValueCache:
    """The keys and values of every layer and local slice, and how far they are filled.

    Rows of unequal length are padded on the left, so that they all end at the same place.

    Args:
        places: S, the number of tokens there is room for.
        padding: int64 [B], the number of places at the beginning of each row that hold no token.
        keeps_weights: from the first token on, keep the weights in the form that slices need. Must be off if
            data-parallel ranks shard the parameters, or each rank would soon hold all of them.
    """

    def __init__(self, places: int, padding: Tensor, *, keeps_weights: bool = True) -> None:
        self.places, self.padding = places, padding
        self.filled = 0
        self._is_padded = bool(padding.any())
        self._stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._keeps_weights = keeps_weights
        self._weights: dict[object, Any] = {}

    def once(self, part: object, cut: Callable[[], T]) -> T:
        """A part of the model's weights in the form that slices need; with `keeps_weights`, `cut` runs only once."""
        if not self._keeps_weights:
            return cut()
        if part not in self._weights:
            self._weights[part] = cut()
        return cast(T, self._weights[part])

    def positions(self, count: int) -> Tensor:
        """int64 [B, T]: each new token's distance from the first token of its row; 0 for padding."""
        index = torch.arange(self.filled, self.filled + count, device=self.padding.device)
        return (index - self.padding.unsqueeze(1)).clamp_min_(0)

    def visible(self, count: int) -> Tensor | None:
        """bool [B, 1, T, filled + T]: which places each new token attends to; None for all places up to its own."""
        if not self._is_padded and (count == 1 or self.filled == 0):
            return None
        end = self.filled + count
        place = torch.arange(end, device=self.padding.device)
        causal = place <= place[self.filled :, None]
        seen = causal & (place >= self.padding[:, None, None])
        # A padding token that attended to nothing would give NaN, so let it attend to itself.
        itself = place == place[self.filled :, None]
        return (seen | itself).unsqueeze(1)

    def extend(self, layer: int, slice_: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values [B, k, T, D], and return all of them: [B, k, filled + T, D].

        Call `advance` once all layers have stored theirs.
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
        """Note that `count` new tokens are stored in every layer."""
        self.filled += count
