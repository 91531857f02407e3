"""What may follow, from the sequence's own past: the tokens that came after the last few when they stood there before.

It looks at tokens alone. Every generated token also judges what would have been guessed, whether it was sent or not, so the
chances are known before the first guess costs anything.

Source: prompt lookup decoding, Saxena 2023; going on inside what is being copied as LZ77 does, Ziv and Lempel 1977.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
"""Tokens that must have stood together before."""
PRIOR = 0.25
"""Chance of a guess while nothing is known, worth one observation: low enough that nothing is sent on hope."""
KEEP = 0.97
"""Weight of an observation after each newer one: the last thirty or so count."""
_CLASSES = 4  # by tokens guessed right in a row: 0, 1-2, 3-6, more
_BITS = 20
_MASK = (1 << _BITS * NGRAM) - 1


class Lookup:
    """An index of one sequence, a constant amount of work for each token.

    Args:
        tokens: of the sequence; the list that grows.
        prompt_tokens: so many of them were given and judge nothing.
    """

    __slots__ = ("_hits", "_index", "_key", "_prompt_tokens", "_read", "_run", "_source", "_tokens", "_tries")

    def __init__(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        self._tokens = tokens
        self._prompt_tokens = prompt_tokens
        self._index: dict[int, int] = {}  # the last tokens, packed: where what followed them stands
        self._key = 0
        self._read = 0
        self._source: int | None = None  # where the next token is guessed from
        self._run = 0  # tokens that were guessed right in a row
        self._hits = [0.0] * _CLASSES
        self._tries = [0.0] * _CLASSES

    def catch_up(self) -> None:
        """Take in the tokens that came since the last call."""
        for position in range(self._read, len(self._tokens)):
            self._push(position)
        self._read = len(self._tokens)

    def guess(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow; empty when nothing like the end stood there before."""
        if self._source is None:
            return []
        known, found = len(self._tokens), list[int]()
        for position in range(self._source, self._source + limit):
            found.append(self._tokens[position] if position < known else found[position - known])
        return found

    def chances(self, count: int) -> list[float]:
        """For each of `count` guessed tokens the chance that it and all before it are right; they never rise."""
        found, chance = [], 1.0
        for ahead in range(count):
            kind = _kind(self._run + ahead)
            chance *= (self._hits[kind] + PRIOR) / (self._tries[kind] + 1.0)
            found.append(chance)
        return found

    def _push(self, position: int) -> None:
        token = self._tokens[position]
        source, self._source = self._source, None
        right = source is not None and self._tokens[source] == token
        if source is not None and position >= self._prompt_tokens:
            kind = _kind(self._run)
            self._hits[kind] = self._hits[kind] * KEEP + right
            self._tries[kind] = self._tries[kind] * KEEP + 1.0
        self._key = (self._key << _BITS | token) & _MASK
        earlier: int | None = None
        if position + 1 >= NGRAM:
            earlier = self._index.get(self._key)
            self._index[self._key] = position + 1
        if source is not None and right:
            self._source, self._run = source + 1, self._run + 1
        else:
            self._source, self._run = earlier, 0


def _kind(run: int) -> int:
    return min((run + 1).bit_length() - 1, _CLASSES - 1)
