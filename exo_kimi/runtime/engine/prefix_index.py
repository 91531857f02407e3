"""The leader's knowledge of caches that ended sequences left on the stages: which tokens they hold, which was used last.

Pure bookkeeping: it knows nothing of memory, steps or disks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """Caches that every stage holds under `seq_id`: exactly `tokens`."""

    seq_id: int
    tokens: Tokens


def as_tokens(tokens: Sequence[int]) -> Tokens:
    """Ids as an array that compares fast."""
    return np.asarray(tokens, np.int32)


def common_tokens(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


class PrefixIndex:
    """CachedPrefix caches, the one that was not used for longest first."""

    def __init__(self) -> None:
        self._kept: dict[int, CachedPrefix] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[CachedPrefix]:
        return iter(tuple(self._kept.values()))

    def add(self, kept: CachedPrefix) -> list[CachedPrefix]:
        """Note caches; returns those, noted before or these themselves, that others hold entirely, and forgets them."""
        for other in self:
            if common_tokens(kept.tokens, other.tokens) == len(kept.tokens):
                self.touch(other)
                return [kept]
        covered = [other for other in self if common_tokens(kept.tokens, other.tokens) == len(other.tokens)]
        for other in covered:
            self.remove(other)
        self._kept[kept.seq_id] = kept
        return covered

    def remove(self, kept: CachedPrefix) -> None:
        """Forget caches."""
        del self._kept[kept.seq_id]

    def touch(self, kept: CachedPrefix) -> None:
        """These caches were used now."""
        self._kept[kept.seq_id] = self._kept.pop(kept.seq_id)

    def best(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        """The caches that share the most first tokens, and how many; the shortest of equal ones, which loses least."""
        found = [(common_tokens(kept.tokens, tokens), -len(kept.tokens), kept) for kept in self]
        if not found:
            return None
        count, _, kept = max(found, key=lambda item: item[:2])
        return kept, count
