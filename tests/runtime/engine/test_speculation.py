"""Speculation from the past: guesses change no token, whatever happens around them, and are sent only where bytes say so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exo_kimi
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ProtocolError
from exo_kimi.models.kimi_k2 import CACHE_STEP
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import (
    BYTES_PER_FLOP,
    NGRAM,
    PRIOR,
    Drafter,
    PromptLookup,
    StepBytes,
    choose_drafts,
    disk_cost_of,
)
from exo_kimi.runtime.requests import ExpertHealth, GenerationRequest, SamplingParams, StageHealth, TokenEvent
from exo_kimi.runtime.stage.inline import InlinePipeline, run_chain
from exo_kimi.runtime.stage.sampling import SequenceSampler, sample, sample_runs
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Segment, SequenceStart, Step

pytestmark = pytest.mark.timeout(60)
K2 = StepBytes(
    shared_bytes=12 * 10**9, expert_bytes=450 * 10**9, experts=384, experts_per_token=8, kv_token_bytes=70_272
)
SMALL = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8}


def drafter_of(limit: int = 8, *, always: bool = True, step_bytes: StepBytes = K2) -> Drafter:
    return Drafter(step_bytes=step_bytes, limit=limit, always=always)


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


# What follows, from the past.


def slow_guess(tokens: Sequence[int], limit: int) -> list[int]:
    """The oracle of a fresh match: the last place before where the last tokens stood."""
    for start in range(len(tokens) - NGRAM - 1, -1, -1):
        if list(tokens[start : start + NGRAM]) == list(tokens[-NGRAM:]):
            found = list(tokens)
            for position in range(start + NGRAM, start + NGRAM + limit):
                found.append(found[position])
            return found[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_a_guess_is_what_followed_the_same_tokens_before(tokens: list[int], limit: int) -> None:
    lookup = PromptLookup(tokens, len(tokens))
    lookup.catch_up()
    found = lookup.guess(limit)
    expected = slow_guess(tokens, limit)
    assert len(found) in (0, limit)
    # What is being followed may be older than the newest match, but never where there is none.
    assert bool(found) == bool(expected)
    if found and not lookup._run:
        assert found == expected


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(0, 80), max_size=4))
def test_it_does_not_matter_in_how_many_turns_the_tokens_come(tokens: list[int], cuts: list[int]) -> None:
    at_once = PromptLookup(tokens, 10)
    at_once.catch_up()
    grown: list[int] = []
    in_turns = PromptLookup(grown, 10)
    for start, end in pairwise(sorted({0, len(tokens), *(min(cut, len(tokens)) for cut in cuts)})):
        grown += tokens[start:end]
        in_turns.catch_up()
    assert in_turns.guess(5) == at_once.guess(5)
    assert in_turns.chances(5) == at_once.chances(5)


@given(st.lists(st.integers(0, 4), max_size=120))
def test_chances_are_chances_and_never_rise(tokens: list[int]) -> None:
    lookup = PromptLookup(tokens, 3)
    lookup.catch_up()
    chances = lookup.chances(8)
    assert all(0 < after <= before < 1 for before, after in pairwise(chances))


def test_a_loop_is_learnt_and_the_prompt_judges_nothing() -> None:
    loop = [1, 2, 3, 4, 5] * 40
    learnt, given_ = PromptLookup(loop, 5), PromptLookup(loop, len(loop))
    learnt.catch_up()
    given_.catch_up()
    assert learnt.guess(7) == given_.guess(7) == [1, 2, 3, 4, 5, 1, 2]
    assert learnt.chances(1)[0] > 0.95
    assert given_.chances(1) == [PRIOR]


# How many are worth their bytes.

step_bytes = st.builds(
    StepBytes,
    shared_bytes=st.integers(1, 1000),
    expert_bytes=st.integers(0, 10_000),
    experts=st.just(16),
    experts_per_token=st.integers(1, 16),
    kv_token_bytes=st.integers(0, 5),
)
falling = st.lists(st.floats(0, 1), max_size=3).map(lambda values: sorted(values, reverse=True))


@given(step_bytes, st.lists(falling, min_size=1, max_size=3), st.integers(0, 40))
def test_no_other_choice_gives_more_tokens_per_byte(
    step_bytes: StepBytes, chances: list[list[float]], others: int
) -> None:
    def rate(counts: Sequence[int]) -> float:
        expected = len(chances) + sum(sum(line[:count]) for line, count in zip(chances, counts, strict=True))
        return expected / step_bytes.read(len(chances) + others + sum(counts))

    found = choose_drafts(chances, step_bytes.read, others=others)
    best = max(rate(counts) for counts in product(*(range(len(line) + 1) for line in chances)))
    assert rate(found) >= best * (1 - 1e-12)
    assert rate(found) >= rate([0] * len(chances))


@given(step_bytes, st.lists(falling, min_size=1, max_size=3), st.integers(-2, 6))
def test_there_are_never_more_guesses_than_there_is_room_for(
    step_bytes: StepBytes, chances: list[list[float]], room: int
) -> None:
    found = choose_drafts(chances, step_bytes.read, room=room)
    assert sum(found) <= max(0, room)
    assert all(0 <= count <= len(line) for count, line in zip(found, chances, strict=True))


@given(step_bytes, st.integers(1, 500))
def test_a_step_reads_between_one_token_s_experts_and_all_of_them(step_bytes: StepBytes, tokens: int) -> None:
    one = step_bytes.shared_bytes + step_bytes.expert_bytes * step_bytes.experts_per_token / 16
    assert one * (1 - 1e-9) <= step_bytes.read(tokens)
    assert step_bytes.read(tokens) <= step_bytes.shared_bytes + step_bytes.expert_bytes
    assert step_bytes.read(tokens) <= step_bytes.read(tokens + 1)


def test_a_guess_pays_for_k2_from_a_chance_that_the_bytes_give_and_on() -> None:
    # One more token reads 8 of 384 experts more, nearly: 9.2 GB beside 12 + 9.4 GB.
    threshold = K2.read(2) / K2.read(1) - 1
    assert 0.42 < threshold < 0.44
    assert choose_drafts([[threshold + 0.01]], K2.read) == [1]
    assert choose_drafts([[threshold - 0.01]], K2.read) == [0]
    # Beside a prompt that reads every expert anyway, any chance does.
    assert choose_drafts([[0.01]], K2.read, others=4000) == [1]


# Drawn position by position.


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_p=0.8, seed=3),
        SamplingParams(temperature=0.9, presence_penalty=2.0, frequency_penalty=1.0, repetition_penalty=1.7, seed=4),
        SamplingParams(temperature=0.7, logprobs=True, top_logprobs=2, seed=5),
    ],
)
def test_any_guesses_give_the_tokens_that_come_one_by_one(params: SamplingParams) -> None:
    rng = np.random.default_rng(0)
    start = SequenceStart(seq_id=1, prompt_tokens=1, sampling=params, history=(4, 4))
    for right, kept in ((0, 1), (1, 2), (3, 4), (3, 2), (3, 1)):
        logits = rng.normal(size=(4, 12)).astype(np.float32) * 2
        plain, guessing = SequenceSampler(start), SequenceSampler(start)
        expected = [sample(logits[row : row + 1], [plain], [None])[0] for row in range(4)]
        draft = [sampled.token_id for sampled in expected[:3]]
        if right < 3:
            draft[right] = (draft[right] + 1) % 12
        found = sample_runs(logits, [guessing], [(None,) * (1 + len(draft))], [np.array(draft, np.int32)])
        assert list(found) == expected[: right + 1]
        # The leader keeps only some of them: what the sampler remembers goes back with it.
        guessing.begin_run(keep=kept)
        again = SequenceSampler(start)
        for sampled in expected[:kept]:
            again.accept(sampled.token_id)
        assert (guessing.counts, guessing.seen, guessing.generated_tokens) == (
            again.counts,
            again.seen,
            again.generated_tokens,
        )


# The engine over fake stages.


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_answers_are_the_same_with_guesses_and_fewer_steps_are_taken(fakes: SimpleNamespace, stages: int) -> None:
    pipeline = fakes.Pipeline(stages=stages, model=fakes.repeating_token)
    drafter = drafter_of()
    prompts = [[i, 1, 2] for i in range(6)]
    async with Engine(pipeline, drafter=drafter) as engine:
        requests = [request_of(prompt, 200) for prompt in prompts]
        found = await asyncio.gather(*(collect(engine, request) for request in requests))
        snapshot = engine.snapshot()
    assert [[e.token_id for e in one] for one in found] == [
        fakes.generation(prompt, 200, fakes.repeating_token) for prompt in prompts
    ]
    assert [[e.finish_reason for e in one] for one in found] == [[None] * 199 + ["length"]] * 6
    assert snapshot.generated_tokens_total == 1200
    assert snapshot.draft_tokens_total == drafter.counts.drafted > 0
    assert 300 < snapshot.draft_tokens_accepted_total <= snapshot.draft_tokens_total
    assert snapshot.steps_total < 200 * stages * 0.6
    assert pipeline.fake.held == {}


def request_of(prompt: list[int], new: int, **fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id=str(prompt), prompt_ids=tuple(prompt), max_tokens=new, **fields)


async def test_a_stop_id_among_guesses_that_were_right_ends_the_answer_there(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(model=lambda tokens: 12 if len(tokens) == 42 else len(tokens) % 4)
    prompt = [0, 1, 2, 3] * 4
    async with Engine(pipeline, drafter=drafter_of()) as engine:
        for stop in (12, 3):
            events = await collect(engine, request_of(prompt, 60, stop_ids=frozenset([stop])))
            expected = fakes.generation(prompt, 60, pipeline.model)
            assert [e.token_id for e in events] == expected[: expected.index(stop) + 1]
            assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1].finish_reason == "stop"
        await settle()
        assert engine.snapshot().draft_tokens_accepted_total > 10
        assert engine.snapshot().kv_reserved_tokens == 0
    assert pipeline.fake.held == {}


@pytest.mark.parametrize("new", [1, 2, 3, 7])
async def test_max_tokens_holds_and_no_cache_beyond_it_is_asked_for(fakes: SimpleNamespace, new: int) -> None:
    pipeline = fakes.Pipeline(
        stages=1, model=lambda tokens: tokens[-3], context=12 + new, kv_capacity_tokens=11 + new, cache_step=1
    )
    async with Engine(pipeline, drafter=drafter_of(), prefill_chunk=64) as engine:
        events = await collect(engine, request_of([1, 2, 3] * 4, new))
    assert [e.token_id for e in events] == ([1, 2, 3] * 3)[:new]
    assert events[-1].finish_reason == "length"


async def test_preemption_with_guesses_in_flight_changes_no_token(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(stages=3, kv_capacity_tokens=16 * 7, cache_step=16, model=fakes.repeating_token)
    prompts = [[i, 5, 6] for i in range(9)]
    async with Engine(pipeline, drafter=drafter_of()) as engine:
        found = await asyncio.gather(*(collect(engine, request_of(p, 70)) for p in prompts))
        snapshot = engine.snapshot()
    assert snapshot.preemptions_total > 0
    assert snapshot.draft_tokens_accepted_total > 0
    assert [[e.token_id for e in one] for one in found] == [
        fakes.generation(p, 70, fakes.repeating_token) for p in prompts
    ]


async def test_a_reader_that_leaves_within_a_run_leaves_nothing(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(model=lambda tokens: tokens[-3])
    async with Engine(pipeline, drafter=drafter_of()) as engine:
        stream = engine.generate(request_of([1, 2, 3] * 3, 1000))
        for _ in range(6):
            await anext(stream)
        await stream.aclose()
        await settle()
        assert pipeline.fake.held == {}
        assert engine.snapshot().kv_reserved_tokens == 0


class Late:
    """A grammar that is free for some tokens and then allows one only."""

    def __init__(self, free: int, forced: int) -> None:
        self.left, self.forced = free, forced

    def mask(self) -> bytes | None:
        if self.left > 0:
            return None
        return (1 << self.forced).to_bytes(128, "little")

    def accept(self, token_id: int) -> None:
        self.left -= 1


async def test_a_mask_that_begins_within_a_run_holds_from_its_first_token_on(checkpoint: Path) -> None:
    """What was drawn without the mask is dropped, on the stages too, and nothing is guessed under it."""
    prompt = [5, 6, 7, 8] * 8
    found = []
    for drafter in (None, drafter_of()):
        async with Engine(pipeline_of(checkpoint, 2), drafter=drafter) as engine:
            request = request_of(prompt, 20, sampling=LOUD, constraint=Late(14, 9))
            found.append([e.token_id for e in await collect(engine, request)])
            accepted = engine.snapshot().draft_tokens_accepted_total
    assert found[1] == found[0]
    assert found[0][14:] == [9] * 6
    assert accepted > 0


# A real tiny Kimi.

LOUD = SamplingParams(temperature=1.0, seed=7, logit_bias=tuple((token, 30.0) for token in (5, 6, 7, 8)))
"""A random model talks of four tokens only, so that its past often guesses right."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("speculation") / "tiny", dtype="F32", seed=3, config=SMALL)


