"""Keeping the ids of special tokens out of encoded text, whatever the text spells.

The libraries can be told not to look for special tokens in text. That is not enough where a special token is also an
entry of the ordinary vocabulary (Unigram and word-level models): then its spelling is encoded as the token all the
same, and so is text that a normalizer turns into it, such as `</S>` where letters are lowered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from colonnade.data.flat_ids import FlatIds, to_flat, to_lists
from colonnade.errors import UsageError

Encode = Callable[[list[str]], FlatIds]

_WHITE_SPACE = [" ", "\t", "\n", "\r"]


class ControlTokens:
    """The special tokens of a tokenizer that plain text must not be encoded as.

    Attributes:
        spellings: of all of them.
    """

    def __init__(self, tokens: Mapping[str, int], encode: Encode, name: str) -> None:
        """Find out which of the tokens (spelling to id) get into plain text as `encode` encodes it.

        Args:
            name: the tokenizer, for the error message.

        Raises:
            UsageError: a token's spelling is a single character, so that it cannot be cut apart.
        """
        self.spellings = [*tokens]
        leaking = _leaking_spellings(tokens, encode)
        for token in leaking:
            if len(token) == 1:
                raise UsageError(
                    f"tokenizer {name!r} encodes the plain text {token!r} as its special token {tokens[token]}; use a "
                    "tokenizer whose special tokens are not part of its ordinary vocabulary"
                )
        longest_first = sorted(leaking, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first))) if leaking else None
        # A token that a normalizer makes of white space, mostly of a line end, stands for text.
        self._ids = frozenset(tokens.values()).difference(encode(_WHITE_SPACE).ids.tolist())
        # Mostly one or two ranges, and comparing with these costs a fraction of a look-up for each token.
        self._ranges = _ranges_of(self._ids)

    def encode(self, texts: list[str], encode: Encode) -> FlatIds:
        """Token ids of the texts, none of them a special token's, by an `encode` that gives the usual ids."""
        if self._spelled is None or not any(map(self._spelled.search, texts)):
            return self._without_ids(texts, encode)
        pieces: list[str] = []
        first_pieces = []
        for text in texts:
            first_pieces.append(len(pieces))
            pieces += self._cut(text)
        ids, lengths = self._without_ids(pieces, encode)
        return FlatIds(ids, np.add.reduceat(lengths, first_pieces))

    def first_piece(self, text: str) -> str:
        """The text up to its first cut: all of it, unless it spells a special token."""
        return text if self._spelled is None else self._cut(text)[0]

    def are_in(self, ids: Collection[int]) -> bool:
        """Whether one of these ids is a special token's."""
        return not self._ids.isdisjoint(ids)

    def _cut(self, text: str) -> list[str]:
        """The text, cut after the first character of each spelling of a special token, so that none is recognised."""
        assert self._spelled is not None
        cuts = [match.start() + 1 for match in self._spelled.finditer(text)]
        return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _without_ids(self, texts: list[str], encode: Encode) -> FlatIds:
        """Encode the texts; those in which a special token is found, which are rare, again in halves."""
        flat = encode(texts)
        if not self._holds_control(flat):
            return flat
        found = zip(texts, to_lists(flat), strict=True)
        return to_flat([ids if self._ids.isdisjoint(ids) else self._in_halves(text, encode) for text, ids in found])

    def _in_halves(self, text: str, encode: Encode) -> list[int]:
        """The ids of the text, cut in halves until no piece is encoded as a special token. Of a single character that
        is (one that is normalized to all of its spelling), the token is left out."""
        ids = encode([text]).ids.tolist()
        if self._ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [index for index in ids if index not in self._ids]
        middle = len(text) // 2
        return self._in_halves(text[:middle], encode) + self._in_halves(text[middle:], encode)

    def _holds_control(self, flat: FlatIds) -> bool:
        return any(((flat.ids >= low) & (flat.ids <= high)).any() for low, high in self._ranges)


def _ranges_of(ids: Collection[int]) -> list[tuple[int, int]]:
    """The first and last id of each run of consecutive ones."""
    firsts = [index for index in sorted(ids) if index - 1 not in ids]
    lasts = [index for index in sorted(ids) if index + 1 not in ids]
    return [*zip(firsts, lasts, strict=True)]


def _leaking_spellings(tokens: Mapping[str, int], encode: Encode) -> list[str]:
    """The special tokens whose spelling is encoded as the token even in plain text."""
    encoded = (
        to_lists(encode([f"a {token} b" for token in tokens])),
        to_lists(encode([f"a{token}b" for token in tokens])),
        to_lists(encode([*tokens])),
    )
    return [
        token
        for (token, index), *ways in zip(tokens.items(), *encoded, strict=True)
        if any(index in ids for ids in ways)
    ]
