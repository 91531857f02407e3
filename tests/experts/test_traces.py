"""Traces, made-up ones, bounds and replays: known answers, and every policy under the one that knows the future."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import UsageError
from exo_kimi.experts.policies import POLICY_NAMES
from exo_kimi.experts.traces.bounds import belady_hits, che_hit_rate
from exo_kimi.experts.traces.replay import che, replay
from exo_kimi.experts.traces.synthetic import scan, scans_between, uniform, zipf
from exo_kimi.experts.traces.trace import ExpertTrace, read_trace


def batched(trace: ExpertTrace, *calls: int) -> ExpertTrace:
    """The same tokens in passes of these sizes, again and again."""
    sizes = list(itertools.islice(itertools.cycle(calls), trace.tokens))
    ends = np.minimum(np.cumsum(sizes), trace.tokens)
    taken = np.diff(ends, prepend=0)
    calls_array = taken[taken > 0].astype(np.int32)
    return ExpertTrace(
        ids=trace.ids, experts=trace.experts, layers=trace.layers, calls=calls_array, source=trace.source
    )


@pytest.mark.parametrize("policy", ["lru", "slru", "lfu", "s3fifo"])
@pytest.mark.parametrize("slots", [8, 24, 48, 96])
def test_a_uniform_trace_hits_as_often_as_experts_have_slots(policy: str, slots: int) -> None:
    trace = uniform(experts=96, chosen=8, tokens=4000, layers=2, seed=slots)
    warm = replay(trace, policy, slots).parts[1:]
    assert float(np.mean(warm)) == pytest.approx(slots / 96, abs=0.01)
    assert che(trace, slots) == pytest.approx(slots / 96, abs=0.005)


def test_che_is_exact_for_equal_chances() -> None:
    for slots in (1, 7, 32, 63):
        assert che_hit_rate(np.full(64, 8 / 64), slots) == pytest.approx(slots / 64, abs=1e-9)
    assert che_hit_rate(np.full(64, 8 / 64), 64) == 1.0


@pytest.mark.parametrize("slots", [8, 16, 32, 64])
def test_che_predicts_least_recently_used_by_zipfs_law(slots: int) -> None:
    trace = zipf(exponent=1.0, experts=128, chosen=4, tokens=6000, seed=1)
    assert np.mean(replay(trace, "lru", slots).parts[1:]) == pytest.approx(che(trace, slots), abs=0.01)


def test_a_scan_defeats_least_recently_used_and_not_the_bound() -> None:
    trace = scan(experts=64, chosen=8, tokens=400)
    assert replay(trace, "lru", 56).hits == 0
    assert replay(trace, "belady", 56).hit_rate > 0.8
    assert replay(trace, "lru", 64).misses == 64


def test_scans_between_answers_cost_a_segmented_cache_less() -> None:
    popular = zipf(exponent=1.2, experts=64, chosen=4, tokens=1500, seed=3)
    trace = scans_between(popular, every=100)
    assert trace.tokens == 1500 + 15 * 16
    assert replay(trace, "slru", 24).hit_rate > replay(trace, "lru", 24).hit_rate


@pytest.mark.parametrize("calls", [(1,), (3, 1), (40,)])
@pytest.mark.parametrize("slots", [1, 3, 4, 9, 20, 31])
def test_no_policy_hits_more_than_the_bound(slots: int, calls: tuple[int, ...]) -> None:
    for seed, exponent in ((0, 0.0), (1, 0.8), (2, 1.6)):
        trace = batched(zipf(exponent=exponent, experts=32, chosen=4, tokens=240, layers=2, seed=seed), *calls)
        bound = replay(trace, "belady", slots)
        for policy in POLICY_NAMES:
            made = replay(trace, policy, slots)
            assert made.hits <= bound.hits, policy
            assert made.hits + made.misses == bound.hits + bound.misses == sum(map(len, all_requests(trace)))


def all_requests(trace: ExpertTrace) -> list[tuple[int, ...]]:
    return [each for layer in range(len(trace.layers)) for each in trace.requests(layer)]


@given(
    requests=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3).map(lambda s: tuple(sorted(s))), max_size=7),
    slots=st.integers(3, 5),
)
def test_the_bound_is_what_the_best_choice_of_evictions_reaches(requests: list[tuple[int, ...]], slots: int) -> None:
    assert sum(belady_hits(requests, slots)) == brute_force(requests, slots)


def brute_force(requests: list[tuple[int, ...]], slots: int) -> int:
    """The most hits over all ways to keep experts beside those that each pass needs."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for wanted in requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            hits += len(held & set(wanted))
            others = sorted(held - set(wanted))
            room = slots - len(wanted)
            for kept in itertools.combinations(others, min(room, len(others))):
                state = frozenset(wanted) | set(kept)
                after[state] = max(after.get(state, 0), hits)
        states = after
    return max(states.values())


