"""A draft head whose guesses are right by a chance that is given: it does all the work of the head that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.models.draft_head import DraftHead

SURE = 1e4


class ScriptedHead:
    """Guesses what a script says, and something else where it is not to be right.

    Args:
        head: of random weights.
        script: the tokens of a prompt and of the whole answer that follows it.
        chance: of being right at a position.
        seed: which positions these are.
    """

    def __init__(self, head: DraftHead, script: Sequence[int], *, chance: float, seed: int = 0) -> None:
        self._head = head
        size = head.config.draft_vocab_size
        right = np.random.default_rng(seed).random(len(script)) < chance
        after = np.array([*script[1:], script[-1]])
        self._guesses = mx.array(np.where(right, after, (after + 1) % size).astype(np.int32))
        self._vocabulary = mx.arange(size)[None]

    def make_cache(self) -> list[Any]:
        """Of the head."""
        return self._head.make_cache()

    def fuse(self, features: mx.array) -> mx.array:
        """Of the head."""
        return self._head.fuse(features)

    def __call__(
        self, token_ids: mx.array, hidden: mx.array, segments: Sequence[tuple[int, Sequence[Any]]]
    ) -> mx.array:
        """(N, D + 1): of the head, and the position of each token: entry n of the cache is of position n + 1."""
        starts = [int(caches[0].offset) + 1 for _, caches in segments]
        places = [mx.arange(start, start + length) for start, (length, _) in zip(starts, segments, strict=True)]
        out = self._head(token_ids, hidden, segments)
        return mx.concatenate([out, mx.concatenate(places)[:, None].astype(out.dtype)], axis=1)

    def logits(self, out: mx.array) -> mx.array:
        """Of the head, with what the script says above all."""
        places = mx.minimum(out[:, -1].astype(mx.int32), len(self._guesses) - 1)
        chosen = mx.take(self._guesses, places)
        return self._head.logits(out[:, :-1]) + SURE * (self._vocabulary == chosen[:, None])

    def next_hidden(self, out: mx.array) -> mx.array:
        """Of the head."""
        return self._head.next_hidden(out[:, :-1])

    def to_target_ids(self, draft_ids: mx.array) -> mx.array:
        """Of the head, whose vocabulary is its target's."""
        return self._head.to_target_ids(draft_ids)
