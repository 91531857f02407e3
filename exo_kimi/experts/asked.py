"""The experts that a pass asks a layer for, in the order in which it does: the same for the engine and for replays of a trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEW_PAIRS = 64
"""Up to so many, lists of Python are faster than arrays of NumPy."""


def asked(chosen: NDArray[np.unsignedinteger[Any]]) -> list[int]:
    """Each expert once, the one that most pairs want last.

    Args:
        chosen: (P,) expert of each pair of a token and one of its choices, tokens in order.
    """
    if len(chosen) <= FEW_PAIRS:
        few: list[int] = chosen.tolist()
        counted = Counter(few)
        return few if len(counted) == len(few) else sorted(counted, key=lambda expert: (counted[expert], expert))
    counts = np.bincount(chosen)
    found = np.flatnonzero(counts)
    distinct: list[int] = found[np.argsort(counts[found], kind="stable")].tolist()
    return distinct
