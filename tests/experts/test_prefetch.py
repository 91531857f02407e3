"""How many experts are read ahead, by what was measured, and what becomes of those reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import check_prefetch
from exo_kimi.experts.prefetch import (
    COMPARE_DECISIONS,
    DECIDE_LAYERS,
    PROBE_PASSES,
    LayerTime,
    PrefetchPolicy,
    places_for,
)


@dataclass(frozen=True)
class World:
    """What layers take: guesses of a rank are right in `right` of the cases times .8 for each rank above it, and a disk reads one
    expert after another, each read ahead of which costs `penalty_s` more than it should."""

    right: float = 0.9
    compute_s: float = 0.010
    missing: int = 4
    expert_s: float = 0.002
    penalty_s: float = 0.0

    def run(self, policy: PrefetchPolicy, *, windows: int = 4) -> list[int]:
        """The counts after each decision."""
        counts = []
        for layer in range(windows * DECIDE_LAYERS):
            ranks = range(policy.most)
            policy.learn(ranks, {rank for rank in ranks if (layer * 7 % 100) / 100 < self.right * 0.8**rank})
            used = min(self.missing, sum(self.right * 0.8**rank for rank in range(policy.count)))
            disk_s = (self.missing + policy.count - used) * self.expert_s
            waited_s = max((self.missing - used) * self.expert_s, disk_s - self.compute_s)
            waited_s += policy.count * self.penalty_s
            policy.measured(LayerTime(self.compute_s, waited_s, self.missing), self.expert_s)
            if layer % DECIDE_LAYERS == DECIDE_LAYERS - 1:
                counts.append(policy.count)
        return counts


def test_it_is_on_where_the_disk_would_be_idle_and_guesses_are_right() -> None:
    policy = PrefetchPolicy("auto", 8)
    World().run(policy)
    assert policy.count > 1 and policy.is_asking
    assert policy.gain(policy.count, 0.002) == max(policy.gain(count, 0.002) for count in range(9))
    assert policy.saved == pytest.approx(policy.gain(policy.count, 0.002), abs=0.05)


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(World(compute_s=0.0001), id="the disk is never idle"),
        pytest.param(World(right=0.02, compute_s=0.002), id="guesses are wrong"),
        pytest.param(World(expert_s=0.00001), id="reading takes no time"),
        pytest.param(World(missing=0), id="nothing is missing"),
    ],
)
def test_it_is_off_where_it_would_not_win(world: World) -> None:
    policy = PrefetchPolicy("auto", 8)
    assert set(world.run(policy, windows=8)) == {0}


def test_what_promises_to_win_and_does_not_is_tried_with_less_and_then_ever_more_rarely() -> None:
    policy = PrefetchPolicy("auto", 8)
    counts = World(penalty_s=0.005).run(policy, windows=200)
    first = next(count for count in counts if count)
    start = counts.index(first)
    halves = [first]
    while halves[-1]:
        halves.append(halves[-1] // 2)
    assert counts[start : start + len(halves)] == halves
    tried = sum(count > 0 for count in counts)
    assert tried < 30, "of 200 windows"
    # Where fewer really win, fewer it is.
    policy = PrefetchPolicy("auto", 8)
    counts = World(penalty_s=0.0007).run(policy, windows=12)
    assert 0 < counts[-1] < policy.most and policy.saved > 0.01


def test_one_that_is_on_stays_on_for_less_than_it_takes_to_begin() -> None:
    world, policy = World(expert_s=0.000_06), PrefetchPolicy("auto", 8)
    assert set(world.run(policy)) == {0}
    policy._try(4)  # as if it had begun while the disk was slower
    assert set(world.run(policy)) == {4}
    assert 0.01 < policy.saved < 0.03


def test_it_is_off_once_in_a_while_to_know_what_that_would_take() -> None:
    policy = PrefetchPolicy("auto", 8)
    counts = World().run(policy, windows=3 * COMPARE_DECISIONS)
    assert sum(count == 0 for count in counts[4:]) == 2
    World(missing=0).run(policy, windows=2 * COMPARE_DECISIONS)
    assert policy.count == 0


def test_while_off_it_asks_in_a_few_passes_and_on_and_off_are_followed() -> None:
    policy = PrefetchPolicy("auto", 8)
    asking = []
    for _ in range(4 * PROBE_PASSES):
        policy.begin_pass()
        asking.append(policy.is_asking)
    assert sum(asking) == 4
    off, on = PrefetchPolicy("off", 8), PrefetchPolicy("on", 8)
    for policy in (off, on):
        World(right=0.0).run(policy)
    assert (off.count, off.is_asking, on.count, on.is_asking) == (0, False, 8, True)
    with pytest.raises(UsageError, match="no such way of reading ahead"):
        check_prefetch("sometimes")


def test_memory_for_it_is_a_small_share_or_what_every_layer_can_spare() -> None:
    layers = [20] * 60
    assert places_for("auto", 56 * 1200, layers, 8) == 16
    assert places_for("auto", 10 * 1200, layers, 8) == 6
    assert places_for("auto", 1200, layers, 8) == 0
    assert places_for("on", 1200 + 60, layers, 8) == 3
    assert places_for("off", 56 * 1200, layers, 8) == 0
    assert places_for("on", 0, [], 8) == 0
