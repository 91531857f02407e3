"""Prefill pacing: how many tokens the next step takes, from how long steps took so far.

While others decode, a step carries their tokens too, so a chunk is as long as the wait that it puts between two of their
tokens allows. A prompt alone is cut into enough chunks that every stage has one to work on most of the time; but where a stage
reads experts from disk, each chunk would read nearly all of them, and it is one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from exo_kimi.runtime.engine import sequence
from exo_kimi.runtime.steps import Step

GAP_S = 0.5
"""The wait between two tokens of a stream that another one's prefill may cause, where the machine can do better than that
at all."""
FEW_TOKENS = 32  # a step of fewer is one of decoding, and says little about chunks
LEAST_WHILE_DECODING = 32
LEAST_ALONE = 256  # below that, chunks of a mixture of experts read nearly all experts for few tokens
SHORT = 64
"""Up to so many tokens alone go in two halves, which two stages work on at once: together they read at most a third more of K2's
experts than the whole would."""
LEAST_OF_SHORT = 20
CHUNKS_PER_STAGE = 4  # filling and draining S stages costs S - 1 chunks: at most a quarter more with so many
_FORGET = 0.8  # weight that a step keeps when the next one comes


class PrefillPacer:
    """Fits `seconds = fixed + per_token * tokens` to the steps of late and chooses chunks by it.

    Args:
        stages: of the pipeline.
        prefill_chunk: tokens of a step at most.
        gap_s: see GAP_S.
        clock: seconds.
        streams: whether a stage reads experts from disk; asked when it matters.
    """

    def __init__(
        self,
        *,
        stages: int,
        prefill_chunk: int,
        gap_s: float = GAP_S,
        clock: Callable[[], float] = time.monotonic,
        streams: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stages = stages
        self._most = prefill_chunk
        self._gap_s = gap_s
        self._clock = clock
        self._streams = streams
        self._sent: dict[int, tuple[int, float]] = {}
        self._answered_s = -math.inf
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0
        self.fixed_s = 0.0
        self.per_token_s: float | None = None

    def sent(self, step: Step) -> None:
        """A step is on its way."""
        self._sent[step.step_id] = len(step.tokens), self._clock()

    def answered(self, step_id: int) -> float | None:
        """Its result came.

        Returns:
            The seconds since the result before it, which is what a step costs where stages run ahead or several are in flight;
            since it was sent, where nothing had been on its way for as long as it took. None where it was never sent.
        """
        if step_id not in self._sent:
            return None
        tokens, sent_s = self._sent.pop(step_id)
        now_s = self._clock()
        taken_s, idle_s = now_s - sent_s, sent_s - self._answered_s
        self._answered_s = now_s
        if tokens >= FEW_TOKENS:
            self._learn(tokens, taken_s)
        return taken_s + idle_s if idle_s <= taken_s else taken_s

    def forget(self) -> None:
        """The stages lost what was on its way."""
        self._sent.clear()

    def chunk(self, running: Sequence[sequence.Sequence]) -> int:
        """Tokens of the next step, for these sequences."""
        pending = sum(each.num_new_tokens for each in running if not each.decoding)
        if pending and any(each.decoding for each in running):
            return self._while_decoding()
        if self._stages == 1 or not pending or self._streams():
            return self._most
        if pending <= SHORT:
            return min(self._most, max(LEAST_OF_SHORT, -(-pending // 2)))
        return min(self._most, max(LEAST_ALONE, -(-pending // (CHUNKS_PER_STAGE * self._stages))))

    def _while_decoding(self) -> int:
        """As many as the gap allows; but where the fixed part is the greater one, so many that a token takes at most twice
        what it takes at best, for shorter chunks would hold up the prefill and hardly shorten the gap."""
        if self.per_token_s is None:
            return min(self._most, LEAST_ALONE)
        allowed = (self._gap_s - self.fixed_s) / self.per_token_s
        tokens = max(allowed, self.fixed_s / self.per_token_s, LEAST_WHILE_DECODING)
        return min(self._most, _rounded(tokens))

    def _learn(self, tokens: int, seconds: float) -> None:
        self._weight = self._weight * _FORGET + 1
        self._tokens = self._tokens * _FORGET + tokens
        self._seconds = self._seconds * _FORGET + seconds
        self._squares = self._squares * _FORGET + tokens * tokens
        self._products = self._products * _FORGET + tokens * seconds
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - mean_tokens**2
        if variance > (0.1 * mean_tokens) ** 2:
            slope = (self._products / self._weight - mean_tokens * mean_s) / variance
            # Between all of it per token, and what would make the fixed part nine tenths of it.
            self.per_token_s = min(max(slope, 0.1 * mean_s / mean_tokens), mean_s / mean_tokens)
        else:  # all of one length: the share of the fixed part is what it was
            share = 0.0 if self.per_token_s is None else self.fixed_s / (self.fixed_s + self.per_token_s * mean_tokens)
            self.per_token_s = max((1 - share) * mean_s / mean_tokens, 1e-9)
        self.fixed_s = max(0.0, mean_s - self.per_token_s * mean_tokens)


def _rounded(tokens: float) -> int:
    """Down to a multiple of 32, so that kernels and buffers of the same shapes are used again."""
    return max(LEAST_WHILE_DECODING, math.floor(tokens / 32) * 32)
