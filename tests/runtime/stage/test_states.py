"""The engine over a tiny Kimi Linear in one thread: however it is cut, batched, guessed ahead or interrupted, the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import exo_kimi
from exo_kimi.arch.geometry import kv_bytes_per_token, served_state_bytes
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import StageError
from exo_kimi.models.kda.recurrent_cache import RecurrentCache
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.sequence import Sequence as Running
from exo_kimi.runtime.engine.speculation import Drafter, step_bytes_of
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams
from exo_kimi.runtime.stage.caches import copy_prefix, trim
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel

pytestmark = pytest.mark.timeout(180)

SMALL = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_experts": 8}
# Of layers 0 to 6, those of 0, 1, 2, 4, 5 have states: stages of states alone, of latents alone, and of both.
BOUNDS = {1: [0, 7], 2: [0, 3, 7], 3: [0, 3, 4, 7], 5: [0, 1, 3, 4, 6, 7]}
GREEDY = SamplingParams(temperature=0.0)
# Three conversations: what repeats is guessed, and turns go on where others ended.
PROMPTS = [
    tuple([5, 6, 7, 8] * 9),
    tuple(range(40, 111)),
    tuple(np.random.default_rng(7).integers(0, 500, 130).tolist()),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("states") / "tiny", family="linear", layout="bf16", seed=3, config=SMALL)


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return exo_kimi.load(directory, dtype="float32", fuse=True)


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    """24 tokens after each prompt, from one sequence alone."""
    return [continue_alone(model, prompt, 24) for prompt in PROMPTS]


def continue_alone(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    caches, found, chunk = model.make_cache(), [], mx.array(prompt)
    for _ in range(count):
        chunk = mx.argmax(model.logits(model.forward_ragged(chunk, [(len(chunk), caches)])[-1:]), axis=-1)
        found.append(int(chunk.item()))
    return found


@pytest.fixture
def pipeline_of(directory: Path) -> Callable[..., InlinePipeline]:
    def make(stages: int = 1, *, kv_capacity_tokens: int = 40 * CACHE_STEP, ahead: bool = True) -> InlinePipeline:
        def load() -> Sequence[StageModel]:
            return [exo_kimi.load(directory, a, b, dtype="float32", fuse=True) for a, b in pairwise(BOUNDS[stages])]

        return InlinePipeline(
            load,
            stages=stages,
            context=4096,
            kv_capacity_tokens=kv_capacity_tokens,
            cache_step=CACHE_STEP,
            ahead=ahead,
        )

    return make


def request_of(name: str, prompt: Sequence[int], count: int) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=tuple(prompt), max_tokens=count, sampling=GREEDY)


async def tokens_of(engine: Engine, request: GenerationRequest) -> list[int]:
    return [
        event.token_id for event in [event async for event in engine.generate(request)] if event.token_id is not None
    ]


async def answers(engine: Engine, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    requests = [request_of(f"{index}", prompt, count) for index, prompt in enumerate(prompts)]
    return list(await asyncio.gather(*(tokens_of(engine, request) for request in requests)))


@pytest.mark.parametrize("stages", sorted(BOUNDS))
def test_stages_of_states_latents_or_both_give_the_tokens_of_one(
    pipeline_of: Callable[..., InlinePipeline], expected: list[list[int]], stages: int
) -> None:
    async def run() -> list[list[int]]:
        async with Engine(pipeline_of(stages), prefill_chunk=32) as engine:
            return await answers(engine, PROMPTS, 24)

    assert asyncio.run(run()) == expected


@pytest.mark.parametrize("chunk", [1, 3, 64, 512])
def test_chunks_of_any_size_beside_others_give_the_same_tokens(
    pipeline_of: Callable[..., InlinePipeline], expected: list[list[int]], chunk: int
) -> None:
    async def run() -> list[list[int]]:
        async with Engine(pipeline_of(), prefill_chunk=chunk) as engine:
            return await answers(engine, PROMPTS, 24)

    assert asyncio.run(run()) == expected


class HalfRight(Drafter):
    """Guesses the right tokens, and of each run the third wrong."""

    answers: ClassVar[dict[int, list[int]]] = {}

    def _guess(self, sequence: Running) -> tuple[list[int], list[float]]:
        told = self.answers[len(sequence.prompt_ids)]
        guess = told[len(sequence.tokens) - len(sequence.prompt_ids) :][:4]
        guess = [token + (number == 2) for number, token in enumerate(guess)]
        return guess, [1.0] * len(guess)


@pytest.mark.parametrize("ahead", [True, False])
def test_guesses_and_steps_that_run_ahead_are_taken_back(
    pipeline_of: Callable[..., InlinePipeline], directory: Path, expected: list[list[int]], ahead: bool
) -> None:
    drafter = HalfRight(step_bytes=step_bytes_of(bytes_of_manifest(Checkpoint(directory).manifest())), always=True)
    drafter.answers.update({len(prompt): answer for prompt, answer in zip(PROMPTS, expected, strict=True)})

    async def run() -> tuple[list[list[int]], int]:
        async with Engine(pipeline_of(ahead=ahead), drafter=drafter) as engine:
            found = await answers(engine, PROMPTS, 24)
            return found, drafter.counts.drafted - drafter.counts.accepted

    found, wrong = asyncio.run(run())
    assert found == expected
    assert wrong > 10, "too few guesses were wrong: little was taken back"


def test_preempted_sequences_go_on_with_the_same_tokens(
    pipeline_of: Callable[..., InlinePipeline], expected: list[list[int]]
) -> None:
    async def run() -> tuple[list[list[int]], int]:
        async with Engine(pipeline_of(kv_capacity_tokens=2 * CACHE_STEP)) as engine:
            found = await answers(engine, PROMPTS, 24)
            return found, engine.snapshot().preemptions_total

    found, _ = asyncio.run(run())
    assert found == expected


def test_a_next_turn_goes_on_from_whole_states_and_another_beginning_does_not(
    pipeline_of: Callable[..., InlinePipeline], model: Model, expected: list[list[int]]
) -> None:
    """Turns of one conversation take its states over; who shares a beginning alone computes it again."""

    async def run() -> tuple[list[list[int]], list[int | None]]:
        found, cached = [], []
        async with Engine(pipeline_of(2), prefixes=PrefixOptions()) as engine:
            history = list(PROMPTS[2])
            turns = [history, [*history, *expected[2], 9, 10, 11], [*history, *expected[2][:5], 300, 301, 302]]
            for number, prompt in enumerate(turns):
                events = [event async for event in engine.generate(request_of(f"{number}", prompt, 24))]
                found.append([event.token_id for event in events if event.token_id is not None])
                cached.append(next((event.cached_tokens for event in events if event.cached_tokens is not None), None))
        return found, cached

    found, cached = asyncio.run(run())
    second = continue_alone(model, [*PROMPTS[2], *expected[2], 9, 10, 11], 24)
    third = continue_alone(model, [*PROMPTS[2], *expected[2][:5], 300, 301, 302], 24)
    assert found == [expected[2], second, third]
    assert cached[0] in (None, 0) and cached[1] == len(PROMPTS[2]) + 23 and cached[2] in (None, 0)


def test_a_cancelled_neighbour_changes_nothing(
    pipeline_of: Callable[..., InlinePipeline], expected: list[list[int]]
) -> None:
    async def run() -> list[int]:
        async with Engine(pipeline_of(3), prefill_chunk=16) as engine:

            async def leave() -> None:
                async for _ in engine.generate(request_of("leaves", PROMPTS[0], 200)):
                    return

            found, _ = await asyncio.gather(tokens_of(engine, request_of("stays", PROMPTS[2], 24)), leave())
            return found

    assert asyncio.run(run()) == expected[2]


def test_what_a_stage_keeps_is_what_is_planned(directory: Path, model: Model) -> None:
    config = Checkpoint(directory).config
    caches = model.make_cache()
    for length in (300, 1):
        mx.eval(model.forward_ragged(mx.array(list(range(length))), [(length, caches)]))
    planned = kv_bytes_per_token(config, 0, 7, bytes_per_element=4) * 2 * CACHE_STEP
    planned += served_state_bytes(config, 0, 7, bytes_per_element=4)
    assert model.cache_nbytes(caches) == planned


def test_the_newest_pass_is_taken_back_from_any_token_and_no_more(model: Model) -> None:
    tokens = mx.array(PROMPTS[2])
    whole, cut = model.make_cache(), model.make_cache()
    for caches in (whole, cut):
        model.forward_ragged(tokens[:50], [(50, caches)])
    model.forward_ragged(tokens[50:58], [(8, whole)])
    for kept in (8, 5, 1, 0):
        trim(whole, 50 + kept)
        again = model.make_cache()
        copy_prefix(cut, again, length=50, capacity=64)
        if kept:
            model.forward_ragged(tokens[50 : 50 + kept], [(kept, again)])
        for one, other in zip(whole, again, strict=True):
            assert one.offset == other.offset
            if isinstance(one, RecurrentCache):
                np.testing.assert_allclose(
                    np.array(one.recurrent_state), np.array(other.recurrent_state), atol=1e-5, rtol=1e-4
                )
    with pytest.raises(StageError, match="RecurrentCache cannot give back 1 tokens"):
        trim(whole, 49)
    with pytest.raises(StageError, match="RecurrentCache cannot give back"):
        copy_prefix(whole, model.make_cache(), length=20, capacity=64)


def test_states_are_counted_beside_tokens() -> None:
    from exo_kimi.runtime.cluster.capacity import StageMemory, kv_capacity

    mixed = StageMemory(
        stage=0,
        host="a",
        free_bytes=10**9,
        free_scope="process",
        active_bytes=0,
        weights_bytes=0,
        kv_bytes_per_token=1000,
        state_bytes=100_000,
    )
    states = replace(mixed, stage=1, host="b", kv_bytes_per_token=0, state_bytes=1_000_000)
    found = kv_capacity([mixed, states], kv_bytes=50_000_000)
    assert found.tokens == 50_000
    # 50 sequences fill the states' machine: each is a fiftieth of all tokens.
    assert found.state_tokens == 1000
    assert kv_capacity([mixed], kv_bytes=50_000_000).state_tokens == 100


@given(
    sizes=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=4),
    budget=st.integers(20_000, 200_000),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_what_the_ledger_lets_in_fits_every_machine(
    sizes: list[tuple[int, int]], budget: int, shares: tuple[float, float]
) -> None:
    from exo_kimi.runtime.cluster.capacity import StageMemory, kv_capacity

    stages = [
        StageMemory(
            stage=index,
            host=f"{index}",
            free_bytes=10**9,
            free_scope="process",
            active_bytes=0,
            weights_bytes=0,
            kv_bytes_per_token=token_bytes,
            state_bytes=2 * state_bytes,
            snapshot_bytes=state_bytes,
        )
        for index, (token_bytes, state_bytes) in enumerate(sizes)
    ]
    found = kv_capacity(stages, kv_bytes=budget)
    left = found.tokens
    sequences = int(shares[0] * left // found.state_tokens) if found.state_tokens else 3
    left -= sequences * found.state_tokens
    snapshots = int(shares[1] * left // found.snapshot_tokens) if found.snapshot_tokens else 3
    tokens = left - snapshots * found.snapshot_tokens
    for token_bytes, state_bytes in sizes:
        if token_bytes or state_bytes:
            assert tokens * token_bytes + (2 * sequences + snapshots) * state_bytes <= budget
