"""What a cache of experts could reach at best, and what theory says of the usual one.

Hits are counted as the slots count them: an expert is asked for once a forward pass, and hits if it was there before the pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Requests = Sequence[tuple[int, ...]]
FAR = 1 << 62


def belady_hits(requests: Requests, slots: int) -> list[int]:
    """Hits of each pass with the cache that knows the future: it keeps what is asked for soonest. No policy has more.

    A pass with more different experts than slots goes through them in groups; the bound lets such a pass end with any of them.
    Source: L. A. Belady, "A study of replacement algorithms", 1966; for sets of pages, the same exchange argument.

    Args:
        requests: different experts of each forward pass.
        slots: of the layer, at least 1.
    """
    following: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for index in range(len(requests) - 1, -1, -1):
        following.append({expert: upcoming.get(expert, FAR) for expert in requests[index]})
        for expert in requests[index]:
            upcoming[expert] = index
    following.reverse()
    hits: list[int] = []
    held: dict[int, int] = {}
    for wanted, again in zip(requests, following, strict=True):
        hits.append(sum(expert in held for expert in wanted))
        others = {expert: when for expert, when in held.items() if expert not in again}
        if len(wanted) <= slots:  # all of them are in a slot when the pass ends
            kept = sorted(others, key=others.__getitem__)[: slots - len(wanted)]
            held = {**again, **{expert: others[expert] for expert in kept}}
        else:
            both = {**others, **again}
            held = {expert: both[expert] for expert in sorted(both, key=both.__getitem__)[:slots]}
    return hits


def che_hit_rate(popularity: NDArray[np.float64], slots: int) -> float:
    """Hit rate of least recently used when each token chooses for itself, by its experts' popularity.

    An expert is there if one of the last t tokens chose it: sum 1 - (1 - p)^t = slots gives t, and sum p (1 - (1 - p)^t) / sum p
    the rate. Equal chances give slots / experts exactly.
    Source: H. Che et al., "Hierarchical web caching systems", 2002, with tokens for time.

    Args:
        popularity: (E,) in which share of the tokens each expert is chosen.
        slots: of the layer.
    """
    chances = np.clip(popularity, 0.0, 1.0)
    if slots >= int((chances > 0).sum()):
        return 1.0
    low, high = 0.0, 1.0
    while _held(chances, high) < slots:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _held(chances, middle) < slots else (low, middle)
    there = 1.0 - (1.0 - chances) ** high
    return float((chances * there).sum() / chances.sum())


def _held(chances: NDArray[np.float64], tokens: float) -> float:
    return float((1.0 - (1.0 - chances) ** tokens).sum())