def pipeline_of(checkpoint: Path, stages: int, **options: int) -> InlinePipeline:
    bounds = {1: [0, 7], 2: [0, 4, 7], 3: [0, 1, 3, 7]}[stages]

    def load() -> Sequence[StageModel]:
        return [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise(bounds)]

    sizes = {"kv_capacity_tokens": 40 * CACHE_STEP, "cache_step": CACHE_STEP} | options
    return InlinePipeline(load, stages=stages, context=4096, **sizes)


SAMPLINGS = (
    SamplingParams(temperature=0.0, logprobs=True, top_logprobs=2),
    LOUD,
    SamplingParams(temperature=0.7, seed=1, logit_bias=LOUD.logit_bias, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, seed=2),
)


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_real_answers_are_the_same_with_guesses_greedy_and_sampled(checkpoint: Path, stages: int) -> None:
    prompts = ([5, 6, 7, 8] * 10, [5, 6, 5, 7] * 9, list(range(5, 9)) * 4, list(range(100, 130)))
    requests = [request_of(p, 20, sampling=s) for p, s in zip(prompts, SAMPLINGS, strict=True)]
    found, accepted = [], 0
    for drafter in (None, drafter_of(4)):
        async with Engine(pipeline_of(checkpoint, stages), drafter=drafter) as engine:
            found.append(await asyncio.gather(*(collect(engine, request) for request in requests)))
            accepted = engine.snapshot().draft_tokens_accepted_total
    for plain, guessed in zip(*found, strict=True):
        assert [e.token_id for e in guessed] == [e.token_id for e in plain]
        for one, other in zip(plain, guessed, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4) if one.logprob else other.logprob is None
            assert [i for i, _ in one.top_logprobs] == [i for i, _ in other.top_logprobs]
    assert accepted > 10


