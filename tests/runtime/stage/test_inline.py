"""The engine over a real tiny Kimi in one thread: batching, preemption and splitting change no token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import EngineStoppedError, StageError
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.pipeline import Failed, Ready
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.steps import Segment, Step

SMALL = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8}
BOUNDS = {1: [0, 7], 2: [0, 4, 7], 3: [0, 1, 3, 7], 7: list(range(8))}
GREEDY = SamplingParams(temperature=0.0)


pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("inline") / "tiny", dtype="F32", seed=3, config=SMALL)


@pytest.fixture
def pipeline_of(checkpoint: Path) -> Callable[..., InlinePipeline]:
    def make(
        stages: int = 2, *, kv_capacity_tokens: int = 100 * CACHE_STEP, cache_step: int = CACHE_STEP
    ) -> InlinePipeline:
        def load() -> Sequence[StageModel]:
            return [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise(BOUNDS[stages])]

        return InlinePipeline(
            load, stages=stages, context=4096, kv_capacity_tokens=kv_capacity_tokens, cache_step=cache_step
        )

    return make


def prompt_of(index: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(index).integers(0, 500, length).tolist())


def request_of(index: int, length: int, new: int, sampling: SamplingParams = GREEDY) -> GenerationRequest:
    return GenerationRequest(
        request_id=str(index), prompt_ids=prompt_of(index, length), max_tokens=new, sampling=sampling
    )


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def generate(
    pipeline: InlinePipeline, requests: Sequence[GenerationRequest], *, together: bool = True, **options: Any
) -> list[list[int]]:
    """Token ids of each request; on the way out every stage must be empty."""
    async with Engine(pipeline, **options) as engine:
        if together:
            events = await asyncio.gather(*(collect(engine, r) for r in requests))
        else:
            events = [await collect(engine, r) for r in requests]
        await empty(engine)
    return [[e.token_id for e in one] for one in events]


async def empty(engine: Engine) -> None:
    """Wait until no stage holds a sequence, and a byte of KV memory."""
    while any(stage.sequences or stage.kv_bytes for stage in engine.snapshot().stages):
        await asyncio.sleep(0.01)
    assert engine.snapshot().kv_reserved_tokens == 0


LENGTHS = (1, 40, 7, 90, 23)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Greedy tokens of the whole model with no cache, one request after the other."""
    model = exo_kimi.load(checkpoint, dtype="float32")
    found = []
    for index, length in enumerate(LENGTHS):
        tokens = list(prompt_of(index, length))
        for _ in range(8):
            tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
        found.append(tokens[length:])
    return found


@pytest.mark.parametrize(
    ("stages", "prefill_chunk", "together"),
    [(1, 512, False), (1, 512, True), (2, 16, True), (2, 1, False), (3, 5, True), (7, 512, True), (7, 33, False)],
)
async def test_stages_chunks_and_company_change_no_greedy_token(
    pipeline_of: Callable[..., InlinePipeline],
    expected: list[list[int]],
    stages: int,
    prefill_chunk: int,
    together: bool,
) -> None:
    requests = [request_of(i, length, 8) for i, length in enumerate(LENGTHS)]
    found = await generate(pipeline_of(stages), requests, together=together, prefill_chunk=prefill_chunk)
    assert found == expected


SAMPLINGS = (
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.2, top_p=0.9, seed=2, presence_penalty=0.7, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, top_k=20, min_p=0.01, seed=3, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=4, logit_bias=((5, 3.0), (6, -5.0))),
)


async def test_seeded_sampling_is_the_same_alone_in_company_and_through_preemption(
    pipeline_of: Callable[..., InlinePipeline],
) -> None:
    requests = [request_of(i, 12 + i, 36, sampling) for i, sampling in enumerate(SAMPLINGS)]
    alone = await generate(pipeline_of(1), requests, together=False)
    assert len({token for one in alone for token in one}) > 40
    assert await generate(pipeline_of(2), requests, prefill_chunk=5) == alone
    # Four sequences, each in the end with three steps of 16 tokens, in memory for five.
    tight = pipeline_of(3, kv_capacity_tokens=5 * 16, cache_step=16)
    async with Engine(tight, prefill_chunk=7) as engine:
        events = await asyncio.gather(*(collect(engine, r) for r in requests))
        assert engine.snapshot().preemptions_total > 0
    assert [[e.token_id for e in one] for one in events] == alone


