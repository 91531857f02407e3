"""Advantages within groups, and which groups are left out."""

from __future__ import annotations

import numpy as np
import pytest

from exo_kimi.train.rl.advantages import GroupCounts, count_group, group_advantages


def test_advantages_are_centred_and_of_unit_deviation() -> None:
    found = group_advantages([1.1, 0.1, 0.1, 1.1, 1.1, 0.0, 1.1, 0.1], "group")
    assert found.dtype == np.float32
    assert found.sum() == pytest.approx(0, abs=1e-6)
    assert found.std(ddof=1) == pytest.approx(1, rel=1e-3)
    assert found[0] > 0 > found[1] > found[5]


def test_without_scaling_they_are_the_distance_from_the_mean() -> None:
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 1.0], "none"), [0.5, -0.5, -0.5, 0.5])


def test_equal_rewards_give_none() -> None:
    assert not group_advantages([0.7] * 8, "group").any()


def test_groups_are_mixed_by_their_answers_alone() -> None:
    counts = GroupCounts()
    for right in ([1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0]):
        counts += count_group(right)
    assert counts == GroupCounts(mixed=2, all_right=1, all_wrong=1)