async def test_a_kept_prefix_holds_no_guess_that_was_wrong(checkpoint: Path) -> None:
    """A second turn begins in the caches of the first, whose last step had guesses; it answers as if it had not."""
    found = []
    for options in ({}, {"drafter": drafter_of(4), "prefixes": PrefixOptions()}):
        async with Engine(pipeline_of(checkpoint, 2), **options) as engine:
            prompt, events = [5, 6, 7, 8] * 20, []
            for turn in range(3):
                events = await collect(engine, request_of(prompt, 13, sampling=LOUD))
                prompt += [event.token_id for event in events] + [5 + turn, 6, 6]
            found.append(prompt)
            cached, accepted = events[-1].cached_tokens, engine.snapshot().draft_tokens_accepted_total
    assert found[1] == found[0]
    assert cached > 64
    assert accepted > 5


async def test_bytes_keep_guesses_away_from_text_that_does_not_repeat(checkpoint: Path) -> None:
    model = bytes_of_manifest(resolve(open_index(checkpoint)))
    drafter = Drafter.of("auto", model)
    assert drafter is not None
    request = request_of(list(range(200)), 30, sampling=SamplingParams(temperature=1.0, seed=2))
    async with Engine(pipeline_of(checkpoint, 1), drafter=drafter) as engine:
        await collect(engine, request)
    assert drafter.counts.read_bytes <= drafter.counts.plain_bytes * 1.01
    assert drafter.counts.plain_bytes > 0
    assert Drafter.of("off", model) is Drafter.of(0, model) is None


