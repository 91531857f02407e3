"""Shares of right answers with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959964  # 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`right` of `count`."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Between 0 and 1; 0 of nothing is 0."""
        return self.right / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share. Source: Wilson 1927, score interval."""
        if not self.count:
            return 0.0, 1.0
        n, p = self.count, self.share
        centre = p + _Z * _Z / (2 * n)
        spread = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        whole = 1 + _Z * _Z / n
        return max(0.0, (centre - spread) / whole), min(1.0, (centre + spread) / whole)


def score(results: list[bool]) -> Score:
    """Score a list of right (True) and wrong (False) answers."""
    return Score(right=sum(results), count=len(results))
