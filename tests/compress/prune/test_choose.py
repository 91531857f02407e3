"""Which experts stay: the best, evenly over groups; and the exact division of a budget over layers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.compress.prune.choose import budget, keep_budgeted, keep_uniform, removed_worth
from exo_kimi.errors import UsageError

values = st.lists(st.floats(0, 100, width=32), min_size=8, max_size=8)


@given(values, st.sampled_from([1, 2, 4]), st.integers(1, 2))
def test_the_best_of_each_group_stay(worth: list[float], groups: int, each: int) -> None:
    array = np.array(worth)
    kept = keep_uniform({3: array}, groups * each, groups=groups)[3]
    assert list(kept) == sorted(set(kept))
    size = 8 // groups
    for group in range(groups):
        inside = [expert for expert in kept if expert // size == group]
        gone = [e for e in range(group * size, (group + 1) * size) if e not in inside]
        assert len(inside) == each
        assert not gone or array[inside].min() >= array[gone].max()


def test_protected_experts_stay_whatever_they_are_worth() -> None:
    worth = {1: np.arange(8.0), 2: np.arange(8.0)}
    assert keep_uniform(worth, 3, protected={1: (0,)}) == {1: (0, 6, 7), 2: (5, 6, 7)}
    with pytest.raises(UsageError, match="more super experts"):
        keep_uniform(worth, 1, protected={1: (0, 1)})


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(1, 3))
def test_the_budget_is_the_best_of_all_divisions(worth: list[list[float]], keep: int) -> None:
    costs = [removed_worth(np.array(each)) for each in worth]
    total = keep * len(costs)
    counts = budget(costs, total, 1)
    assert sum(counts) == total
    best = min(
        sum(cost[count] for cost, count in zip(costs, tried, strict=True))
        for tried in product(range(1, 5), repeat=len(costs))
        if sum(tried) == total
    )
    assert sum(cost[count] for cost, count in zip(costs, counts, strict=True)) == pytest.approx(best)


def test_a_budget_goes_where_experts_matter() -> None:
    worth = {1: np.full(8, 10.0), 2: np.array([9.0, 9, 0, 0, 0, 0, 0, 0])}
    kept = keep_budgeted(worth, 5, least=2)
    assert {layer: len(ids) for layer, ids in kept.items()} == {1: 8, 2: 2}
    assert kept[2] == (0, 1)
    with pytest.raises(UsageError, match="no division"):
        keep_budgeted(worth, 2, least=3)


def test_with_groups_a_budget_is_divided_in_whole_rounds() -> None:
    worth = {1: np.full(8, 10.0), 2: np.arange(8.0)}
    kept = keep_budgeted(worth, 6, least=2, groups=2)
    assert {layer: len(ids) for layer, ids in kept.items()} == {1: 8, 2: 4}
    assert kept[2] == (2, 3, 6, 7)