async def test_sixty_four_requests_at_once(pipeline_of: Callable[..., InlinePipeline]) -> None:
    requests = [request_of(i % 8, 5 + i % 8, 6) for i in range(64)]
    found = await generate(pipeline_of(2), requests)
    assert all(len(one) == 6 for one in found)
    assert found[8:] == found[:8] * 7  # the same prompt, the same answer


async def test_a_cancelled_request_leaves_every_stage(pipeline_of: Callable[..., InlinePipeline]) -> None:
    async with Engine(pipeline_of(3), prefill_chunk=32) as engine:
        talking = engine.generate(request_of(0, 10, 3000))
        await anext(talking)
        filling = asyncio.create_task(collect(engine, request_of(1, 3000, 5)))
        while not any(stage.sequences == 2 for stage in engine.snapshot().stages):
            await asyncio.sleep(0.005)
        filling.cancel()
        await talking.aclose()
        await asyncio.gather(filling, return_exceptions=True)
        await empty(engine)
        assert engine.snapshot().requests_cancelled_total == 2


async def test_logprobs_come_back_with_each_token(pipeline_of: Callable[..., InlinePipeline]) -> None:
    sampling = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3)
    async with Engine(pipeline_of(2)) as engine:
        events = await collect(engine, request_of(0, 5, 3, sampling))
    for event in events:
        assert len(event.top_logprobs) == 3
        assert event.top_logprobs[0] == (event.token_id, event.logprob)


async def test_stages_that_cannot_be_loaded_are_a_clear_error_for_every_request(tmp_path: Path) -> None:
    def load() -> Sequence[StageModel]:
        return [exo_kimi.load(tmp_path / "nowhere")]

    pipeline = InlinePipeline(load, stages=1, context=10, kv_capacity_tokens=10, cache_step=1)
    async with Engine(pipeline) as engine:
        with pytest.raises(StageError, match="NotACheckpointError"):
            await collect(engine, request_of(0, 3, 3))


async def test_a_step_that_fails_ends_its_requests_and_the_next_one_is_served(
    pipeline_of: Callable[..., InlinePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine(pipeline_of(2)) as engine:
        first = await collect(engine, request_of(0, 5, 3))
        forward = Model.forward_ragged
        monkeypatch.setattr(Model, "forward_ragged", lambda *_, **__: mx.reshape(mx.zeros((3,)), (2,)))
        with pytest.raises(StageError, match="stage 0 failed"):
            await collect(engine, request_of(0, 5, 3))
        monkeypatch.setattr(Model, "forward_ragged", forward)
        again = await collect(engine, request_of(0, 5, 3))
        await empty(engine)
        assert engine.snapshot().restarts_total == 1
    assert [event.token_id for event in again] == [event.token_id for event in first]


async def test_the_pipeline_refuses_and_drops_steps_of_an_epoch_that_is_over(
    pipeline_of: Callable[..., InlinePipeline],
) -> None:
    pipeline = pipeline_of(1)
    ready = await pipeline.receive()
    assert isinstance(ready, Ready)
    segment = Segment(seq_id=5, offset=0, length=1, sample=True)
    bad = Step(epoch=ready.epoch, step_id=0, segments=(segment,), tokens=np.zeros(1, np.int32))
    await pipeline.send(bad)
    await pipeline.send(bad)
    assert isinstance(await pipeline.receive(), Failed)
    again = await pipeline.receive()
    assert isinstance(again, Ready)
    assert again.epoch > ready.epoch
    with pytest.raises(StageError, match="not ready"):
        await pipeline.send(bad)
    await pipeline.close()
    with pytest.raises(EngineStoppedError):
        await pipeline.receive()
