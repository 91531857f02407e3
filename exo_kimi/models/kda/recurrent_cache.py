"""What a layer with Kimi Delta Attention holds of a sequence: a state of one size, which cannot be cut at a token.

Axes: B batch, H heads, Dk width of keys, Dv width of values, C = H * Dk channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from exo_kimi.errors import UsageError

__all__ = ["RecurrentCache"]


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

    def update(self, conv_state: mx.array, recurrent_state: mx.array, tokens: int) -> None:
        """Hold the state after some more tokens."""
        self.conv_state, self.recurrent_state = conv_state, recurrent_state
        self.offset += tokens

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
        """Bytes held, of any number of tokens."""
        return sum(part.nbytes for part in self.state if part is not None)

    def is_trimmable(self) -> bool:
        """Never: what a token did to a state cannot be undone."""
        return False

    def trim(self, count: int) -> int:
        """Forget nothing; returns 0, as mlx-lm's caches that cannot."""
        return 0