@pytest.fixture(scope="module")
def worker(checkpoint: Path) -> Callable[[], list[StageWorker]]:
    models = [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise([0, 4, 7])]
    return lambda: [StageWorker(model, epoch=1, stage=i) for i, model in enumerate(models)]


def step_of(offset: int, tokens: list[int], drafts: int = 0, *, begin: bool = False, **fields: Any) -> Step:
    start = SequenceStart(seq_id=0, prompt_tokens=1, sampling=SamplingParams(temperature=0.0))
    fields = {"sample": True} | fields
    segment = Segment(seq_id=0, offset=offset, length=len(tokens), drafts=drafts, **fields)
    return Step(
        epoch=1,
        step_id=offset,
        segments=(segment,),
        tokens=np.array(tokens, np.int32),
        begin=(start,) if begin else (),
    )


def test_a_stage_takes_back_guesses_and_nothing_else(worker: Callable[[], list[StageWorker]]) -> None:
    stages = worker()
    run_chain(stages, step_of(0, [1, 2, 3, 4], begin=True))
    run_chain(stages, step_of(4, [5, 6, 7, 8], 3))
    for offset in (4, 9):
        with pytest.raises(ProtocolError, match=r"does not follow(.|\n)*offset 8 or up to 3 less"):
            stages[0].execute(step_of(offset, [9]))
    run_chain(stages, step_of(6, [9]))
    with pytest.raises(ProtocolError, match="does not follow"):
        stages[0].execute(step_of(6, [9]))
    # As if the guesses had never been: the same token as a cache that never held them gives.
    other = worker()
    expected = run_chain(other, step_of(0, [1, 2, 3, 4, 5, 6, 9, 10], begin=True))
    assert run_chain(stages, step_of(7, [10])).sampled == expected.sampled


