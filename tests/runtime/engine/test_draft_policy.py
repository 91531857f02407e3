"""How many guesses a draft head is asked for: what pays by counted bytes, off where it loses, and back where it pays again."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.runtime.engine.draft_policy import (
    CHANGE_GAIN,
    FIRST_ACCEPTANCE,
    FIRST_LOSS,
    LOSS_SHARE,
    MORE_STEPS,
    MOST_HEAD_DRAFTS,
    HeadPolicy,
    HeadState,
    lost_steps,
)
from exo_kimi.runtime.engine.speculation import MEMORY_BYTES_PER_S, OVERHEAD_S_PER_LAYER, StepBytes
from exo_kimi.runtime.engine.step_times import KEEP, KNOWN, CostLine, StepTimes
from exo_kimi.runtime.steps import Proposal

# Experts gate and up at 3 bits, down at 4, the rest at 6: 18.0 GB a token, 10.1 of them routed experts.
K2 = StepBytes(
    shared_bytes=79 * 10**8,
    expert_bytes=485 * 10**9,
    experts=384,
    experts_per_token=8,
    kv_token_bytes=70_272,
    overhead_bytes=61 * OVERHEAD_S_PER_LAYER * MEMORY_BYTES_PER_S,
)
HEAD_BYTES = 15e8
COSTS = [
    K2.cost(1 + count, sequences=1, cached_tokens=1000) + count * HEAD_BYTES for count in range(MOST_HEAD_DRAFTS + 1)
]


def policy_of() -> HeadPolicy:
    return HeadPolicy.of("auto", draft_bytes=HEAD_BYTES)


def rate(count: int, chances: list[float]) -> float:
    return (1 + sum(chances[:count])) / COSTS[count]


def decode(
    policy: HeadPolicy,
    state: HeadState,
    *,
    chance: float,
    tokens: int,
    seed: int = 0,
    costs: list[float] = COSTS,
    believed: list[float] | None = None,
    each: float = HEAD_BYTES,
) -> tuple[float, int]:
    """A text of which each guess is right by a fixed chance. Returns its cost over that of plain decoding, and the last number
    of guesses; what is not guessed for 16 tokens is judged. `believed` are the costs that the policy is told."""
    draw = np.random.default_rng(seed)
    spent, done, waiting = 0.0, 0, 0
    believed = believed or costs
    wanted = policy.choose(state, most=99, costs=believed, others=0.0)
    while done < tokens:
        accepted = 0
        while accepted < wanted and draw.random() < chance:
            accepted += 1
        if wanted:
            policy.on_verified(state, drafts=wanted, accepted=accepted)
            waiting = 0
        else:
            waiting += 1
            if waiting == 16:
                right = int((draw.random(15) < chance).sum())
                policy.on_proposal(state, Proposal(seq_id=0, judged=15, right=right))
                spent, waiting = spent + each, 0
        policy.on_step(state, won=accepted, lost=lost_steps(costs, wanted, 0.0))
        spent += costs[wanted]
        done += 1 + accepted
        wanted = policy.choose(state, most=99, costs=believed, others=0.0)
    return spent / (done * costs[0]), wanted


@pytest.mark.parametrize(("chance", "least"), [(0.95, 4), (0.8, 2)])
def test_k2_guesses_as_many_as_pay(chance: float, least: int) -> None:
    policy, state = policy_of(), HeadState()
    spent, wanted = decode(policy, state, chance=chance, tokens=2000)
    best = max(range(MOST_HEAD_DRAFTS + 1), key=lambda count: rate(count, [chance**n for n in range(1, 7)]))
    assert wanted >= least and abs(wanted - best) <= 2
    ideal = rate(0, []) / rate(best, [chance**n for n in range(1, 7)])
    assert spent <= 1.08 * ideal < 0.8


def test_a_text_that_cannot_be_guessed_costs_at_most_three_hundredths() -> None:
    for seed in range(5):
        policy = policy_of()
        spent, wanted = decode(policy, HeadState(), chance=0.0, tokens=256, seed=seed)
        assert wanted == 0
        assert spent <= 1.03
        again, _ = decode(policy, HeadState(), chance=0.0, tokens=256, seed=seed)
        assert again <= spent, "another sequence begins with what was learnt of this one"


def test_it_comes_back_when_it_pays_again() -> None:
    policy, state = policy_of(), HeadState()
    _, wanted = decode(policy, state, chance=0.02, tokens=300)
    assert wanted == 0
    spent, wanted = decode(policy, state, chance=0.9, tokens=600)
    assert wanted >= 2 and spent < 0.85


def test_small_changes_change_nothing() -> None:
    policy, state = policy_of(), HeadState()
    numbers = set()
    decode(policy, state, chance=0.8, tokens=400)
    for seed in range(20):
        _, wanted = decode(policy, state, chance=0.8, tokens=20, seed=seed)
        numbers.add(wanted)
    assert len(numbers) <= 3


@given(
    st.lists(st.floats(0, 1), min_size=6, max_size=6),
    st.lists(st.floats(1, 1e12), min_size=7, max_size=7).map(sorted),
    st.floats(0, 50),
    st.integers(0, 6),
)
def test_what_is_asked_for_is_never_worse_than_none(
    hits: list[float], costs: list[float], others: float, now: int
) -> None:
    policy, state = policy_of(), HeadState()
    state.wanted = now
    for place, share in enumerate(hits):
        state.acceptance.note(place, right=20 * share, count=20)
        policy.everywhere.note(place, right=3 * share, count=3.0)  # so that each may be used
    state.account.credit = policy.account.credit = 1e15
    policy.steps = MORE_STEPS  # nothing is tried for once
    count = policy.choose(state, most=9, costs=costs, others=others)
    chances = policy.chances(state, 6)
    assert all(a >= b for a, b in pairwise(chances))

    def gain(number: int) -> float:
        return (others + 1 + sum(chances[:number])) / costs[number]

    assert gain(count) >= gain(0) * (1 - 1e-9)
    assert all(gain(other) <= CHANGE_GAIN * gain(count) * (1 + 1e-9) or count == 0 for other in range(7))


def timed(times: StepTimes, guesses: int, *seconds: float) -> None:
    for taken_s in seconds:
        times.note(guesses, taken_s, proposed=guesses)


def test_what_was_timed_goes_before_what_was_counted() -> None:
    """On a machine where a further token costs as much as the first one, whatever its bytes."""
    times = StepTimes()
    assert not times.known(0) and times.alone(COSTS) == COSTS
    timed(times, 0, 0.5, 0.010, 0.010, 0.090, 0.010)
    assert times.alone(COSTS) == pytest.approx([cost * 0.010 / COSTS[0] for cost in COSTS])
    timed(times, 2, 0.030, 0.2, 0.030)
    found = times.alone(COSTS)
    assert found[0] == pytest.approx(0.010) and found[2] == pytest.approx(0.030), (
        "what a busy machine adds does not count"
    )
    assert found[1] == pytest.approx(0.020), "between what was timed"
    assert found[3] == pytest.approx(max(0.030 * COSTS[3] / COSTS[2], 0.040)), "counted, or on the line"
    timed(times, 9, 5.0)
    assert times.alone(COSTS) == found, "more guesses than a head makes are the past's"
    state = HeadState()
    policy = policy_of()
    assert policy.choose(state, most=9, costs=[0.01 * (1 + count) for count in range(7)], others=0.0) == 0


def test_steps_in_which_something_changes_are_not_timed() -> None:
    """The first plain step after guesses was not computed ahead, and one that asks for no more guesses misses their time."""
    times = StepTimes()
    times.note(0, 1.0, proposed=2)
    for guesses, proposed in ((2, 2), (2, 2), (2, 0), (0, 0), (0, 0), (0, 1)):
        times.note(guesses, 0.1 * (1 + guesses), proposed=proposed)
    assert [len(each) for each in times.recent] == [1, 0, 2, 0, 0, 0, 0]
    assert times.known(2) and not times.known(0) and KNOWN == 2


def test_steps_of_several_are_weighed_by_a_line() -> None:
    line = CostLine()
    costs = [10.0, 12.0, 14.0]
    assert line.at(costs) == costs
    for _ in range(50):
        line.note(10.0, 0.1)
    assert line.at(costs) == costs, "of one cost nothing can be told"
    for _ in range(200):
        for cost in (10.0, 14.0):
            line.note(cost, 0.02 + 0.008 * cost)
    assert line.at(costs) == pytest.approx([0.02 + 0.008 * cost for cost in costs], rel=1e-3)
    for _ in range(300):
        for cost in (10.0, 14.0):
            line.note(cost, 0.1)
    assert line.at(costs) == pytest.approx([0.1] * 3, rel=2e-2), f"what was, is forgotten: {KEEP}"
    for cost in (10.0, 14.0):
        line.note(cost, 0.5 - 0.02 * cost)
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(line.at(costs))), "more never takes less"


@given(
    st.lists(st.floats(1.0, 8.0), min_size=7, max_size=7).map(sorted),
    st.lists(st.floats(1.0, 1.5), min_size=7, max_size=7).map(sorted),
    st.integers(30, 400),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_whatever_is_believed_what_is_lost_is_bounded(
    costs: list[float], believed: list[float], tokens: int, rights: list[float]
) -> None:
    """The policy thinks guesses cheap and was lucky before; steps cost what they cost, and every guess is wrong from now on."""
    policy, state = policy_of(), HeadState()
    costs, believed = [1.0, *costs[1:]], [1.0, *believed[1:]]
    for place, share in enumerate(rights[:6]):
        policy.everywhere.note(place, right=50 * share, count=50)
    spent, _ = decode(policy, state, chance=0.0, tokens=tokens, costs=costs, believed=believed, each=0.0)
    dearest = max(0.0, max(costs) - 1.0)  # one step may be dearer than believed
    assert spent * tokens <= tokens + FIRST_LOSS + LOSS_SHARE * tokens + dearest + 1e-6


def test_times_of_a_busy_moment_are_looked_at_again() -> None:
    """Guesses seemed dear while the machine was busy; probes find out that they are not, and are few while they are."""
    policy, state = policy_of(), HeadState()
    dear, cheap = [1.0 + 2.0 * n for n in range(7)], [1.0 + 0.1 * n for n in range(7)]
    policy.everywhere.note(0, right=95.0, count=100.0)
    steps, sent = 20_000, 0
    for _ in range(steps):
        count = policy.choose(state, most=9, costs=dear, others=0.0)
        sent += count > 0
        policy.on_step(state, won=int(count > 0), lost=lost_steps(dear, count, 0.0))
        policy.on_proposal(state, Proposal(seq_id=0, judged=1, right=1))
    assert 0 < sent < 0.01 * steps
    assert policy.choose(state, most=9, costs=cheap, others=0.0) > 0


def test_nothing_is_looked_at_again_where_no_guess_is_right() -> None:
    policy, state = policy_of(), HeadState()
    decode(policy, state, chance=0.0, tokens=300)
    tries = sum(policy.counts.tries)
    decode(policy, state, chance=0.0, tokens=20_000)
    assert sum(policy.counts.tries) <= tries + 2


def test_a_fixed_number_is_kept_and_never_more_than_is_left() -> None:
    policy = HeadPolicy.of(4, draft_bytes=1.0)
    state = HeadState()
    assert policy.choose(state, most=99, costs=COSTS, others=0) == 4
    assert policy.choose(state, most=1, costs=COSTS, others=0) == 1
    assert policy.choose(state, most=-1, costs=COSTS, others=0) == 0
    policy.on_proposal(state, Proposal(seq_id=0, lost=True))
    assert policy.choose(state, most=99, costs=COSTS, others=0) == 0
    policy.on_proposal(state, Proposal(seq_id=0, lost=True))
    assert policy.counts.undrafted == 1, "a sequence is counted once"


def test_acceptance_is_counted_by_position() -> None:
    policy, state = policy_of(), HeadState()
    for accepted in (0, 1, 3, 3):
        policy.on_verified(state, drafts=3, accepted=accepted)
    assert policy.counts.tries[:4] == [4, 3, 2, 0]
    assert policy.counts.hits[:4] == [3, 2, 2, 0]
    assert HeadState().acceptance.chance(0, FIRST_ACCEPTANCE, 1.0) == FIRST_ACCEPTANCE
