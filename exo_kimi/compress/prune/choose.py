"""Which experts stay: those that are worth most in each layer, or the best division of a whole budget over the layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from exo_kimi.errors import UsageError

Worth = Mapping[int, NDArray[np.float64]]
Protected = Mapping[int, tuple[int, ...]]


def keep_uniform(
    worth: Worth, keep: int, *, groups: int = 1, protected: Protected | None = None
) -> dict[int, tuple[int, ...]]:
    """Keep as many in every layer.

    Args:
        worth: MoE layer -> (E,) what each expert is worth.
        keep: experts of a layer that stay.
        groups: of the router; each loses as many.
        protected: MoE layer -> experts that stay whatever they are worth.

    Returns:
        MoE layer -> ids, ascending. Of equals, the lower id stays.

    Raises:
        UsageError: a group has more protected experts than may stay.
    """
    return {
        layer: _best(values, keep, groups=groups, protected=(protected or {}).get(layer, ()), layer=layer)
        for layer, values in worth.items()
    }


def keep_budgeted(
    worth: Worth, keep: int, *, least: int, groups: int = 1, protected: Protected | None = None
) -> dict[int, tuple[int, ...]]:
    """Divide the same total over the layers so that the least worth is removed: exact, by dynamic programming.

    removed(l, k) = the sum of what all but the k best of layer l are worth;  minimise sum removed(l, k_l) with
    sum k_l = keep * layers and least <= k_l <= E.

    Args:
        worth: comparable between layers, as leave-one-out is.
        keep: experts of a layer that stay, on the average.
        least: experts that stay in every layer at least.
        groups, protected: as in `keep_uniform`.

    Raises:
        UsageError: as `keep_uniform`.
    """
    layers, pinned = sorted(worth), protected or {}
    counts = budget(
        [removed_worth(worth[layer], groups=groups, protected=pinned.get(layer, ())) for layer in layers],
        keep * len(layers) // groups,
        -(-least // groups),
    )
    return {
        layer: _best(worth[layer], count * groups, groups=groups, protected=pinned.get(layer, ()), layer=layer)
        for layer, count in zip(layers, counts, strict=True)
    }


def removed_worth(
    values: NDArray[np.float64], *, groups: int = 1, protected: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """(E / groups + 1,) what is lost when only the k best of each group stay, for k from 0: protected ones first, and infinite
    where one of them would go."""
    ranked = values.astype(np.float64).copy()
    ranked[list(protected)] = np.inf
    grouped, order = values.reshape(groups, -1), np.argsort(-ranked.reshape(groups, -1), axis=1, kind="stable")
    kept = np.concatenate([[0.0], np.take_along_axis(grouped, order, axis=1).sum(axis=0).cumsum()])
    lost: NDArray[np.float64] = kept[-1] - kept
    lost[: int(np.isinf(ranked).reshape(groups, -1).sum(axis=1).max())] = np.inf
    return lost


def budget(costs: list[NDArray[np.float64]], total: int, least: int) -> list[int]:
    """Counts k_l that sum to `total`, each at least `least`, with the least sum of costs[l][k_l].

    Raises:
        UsageError: no counts sum to the total.
    """
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices: list[NDArray[np.intp]] = []
    for cost in costs:
        found = np.full(total + 1, np.inf)
        choice = np.zeros(total + 1, np.intp)
        for count in range(least, min(len(cost), total + 1)):
            candidate = best[: total + 1 - count] + cost[count]
            better = candidate < found[count:]
            found[count:][better] = candidate[better]
            choice[count:][better] = count
        best = found
        choices.append(choice)
    if not np.isfinite(best[total]):
        raise UsageError(
            "no division of the experts over the layers", expected=f"at least {least} in each", found=total
        )
    counts, left = [], total
    for choice in reversed(choices):
        counts.append(int(choice[left]))
        left -= counts[-1]
    return counts[::-1]


def _best(
    values: NDArray[np.float64], keep: int, *, groups: int, protected: tuple[int, ...], layer: int
) -> tuple[int, ...]:
    ranked = values.astype(np.float64).copy()
    ranked[list(protected)] = np.inf
    size, each = len(values) // groups, keep // groups
    kept: list[int] = []
    for group in range(groups):
        part = ranked[group * size : (group + 1) * size]
        if np.isinf(part).sum() > each:
            raise UsageError(
                f"layer {layer}: more super experts than experts that may stay",
                expected=f"at most {each}",
                found=int(np.isinf(part).sum()),
                fix="keep more, or give --no-protect (with --research)",
            )
        kept += [group * size + int(expert) for expert in np.argsort(-part, kind="stable")[:each]]
    return tuple(sorted(kept))
