"""The same requests to anybody, and what is read off the times of their tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests: prompts of token ids, how many tokens each gets, and after how many tokens of the first each is submitted."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, requests: list[tuple[int, int, int]], *, vocab_size: int, seed: int = 0) -> Self:
        """Random prompts for (prompt tokens, new tokens, after) of each request."""
        draw = random.Random(seed)
        prompts = tuple(tuple(draw.randrange(vocab_size) for _ in range(length)) for length, _, _ in requests)
        return cls(prompts=prompts, new_tokens=tuple(r[1] for r in requests), after=tuple(r[2] for r in requests))

    def order(self) -> dict[str, Any]:
        """As one JSON document."""
        return {"prompts": self.prompts, "new_tokens": self.new_tokens, "after": self.after}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimes:
    """What came back, per request: token ids, when each came, and when the request was submitted; seconds since the start."""

    tokens: list[list[int]]
    times: list[list[float]]
    submitted: list[float]

    def tokens_per_s(self, *, after: int = 1) -> float:
        """Of all requests together while all of them decode: from when the last has `after` tokens to the first last one."""
        start_s = max(times[after - 1] for times in self.times)
        end_s = min(times[-1] for times in self.times)
        return sum(sum(start_s < time <= end_s for time in times) for times in self.times) / (end_s - start_s)

    @property
    def ttft_s(self) -> float:
        """Of the request that was submitted last."""
        return self.times[-1][0] - self.submitted[-1]

    def worst_gap_s(self) -> float:
        """The 99th percentile (nearest rank) of the time between tokens of the first request while the last one prefills:
        of the gaps that overlap the time between its submission and its first token."""
        start_s, end_s = self.submitted[-1], self.times[-1][0]
        gaps = sorted(b - a for a, b in pairwise(self.times[0]) if b > start_s and a < end_s)
        return gaps[max(0, -(-len(gaps) * 99 // 100) - 1)]

    def tokens_meanwhile(self) -> int:
        """Tokens of the first request while the last one prefills."""
        return sum(self.submitted[-1] < time < self.times[-1][0] for time in self.times[0])
