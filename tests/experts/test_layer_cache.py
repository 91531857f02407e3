"""Slots of one layer: every expert of a pass is computed once, from a slot that holds it, whatever the policy and the size."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.errors import UsageError
from exo_kimi.experts.layer_cache import LayerCache
from exo_kimi.experts.policies import POLICY_NAMES, make_policy


def new_cache(name: str, slots: int, experts: int = 16) -> LayerCache:
    return LayerCache(slots, make_policy(name, slots=slots, profile=range(experts)))


def run(cache: LayerCache, experts: list[int]) -> list[int]:
    """Carry out a pass on slots that hold numbers; returns what was read."""
    memory: list[int | None] = list(cache._content)
    computed: list[int] = []
    read: list[int] = []
    for number, each in enumerate(cache.request(experts)):
        assert each.after <= number
        slots = [slot for _, slot in (*each.held, *each.read)]
        assert len(set(slots)) == len(slots) <= cache.slots
        for expert, slot in each.read:
            cache.writing(slot)
            memory[slot] = expert
            cache.installed(expert, slot)
            read.append(expert)
        for expert, slot in (*each.held, *each.read):
            assert memory[slot] == expert
            computed.append(expert)
    assert sorted(computed) == sorted(experts)
    for expert in cache.held:
        slot = cache.slot_of(expert)
        assert slot is not None and memory[slot] == expert
    return read


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(POLICY_NAMES),
    st.integers(1, 16),
    st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True), max_size=30),
)
def test_every_expert_is_computed_once_from_its_slot(name: str, slots: int, passes: list[list[int]]) -> None:
    cache = new_cache(name, slots)
    asked = 0
    reads = 0
    for experts in passes:
        held = set(cache.held)
        read = run(cache, experts)
        assert sorted(read) == sorted(set(experts) - held)
        asked += len(experts)
        reads += len(read)
        assert len(cache.held) == min(slots, len(cache.held))
    counters = cache.counters
    assert (counters.hits + counters.misses, counters.misses) == (asked, reads)
    assert counters.evictions == reads - len(cache.held)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(POLICY_NAMES), st.integers(1, 9), st.randoms(use_true_random=False))
def test_what_did_not_come_is_forgotten_and_asked_for_again(name: str, slots: int, rng: random.Random) -> None:
    cache = new_cache(name, slots)
    for _ in range(30):
        experts = rng.sample(range(16), rng.randint(1, 12))
        if rng.random() < 0.3:
            for number, each in enumerate(cache.request(experts)):
                for expert, slot in each.read:
                    cache.writing(slot)
                    if number == 0 and rng.random() < 0.5:
                        cache.installed(expert, slot)
                if rng.random() < 0.5:
                    break
            cache.abandon()
        else:
            run(cache, experts)


def test_slots_that_are_not_swept_keep_what_they_had() -> None:
    """A prompt that asks for everything leaves half of the experts that decoding had."""
    cache = new_cache("lru", 8, experts=64)
    for expert in range(8):
        run(cache, [expert])
    run(cache, list(range(64)))
    assert set(cache.held) >= {4, 5, 6, 7}
    assert set(cache.held) - set(range(8)) == {60, 61, 62, 63}


def test_the_last_are_read_while_those_before_are_computed() -> None:
    cache = new_cache("lru", 8, experts=64)
    rounds = cache.request(list(range(64)))
    assert all(each.after < number for number, each in enumerate(rounds) if number > 1)


def test_an_expert_is_admitted_ahead_only_where_another_can_go() -> None:
    cache = new_cache("lru", 2)
    run(cache, [1, 2])
    assert cache.admit(3, kept=[1, 2]) is None
    slot = cache.admit(3, kept=[2])
    assert slot is not None and cache.slot_of(3) == slot and cache.held == (2, 3)


def test_lru_at_as_many_slots_as_choices_hits_what_the_token_before_had() -> None:
    cache = new_cache("lru", 4)
    for experts in ([0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [0, 1, 2, 3]):
        run(cache, experts)
    assert (cache.counters.hits, cache.counters.misses) == (4, 12)


def test_slru_keeps_what_was_used_twice_from_what_comes_once() -> None:
    cache = new_cache("slru", 4)
    for experts in ([0], [0], [1], [2], [3], [4], [5], [6]):
        run(cache, experts)
    assert 0 in cache.held


def test_lfu_forgets_old_uses() -> None:
    cache = new_cache("lfu", 2)
    for _ in range(8):
        run(cache, [0])
    for _ in range(600):
        run(cache, [1])
    run(cache, [2])
    assert cache.held == (1, 2)


def test_s3_fifo_takes_back_what_it_gave_up_lately() -> None:
    cache = new_cache("s3fifo", 4)
    for expert in (0, 1, 2, 3, 4):
        run(cache, [expert])
    assert 0 not in cache.held
    run(cache, [0])
    for expert in (5, 6, 7):
        run(cache, [expert])
    assert 0 in cache.held


def test_a_pinned_expert_stays() -> None:
    cache = LayerCache(4, make_policy("pinned", slots=4, profile=[9, 8, 1, 2]))
    for experts in ([9], [8], *([each] for each in range(8))):
        run(cache, experts)
    assert set(cache.held) == {6, 7, 8, 9}


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no such policy"):
        make_policy("mru", slots=4)
    with pytest.raises(UsageError, match="profile"):
        make_policy("pinned", slots=4)
