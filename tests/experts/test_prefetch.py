"""How many experts are read ahead, by what was measured, and what becomes of those reads."""

from __future__ import annotations

import pytest

from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import check_prefetch
from exo_kimi.experts.prefetch import DECIDE_LAYERS, PROBE_PASSES, PrefetchPolicy, places_for


def fed(policy: PrefetchPolicy, *, right: float, compute_s: float, missing: int, expert_s: float) -> None:
    """So many layers whose best guesses are right in such a share of cases, and worse ones less and less often."""
    for layer in range(4 * DECIDE_LAYERS):
        guesses = list(range(policy.most))
        asked = {rank for rank in guesses if (layer * 7 % 100) / 100 < right * 0.8**rank}
        policy.learn(guesses, asked)
        policy.measured(compute_s, missing, expert_s)


def test_it_is_on_where_the_disk_would_be_idle_and_guesses_are_right() -> None:
    policy = PrefetchPolicy("auto", 8)
    fed(policy, right=0.9, compute_s=0.010, missing=4, expert_s=0.002)
    assert policy.count > 1 and policy.is_asking
    assert policy.gain(policy.count, 0.002) == max(policy.gain(count, 0.002) for count in range(9))


@pytest.mark.parametrize(
    ("right", "compute_s", "missing", "expert_s"),
    [
        pytest.param(0.9, 0.0001, 4, 0.002, id="the disk is never idle"),
        pytest.param(0.02, 0.002, 4, 0.002, id="guesses are wrong"),
        pytest.param(0.9, 0.010, 4, 0.00001, id="reading takes no time"),
        pytest.param(0.9, 0.010, 0, 0.002, id="nothing is missing"),
    ],
)
def test_it_is_off_where_it_would_not_win(right: float, compute_s: float, missing: int, expert_s: float) -> None:
    policy = PrefetchPolicy("auto", 8)
    fed(policy, right=right, compute_s=compute_s, missing=missing, expert_s=expert_s)
    assert policy.count == 0


def test_one_that_is_on_stays_on_for_less_than_it_takes_to_begin() -> None:
    def gain_of(policy: PrefetchPolicy, expert_s: float) -> float:
        return max(policy.gain(count, expert_s) for count in range(policy.most + 1))

    # Between the two marks: worth going on with, not worth beginning.
    begun, fresh = PrefetchPolicy("auto", 8), PrefetchPolicy("auto", 8)
    fed(begun, right=0.9, compute_s=0.010, missing=4, expert_s=0.002)
    for policy in (begun, fresh):
        fed(policy, right=0.9, compute_s=0.010, missing=4, expert_s=0.000_06)
        assert 0.01 < gain_of(policy, 0.000_06) < 0.03
    assert begun.count > 0 and fresh.count == 0
    fed(begun, right=0.9, compute_s=0.010, missing=4, expert_s=0.000_01)
    assert begun.count == 0


def test_while_off_it_asks_in_a_few_passes_and_on_and_off_are_followed() -> None:
    policy = PrefetchPolicy("auto", 8)
    asking = []
    for _ in range(4 * PROBE_PASSES):
        policy.begin_pass()
        asking.append(policy.is_asking)
    assert sum(asking) == 4
    off, on = PrefetchPolicy("off", 8), PrefetchPolicy("on", 8)
    for policy in (off, on):
        fed(policy, right=0.0, compute_s=0.001, missing=4, expert_s=0.002)
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
