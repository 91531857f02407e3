"""Sampling against a slow oracle, by property, and by distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.errors import ProtocolError, StageError
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.sampling import SequenceSampler, guess_token, sample, sample_runs, uniform
from exo_kimi.runtime.steps import Sampled, SequenceStart
from exo_kimi.runtime.token_mask import allowed


def sampler_of(history: Sequence[int] = (), **params: Any) -> SequenceSampler:
    params.setdefault("seed", 7)
    start = SequenceStart(seq_id=3, prompt_tokens=2, sampling=SamplingParams(**params), history=tuple(history))
    return SequenceSampler(start)


def one(logits: Any, sampler: SequenceSampler, mask: bytes | None = None) -> Sampled:
    return sample(np.asarray(logits, np.float32)[None], [sampler], [mask])[0]


def mask_of(ids: Sequence[int], vocab_size: int) -> bytes:
    words = np.zeros(-(-vocab_size // 32), "<u4")
    for i in ids:
        words[i // 32] |= np.uint32(1 << (i % 32))
    return words.tobytes()


def oracle_kept(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Probability of each id that may be drawn: plain loops over a sorted list."""
    scaled = [float(x) / params.temperature for x in logits]
    top = max(scaled)
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    weights = {i: float(np.exp(scaled[i] - top)) for i in order}
    kept = order[: params.top_k] if params.top_k else order
    if params.top_p < 1:
        total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weights[i]
            if mass >= params.top_p * total:
                break
        kept = nucleus
    kept = [i for i in kept if weights[i] >= params.min_p]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


def oracle_choice(logits: np.ndarray, params: SamplingParams, point: float) -> int:
    kept = oracle_kept(logits, params)
    mass = 0.0
    for i in sorted(kept):
        mass += kept[i]
        if point < mass:
            return i
    return max(kept)


def test_greedy_takes_the_largest_logit_and_the_lowest_id_among_equals() -> None:
    assert one([0.0, 3.0, 1.0, 3.0], sampler_of(temperature=0.0)).token_id == 1


def test_greedy_with_a_mask_takes_the_largest_allowed_logit() -> None:
    assert one([0.0, 3.0, 1.0, 2.0], sampler_of(temperature=0.0), mask_of([0, 2], 4)).token_id == 2