@pytest.mark.parametrize("fields", [{"drafts": 2}, {"drafts": 1, "sample": False}, {"drafts": 1, "mask": b"\xff"}])
def test_guesses_that_cannot_be_checked_are_refused(
    worker: Callable[[], list[StageWorker]], fields: dict[str, Any]
) -> None:
    with pytest.raises(ProtocolError, match="cannot be checked"):
        worker()[0].execute(step_of(0, [1, 2], begin=True, **fields))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=5))
def test_whatever_is_guessed_between_the_real_tokens_are_the_same(
    worker: Callable[[], list[StageWorker]], guesses: list[list[int]]
) -> None:
    plain, guessing = worker(), worker()
    prompt = [1, 2, 0, 1]
    first = run_chain(plain, step_of(0, prompt, begin=True)).sampled[0].token_id
    expected = [first]
    for offset in range(4, 4 + 4 * len(guesses)):
        expected.append(run_chain(plain, step_of(offset, expected[-1:])).sampled[0].token_id)
    found = [run_chain(guessing, step_of(0, prompt, begin=True)).sampled[0].token_id]
    for guess in guesses:
        # 0 stands for the right token, so that runs of every length come up.
        known = len(found)
        tokens = [expected[known + i] if kind == 0 else 400 + kind for i, kind in enumerate(guess)]
        step = step_of(3 + known, [found[-1], *tokens], len(tokens))
        found += [sampled.token_id for sampled in run_chain(guessing, step).sampled]
    assert found == expected[: len(found)]


def test_at_a_long_context_guesses_pay_for_their_attention() -> None:
    k2 = replace(K2, attention_bytes=61 * 139_264 * BYTES_PER_FLOP)
    for cached in (0, 4_096, 131_072):
        ones, twos = (k2.cost(tokens, sequences=1, cached_tokens=cached) for tokens in (1, 2))
        experts = k2.read(2, cached_tokens=cached) - k2.read(1, cached_tokens=cached)
        assert twos - ones == pytest.approx(experts + cached * k2.attention_bytes)
    chances = [[0.8, 0.65, 0.5]]

    def drafts(cached: int) -> int:
        return sum(choose_drafts(chances, lambda tokens: k2.cost(tokens, sequences=1, cached_tokens=cached)))

    assert drafts(0) > drafts(131_072)


def test_where_experts_come_from_disk_a_guess_must_pay_for_reading_them() -> None:
    step_bytes = StepBytes(
        shared_bytes=10**9, expert_bytes=384 * 10**7, experts=384, experts_per_token=8, kv_token_bytes=0
    )
    chances = [[0.6, 0.5, 0.4]]

    def chosen(disk_cost: float) -> int:
        return choose_drafts(
            chances, lambda tokens: step_bytes.cost(tokens, sequences=1, cached_tokens=0, disk_cost=disk_cost)
        )[0]

    assert chosen(0.0) == 3
    assert chosen(60.0) == 0  # half of them missing, from a disk of 7 GB/s


def test_what_reading_experts_costs_is_what_stages_told() -> None:
    experts = ExpertHealth(
        slots=1,
        slot_bytes=1,
        hits=60,
        misses=40,
        evictions=0,
        read_bytes=7 * 10**9,
        read_s=1.0,
        stall_s=1.0,
        failed_reads=0,
    )
    held = StageHealth(stage=0, address="", state="ready", start_layer=0, end_layer=3)
    streams = StageHealth(stage=1, address="", state="ready", start_layer=3, end_layer=4, experts=experts)
    assert disk_cost_of([]) == disk_cost_of([held]) == 0
    assert disk_cost_of([streams]) == pytest.approx(0.4 * 819 / 7)
    assert disk_cost_of([held, streams]) == pytest.approx(0.1 * 819 / 7)
