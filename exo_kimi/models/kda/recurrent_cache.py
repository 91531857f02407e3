"""What a layer with Kimi Delta Attention holds of a sequence: a state of one size, which cannot be cut at a token.

The newest pass alone can be taken back, whole or from a token on: the state before it is kept by reference, and what went into it
is run again as far as it shall count. So guesses that were wrong and a step that ran ahead cost no state of every token.

Axes: B batch, H heads, Dk width of keys, Dv width of values, C = H * Dk channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from exo_kimi.errors import UsageError

__all__ = ["RecurrentCache"]

MOST_REPLAYED = 64
"""Tokens of a pass that can be taken back in part: guesses and what they follow."""

Replay = Callable[[int], tuple[mx.array, mx.array]]


@dataclass(frozen=True, slots=True)
class Before:
    """The state before a pass, and after the first tokens of that pass; `replay` None where there were too many."""

    offset: int
    conv_state: mx.array | None
    recurrent_state: mx.array | None
    replay: Replay | None


class RecurrentCache:
    """The state after `offset` tokens. Arrays are replaced and never written into, so that a reference to them is a snapshot.

    Attributes:
        conv_state: (B, taps - 1, 3 C) the last tokens' queries, keys and values before the convolutions; None at first.
        recurrent_state: (B, H, Dv, Dk) float32; None at first.
        offset: tokens that went in.
    """

    def __init__(self) -> None:
        self.conv_state: mx.array | None = None
        self.recurrent_state: mx.array | None = None
        self.offset = 0
        self._before: list[Before] = []

    def begin_pass(self) -> None:
        """What comes now can be taken back; what came before no longer."""
        self._before.clear()

    def update(
        self, conv_state: mx.array, recurrent_state: mx.array, tokens: int, replay: Replay | None = None
    ) -> None:
        """Hold the state after some more tokens.

        Args:
            conv_state, recurrent_state: after them.
            tokens: their number.
            replay: makes both states after the first n of them, from those that are held now.
        """
        # Of a pass in several pieces the first state and the last suffice: a segment with guesses lies in two at most.
        del self._before[1:]
        short = replay if tokens <= MOST_REPLAYED else None
        self._before.append(Before(self.offset, self.conv_state, self.recurrent_state, short))
        self.conv_state, self.recurrent_state = conv_state, recurrent_state
        self.offset += tokens

    def trim(self, count: int) -> int:
        """Take back the last tokens, as far as the newest pass allows, or all; returns how many, which is `count` or 0."""
        target = self.offset - count
        if count <= 0:
            return 0
        if target == 0:
            self.hold((None, None), 0)
            return count
        found = next((each for each in reversed(self._before) if each.offset <= target), None)
        if found is None or (found.offset < target and found.replay is None):
            return 0
        kept = target - found.offset
        if kept and found.replay is not None:
            self.conv_state, self.recurrent_state = found.replay(kept)
        else:
            self.conv_state, self.recurrent_state = found.conv_state, found.recurrent_state
        self.offset, self._before = target, [each for each in self._before if each.offset < target]
        return count

    @property
    def least_offset(self) -> int:
        """The fewest tokens down to which `trim` can go back, one by one."""
        least = self.offset
        for each in reversed(self._before):
            if each.replay is None and each.offset < least - 1:
                break
            least = each.offset
        return least

    def begin_as(self, other: RecurrentCache, length: int) -> bool:
        """Hold what another does after `length` tokens, by reference; False where it cannot tell that."""
        self.conv_state, self.recurrent_state, self.offset = other.conv_state, other.recurrent_state, other.offset
        self._before = list(other._before)
        count = self.offset - length
        told = self.trim(count) == count
        self._before.clear()
        return told

    def hold(self, state: tuple[mx.array | None, mx.array | None], offset: int) -> None:
        """Hold a state, as `state` gives it, after `offset` tokens, by reference."""
        (self.conv_state, self.recurrent_state), self.offset = state, offset
        self._before.clear()

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """What is held, for evaluation and for mlx-lm's `save_prompt_cache`."""
        return self.conv_state, self.recurrent_state

    @state.setter
    def state(self, held: Sequence[mx.array | None]) -> None:
        self.conv_state, self.recurrent_state = held

    @property
    def meta_state(self) -> str:
        """The tokens that went in: they cannot be told from the arrays."""
        return str(self.offset)

    @meta_state.setter
    def meta_state(self, offset: str) -> None:
        self.offset = int(offset or 0)

    @classmethod
    def from_state(cls, state: Sequence[Any], meta_state: str = "") -> Self:
        """The cache that `save_prompt_cache` wrote."""
        cache = cls()
        cache.state, cache.meta_state = state, meta_state
        return cache

    @classmethod
    def merge(cls, caches: Sequence[RecurrentCache]) -> Any:
        """mlx-lm's BatchGenerator asks for it: padded batches are not made of these; `forward_ragged` takes several sequences.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "recurrent states do not go into mlx-lm's padded batches",
            fix="`exo-kimi serve` batches them, or use mlx-lm's own kimi_linear",
        )

    def empty(self) -> bool:
        """Whether nothing went in."""
        return self.recurrent_state is None

    def size(self) -> int:
        """How many tokens went in."""
        return self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of the states that are held, of any number of tokens: two, but for a pass in pieces."""
        return sum(part.nbytes for part in self.arrays())

    def arrays(self) -> Iterator[mx.array]:
        """What is held: the state, and those that it can go back to."""
        states = [self.state, *((each.conv_state, each.recurrent_state) for each in self._before)]
        return (part for state in states for part in state if part is not None)

    def is_trimmable(self) -> bool:
        """Not at any token, as mlx-lm means it."""
        return False