def test_rows_of_one_call_do_not_influence_each_other() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 50)).astype(np.float32)
    alone = [one(row, sampler_of(seed=i, temperature=0.9)).token_id for i, row in enumerate(logits)]
    samplers = [sampler_of(seed=i, temperature=0.9) for i in range(6)]
    assert [s.token_id for s in sample(logits, samplers, [None] * 6)] == alone


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 3.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(-(2**70), 2**70),
)
def test_the_choice_is_the_oracles(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    row = np.array(logits, np.float32) / 8  # ties are frequent
    sampler = SequenceSampler(SequenceStart(seq_id=0, prompt_tokens=1, sampling=params))
    assert one(row, sampler).token_id == oracle_choice(row, params, uniform(seed, 0))


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.999999])
def test_a_nucleus_of_thousands_is_exact(top_p: float) -> None:
    row = np.random.default_rng(1).normal(scale=0.3, size=5000).astype(np.float32)
    params = SamplingParams(top_p=top_p, seed=11)
    for n in range(20):
        sampler = SequenceSampler(SequenceStart(seq_id=0, prompt_tokens=1, sampling=params, history=(1,) * n))
        assert one(row, sampler).token_id == oracle_choice(row, params, uniform(11, n))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.1},
    ],
)
def test_draws_follow_the_probabilities(params: dict[str, Any]) -> None:
    row = np.random.default_rng(2).normal(scale=1.5, size=20).astype(np.float32)
    expected = oracle_kept(row, SamplingParams(**params))
    draws = 4000
    sampler = sampler_of(seed=123, **params)
    found = np.bincount([one(row, sampler).token_id for _ in range(draws)], minlength=20)
    assert set(np.flatnonzero(found)) <= set(expected)
    common = [i for i, p in expected.items() if p * draws >= 5]
    chi_square = sum((found[i] - expected[i] * draws) ** 2 / (expected[i] * draws) for i in common)
    # Mean k-1, variance 2(k-1): five standard deviations.
    freedom = max(1, len(common) - 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_nth_token_depends_on_the_seed_and_n_only() -> None:
    row = np.random.default_rng(3).normal(size=200).astype(np.float32)
    whole = sampler_of(seed=5)
    tokens = [one(row, whole).token_id for _ in range(12)]
    assert len(set(tokens)) > 3
    resumed = sampler_of(history=tokens[:7], seed=5)
    assert [one(row, resumed).token_id for _ in range(5)] == tokens[7:]
    other = sampler_of(seed=6)
    assert [one(row, other).token_id for _ in range(12)] != tokens


def test_the_stream_is_pinned() -> None:
    # A change of these numbers changes what every seed says.
    found = [uniform(0, 0), uniform(0, 1), uniform(42, 0), uniform(-1, 10**6)]
    assert found == [0.011546754286331562, 0.5023796042735054, 0.8201981478608876, 0.4614255439484173]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert one([1.0, 500.0, -500.0], sampler_of(temperature=1e-300)).token_id == 1


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    sampler = sampler_of(history=[1, 1, 2], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler.observe(np.array([0, 0, 0], np.int32))
    # 0: 1.0 untouched; 1: 1.9 - 0.5 - 0.5; 2: 1.8 - 0.5 - 0.25 = 1.05; 3: 1.04
    assert one([1.0, 1.9, 1.8, 1.04], sampler).token_id == 2
    # Now 2 was generated twice: 0.8.
    assert one([1.0, 1.9, 1.8, 1.04], sampler).token_id == 3


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    sampler = sampler_of(history=[1], temperature=0.0, repetition_penalty=2.0)
    sampler.observe(np.array([0], np.int32))
    assert one([3.0, 3.5, 1.8, 1.0], sampler).token_id == 2
    negative = sampler_of(history=[0], temperature=0.0, repetition_penalty=2.0)
    assert one([-1.0, -1.5], negative).token_id == 1


def test_logit_bias_is_added_to_the_logits() -> None:
    sampler = sampler_of(temperature=0.0, logit_bias=((0, 5.0), (1, -100.0)))
    assert one([0.0, 4.0, 3.0], sampler).token_id == 0


def test_a_mask_is_never_violated_at_any_temperature() -> None:
    row = np.random.default_rng(4).normal(size=70).astype(np.float32)
    sampler = sampler_of(temperature=50.0, top_p=0.99, logit_bias=((1, 1e6),))
    mask = mask_of([5, 33, 69], 70)
    assert {one(row, sampler, mask).token_id for _ in range(200)} == {5, 33, 69}


def test_a_mask_shorter_than_the_vocabulary_forbids_the_rest_and_a_longer_one_is_cut() -> None:
    assert allowed(mask_of([0, 31], 32), 40).nonzero()[0].tolist() == [0, 31]
    assert allowed(mask_of([2, 63], 64), 40).nonzero()[0].tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_the_raw_logits(temperature: float) -> None:
    row = np.random.default_rng(5).normal(size=30).astype(np.float32)
    sampler = sampler_of(
        temperature=temperature,
        presence_penalty=1.0,
        history=[1, 2],
        top_k=3,
        logit_bias=((4, 2.0),),
        logprobs=True,
        top_logprobs=5,
    )
    found = one(row, sampler)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert found.logprob == pytest.approx(exact[found.token_id])
    best = sorted(range(30), key=lambda i: (-exact[i], i))[:5]
    assert [i for i, _ in found.top_logprobs] == best
    assert [p for _, p in found.top_logprobs] == pytest.approx(exact[best])


def test_logprobs_come_only_when_asked_for() -> None:
    found = one([1.0, 2.0], sampler_of(top_logprobs=2))
    assert (found.logprob, found.top_logprobs) == (None, ())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_not_a_token(bad: float, temperature: float) -> None:
    with pytest.raises(StageError, match="sequence 3 are not finite"):
        one([0.0, bad, 100.0], sampler_of(temperature=temperature))


def test_a_mask_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(StageError, match="no token is allowed"):
        one([0.0, 1.0], sampler_of(), bytes(4))


def test_sampling_without_a_seed_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without a seed"):
        sampler_of(seed=None)


HEAD = np.array([1.2, 0.3, 2.0, -0.5, 0.9, 1.4], np.float32)
TRUTH = np.array([1.0, 0.8, 1.6, 0.2, -0.4, 1.9], np.float32)
CHI_SQUARE_1_PERCENT = {1: 6.635, 2: 9.210, 3: 11.345, 4: 13.277, 5: 15.086}
AFTER = np.array([0.1, 1.1, 0.4, 1.7, 0.9, -1.0], np.float32)


def exact(logits: np.ndarray[Any, Any], params: SamplingParams) -> np.ndarray[Any, Any]:
    """The distribution that a request asks for, written out."""
    p = np.exp(logits.astype(np.float64) / params.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    if params.top_p < 1:
        mass = p / p.sum()
        before = np.cumsum(mass[order]) - mass[order]
        p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=0.7, top_p=0.9, min_p=0.2),
    ],
)
def test_guesses_of_a_head_leave_the_distribution_as_it_is(params: SamplingParams) -> None:
    """20,000 draws, each after a guess that the head drew: the token, and the one after a guess that was right, by chi-square at
    1 %. The guess is right more often than two independent draws agree."""
    draws, right = 20_000, 0
    first, second = np.zeros(6), np.zeros(6)
    for seed in range(draws):
        sampler = SequenceSampler(SequenceStart(seq_id=0, prompt_tokens=1, sampling=replace(params, seed=seed)))
        guess = guess_token(HEAD, sampler)
        sampler.forget(1)
        assert guess is not None and sampler.generated_tokens == 0
        run = sample_runs(np.stack([TRUTH, AFTER]), [sampler], [(None, None)], [np.array([guess], np.int32)])
        first[run[0].token_id] += 1
        if len(run) == 2:
            right += 1
            second[run[1].token_id] += 1
    truth, head = exact(TRUTH, params), exact(HEAD, params)
    for counts, expected in ((first, truth), (second, exact(AFTER, params))):
        possible = expected > 0
        assert not counts[~possible].any()
        wanted = expected[possible] * counts.sum()
        statistic = float(((counts[possible] - wanted) ** 2 / wanted).sum())
        assert statistic < CHI_SQUARE_1_PERCENT[int(possible.sum()) - 1]
    assert right / draws > float(truth @ head) + 0.1
