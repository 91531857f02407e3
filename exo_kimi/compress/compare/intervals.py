"""Confidence intervals by the bootstrap, texts drawn whole: tokens of one text are not independent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPEATS = 2000
_BLOCK = 100  # repeats at a time: the draws of many texts would be large


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def describe(self, digits: int = 4) -> str:
        """`0.0123 (0.0101 to 0.0150)`."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def mean_of_texts(values: NDArray[np.float64], text_of: NDArray[np.int64], *, seed: int = 0) -> Estimate:
    """The mean over all tokens, and the interval of it over other draws of as many texts.

    Args:
        values: (M,) one for each token, at least one.
        text_of: (M,) the text of each.
        seed: of the draws.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", percentile interval, clusters resampled.
    """
    _, places = np.unique(text_of, return_inverse=True)
    sums = np.bincount(places, weights=values)
    counts = np.bincount(places).astype(np.float64)
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    for _ in range(REPEATS // _BLOCK):
        drawn = rng.integers(0, len(sums), (_BLOCK, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(value=float(sums.sum() / counts.sum()), low=float(low), high=float(high))
