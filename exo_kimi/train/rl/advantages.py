"""Advantages within groups, and which groups teach something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exo_kimi.train.model.layers import Floats
from exo_kimi.train.rl.recipe import ScaleRewards

_EPS = 1e-4  # as in TRL: a group of nearly equal rewards is not blown up


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCounts:
    """How many groups were mixed, and how many were left out: all right, or all wrong."""

    mixed: int = 0
    all_right: int = 0
    all_wrong: int = 0

    def __add__(self, other: GroupCounts) -> GroupCounts:
        return GroupCounts(
            mixed=self.mixed + other.mixed,
            all_right=self.all_right + other.all_right,
            all_wrong=self.all_wrong + other.all_wrong,
        )


def count_group(right: Sequence[float]) -> GroupCounts:
    """The kind of one group, by the rewards of its answers alone: format and length make no group mixed."""
    if all(value > 0 for value in right):
        return GroupCounts(all_right=1)
    if not any(value > 0 for value in right):
        return GroupCounts(all_wrong=1)
    return GroupCounts(mixed=1)


def group_advantages(rewards: Sequence[float], scale_rewards: ScaleRewards) -> Floats:
    """(G,) (r - mean(r)) / (std(r) + eps), or without the division.

    Source: "DeepSeekMath", equation for outcome supervision in section 4.1.2; "Dr. GRPO" without the division.
    """
    given = np.array(rewards, np.float64)
    centred = given - given.mean()
    if scale_rewards == "group":
        centred /= given.std(ddof=1) + _EPS
    advantages: Floats = centred.astype(np.float32)
    return advantages