def test_least_recently_used_with_as_many_slots_as_a_token_hits_what_tokens_share() -> None:
    trace = zipf(exponent=1.0, experts=32, chosen=4, tokens=500, layers=3, seed=5)
    made = replay(trace, "lru", 4)
    assert made.hits == round(trace.overlap() * 3 * 499 * 4)


def test_a_pass_asks_for_each_expert_once() -> None:
    ids = np.array([[[0, 1], [1, 2], [3, 0]]])
    trace = ExpertTrace(ids=ids.astype(np.uint8), experts=4, layers=(1,), calls=np.array([2, 1], np.int32))
    assert [set(each) for each in trace.requests(0)] == [{0, 1, 2}, {3, 0}]
    assert [set(each) for each in trace.decoding().requests(0)] == [{0, 1}, {1, 2}, {3, 0}]
    made = replay(trace, "lru", 3)
    assert (made.hits, made.misses) == (1, 4)


def test_a_file_gives_the_trace_back(tmp_path: Path) -> None:
    trace = batched(zipf(exponent=1, experts=384, chosen=8, tokens=50, layers=3), 7, 1)
    path = tmp_path / "trace.npz"
    trace.save(path)
    again = read_trace(path)
    assert (again.ids == trace.ids).all() and (again.calls == trace.calls).all()
    assert (again.experts, again.layers, again.source) == (384, (0, 1, 2), "zipf 1")
    written = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == written
    assert len(written) < 2 * trace.ids.size + 2000


def arrays_of(trace: ExpertTrace) -> dict[str, np.ndarray]:
    return {
        "version": np.int64(1),
        "experts": np.int64(trace.experts),
        "layers": np.array(trace.layers, np.int32),
        "ids": trace.ids,
        "calls": trace.calls,
        "source": np.frombuffer(b"x", np.uint8),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": np.int64(2)}, "another version"),
        ({"experts": np.int64(3)}, "not there"),
        ({"calls": np.array([1], np.int32)}, "wrong passes"),
        ({"layers": np.array([1, 1], np.int32)}, "wrong layers"),
        ({"ids": np.zeros((2, 5, 2), np.uint8)}, "twice"),
        ({"ids": np.zeros((2, 0, 2), np.uint8)}, "without tokens"),
        ({"ids": np.ones((2, 5, 2), np.float32)}, "is no trace"),
        ({"more": np.int64(1)}, "is no trace"),
        ({"source": np.array([{}], object)}, "cannot read"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "wrong.npz"
    np.savez_compressed(path, **{**arrays_of(uniform(experts=8, chosen=2, tokens=5, layers=2)), **change})
    with pytest.raises(UsageError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    for content in (b"", b"text", b"PK\x03\x04" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot read the trace"):
            read_trace(path)
    with pytest.raises(UsageError, match="cannot read the trace"):
        read_trace(tmp_path / "none.npz")


def test_random_damage_is_an_error_of_ours(tmp_path: Path) -> None:
    path, random = tmp_path / "trace.npz", Random(0)
    uniform(experts=16, chosen=2, tokens=20, layers=2).save(path)
    whole = path.read_bytes()
    for _ in range(200):
        bent = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            bent[random.randrange(len(bent))] = random.randrange(256)
        path.write_bytes(bytes(bent[: random.randint(1, len(bent))] if random.random() < 0.3 else bent))
        try:
            read_trace(path)
        except UsageError:
            continue


def test_replays_refuse_what_they_cannot_do() -> None:
    trace = uniform(experts=8, chosen=2, tokens=5)
    with pytest.raises(UsageError, match="at least 1"):
        replay(trace, "lru", 0)
    with pytest.raises(UsageError, match="no such policy"):
        replay(trace, "fifo", 2)
    with pytest.raises(UsageError, match="another model"):
        replay(trace, "pinned", 2, learnt=uniform(experts=9, chosen=2, tokens=5))
