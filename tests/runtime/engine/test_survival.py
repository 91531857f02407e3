"""Requests that outlive their stages: the same tokens in the same stream, for a while and a few tries, and then today's error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import (
    EngineStoppedError,
    RuntimeFault,
    StageDiedError,
    StageError,
    StageOutOfMemoryError,
    StageUnreachableError,
)
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter, StepBytes
from exo_kimi.runtime.engine.survival import MOST_SUSPICIONS
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.stage import inline
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Step, StepResult

pytestmark = pytest.mark.timeout(60)
LONG_S = 60.0


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    yield
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def request_of(prompt: Sequence[int], new: int = 5, **fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id=str(prompt), prompt_ids=tuple(prompt), max_tokens=new, **fields)


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def ids_of(engine: Engine, request: GenerationRequest) -> list[int]:
    return [event.token_id for event in await collect(engine, request)]


async def settle() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


class Recorder:
    """A grammar that allows everything and remembers what it was told."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self) -> bytes | None:
        return None

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


@pytest.mark.parametrize("stages", [1, 3])
async def test_whenever_the_stages_fail_every_stream_goes_on_with_its_tokens(
    fakes: SimpleNamespace, stages: int
) -> None:
    pipeline = fakes.Pipeline(stages=stages, kv_capacity_tokens=16 * 20)
    grammars = [Recorder() for _ in range(8)]
    prompts = [[i, *range(i * 5)] for i in range(8)]
    generator = random.Random(stages)
    async with Engine(pipeline, prefill_chunk=8, prefixes=PrefixOptions(), survive_s=LONG_S) as engine:
        tasks = [
            asyncio.create_task(collect(engine, request_of(prompt, 40, constraint=grammar)))
            for prompt, grammar in zip(prompts, grammars, strict=True)
        ]
        faults = 0
        while not all(task.done() for task in tasks):
            for _ in range(generator.randint(20, 80)):
                await asyncio.sleep(0)
            pipeline.fail(StageDiedError("stage 1 died"))
            pipeline.recover()
            faults += 1
        found = [await task for task in tasks]
        snapshot = engine.snapshot()
    assert faults > 3
    for prompt, events, grammar in zip(prompts, found, grammars, strict=True):
        ids = [event.token_id for event in events]
        assert ids == fakes.generation(prompt, 40)
        assert grammar.accepted == ids[:-1], "a grammar sees every token once"
        assert [event.finish_reason for event in events] == [None] * 39 + ["length"]
    assert snapshot.requests_failed_total == 0
    assert snapshot.requests_interrupted_total >= snapshot.requests_resumed_total > 0
    assert snapshot.prompt_tokens_total == sum(map(len, prompts)), "each prompt token is counted once"
    assert snapshot.generated_tokens_total == 8 * 40


async def test_without_it_a_fault_is_the_error_it_was(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline) as engine:
        task = asyncio.create_task(ids_of(engine, request_of([1])))
        await settle()
        pipeline.fail(StageDiedError("stage 1 died"))
        pipeline.recover()
        with pytest.raises(StageDiedError, match="stage 1 died"):
            await task
        assert engine.snapshot().requests_interrupted_total == 0


async def test_when_its_time_is_up_a_request_gets_the_last_fault_and_others_their_own_time(
    fakes: SimpleNamespace,
) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, survive_s=0.3) as engine:
        early = asyncio.create_task(ids_of(engine, request_of([1], 9)))
        await settle()
        pipeline.fail(StageDiedError("killed"))
        await asyncio.sleep(0.2)
        pipeline.recover()
        await settle()  # fed again, but without a token: its time goes on when they are away again
        late = asyncio.create_task(ids_of(engine, request_of([2], 9)))
        await settle()
        pipeline.fail(StageDiedError("killed again"))
        pipeline.fail(StageUnreachableError("no memory for stage 1"))
        with pytest.raises(StageUnreachableError, match="no memory for stage 1"):
            await asyncio.wait_for(early, 0.2)
        assert not late.done()
        pipeline.gated = False
        pipeline.recover()
        assert await late == fakes.generation([2], 9)
        assert engine.snapshot().requests_failed_total == 1


async def test_with_a_token_the_time_begins_anew(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, survive_s=0.3) as engine:
        stream = engine.generate(request_of([1], 4))
        found = []
        for _ in range(3):
            waiting = asyncio.ensure_future(anext(stream))
            await settle()
            pipeline.fail(StageDiedError("killed"))
            await asyncio.sleep(0.2)
            pipeline.recover()
            await settle()
            pipeline.release()
            found.append((await waiting).token_id)
        await stream.aclose()
        assert found == fakes.generation([1], 3)
        assert engine.snapshot().requests_resumed_total == 3


async def test_while_stages_are_tried_slowly_new_requests_are_refused_and_what_was_interrupted_waits(
    fakes: SimpleNamespace,
) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, max_running=1, survive_s=LONG_S) as engine:
        interrupted = asyncio.create_task(ids_of(engine, request_of([1])))
        await settle()
        waiting = asyncio.create_task(ids_of(engine, request_of([2])))
        await settle()
        pipeline.fail(StageDiedError("gone"), recovering=False)
        with pytest.raises(StageDiedError):
            await waiting
        with pytest.raises(StageDiedError):
            await ids_of(engine, request_of([3]))
        assert not interrupted.done()
        pipeline.gated = False
        pipeline.recover()
        assert await interrupted == fakes.generation([1], 5)


async def test_closing_ends_what_waits_and_a_client_that_leaves_meanwhile_leaves_nothing(
    fakes: SimpleNamespace,
) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, survive_s=LONG_S) as engine:
        tasks = [asyncio.create_task(ids_of(engine, request_of([i]))) for i in range(2)]
        await settle()
        pipeline.fail(StageDiedError("gone"))
        await settle()
        assert [each.state for each in engine.snapshot().requests] == ["waiting", "waiting"]
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert len(engine.snapshot().requests) == 1
    with pytest.raises(EngineStoppedError):
        await tasks[1]


async def test_memory_that_shrank_below_what_a_request_filled_ends_it(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True, cache_step=16)
    async with Engine(pipeline, survive_s=LONG_S) as engine:
        stream = engine.generate(request_of([1] * 10, 100))
        first = asyncio.ensure_future(anext(stream))
        short = asyncio.create_task(ids_of(engine, request_of([2], 8)))
        for _ in range(30):
            await settle()
            pipeline.release(2)
        await first
        pipeline.fail(StageDiedError("gone"))
        pipeline.gated = False
        pipeline.recover(replace(pipeline.info(), kv_capacity_tokens=16))
        with pytest.raises(StageDiedError):
            while True:
                await anext(stream)
        assert await short == fakes.generation([2], 8)
        assert engine.snapshot().requests_failed_total == 1


class Poisoned:
    """Makes a fake pipeline fail, and come back, whenever a step feeds the token."""

    def __init__(self, pipeline: Any, token: int, fault: Callable[[], RuntimeFault]) -> None:
        self.pipeline, self.token, self.fault, self.send = pipeline, token, fault, pipeline.send
        self.faults = 0
        pipeline.send = self

    async def __call__(self, step: Step) -> None:
        await self.send(step)
        if self.token in step.tokens.tolist():
            self.faults += 1
            self.pipeline.fail(self.fault())
            self.pipeline.recover()


@pytest.mark.parametrize("prefill_chunk", [4, 64])
async def test_a_request_that_kills_stages_is_given_up_and_its_neighbours_are_served(
    fakes: SimpleNamespace, prefill_chunk: int
) -> None:
    pipeline = fakes.Pipeline(stages=2)
    good = [[i, 5, 6, 7, 8, 9][: 2 + i % 5] for i in range(8)]
    harmless = {token for prompt in good for token in fakes.generation(prompt, 30)}
    deadly = next(token for token in range(100, 1000) if token not in harmless)
    poison = Poisoned(pipeline, deadly, lambda: StageOutOfMemoryError("stage 1 ran out of memory"))
    async with Engine(pipeline, prefill_chunk=prefill_chunk, survive_s=LONG_S) as engine:
        asked = [request_of(prompt, 30) for prompt in good]
        asked.insert(3, request_of([7, 8, 9, deadly, 10], 30))
        found = await asyncio.gather(*(ids_of(engine, each) for each in asked), return_exceptions=True)
    bad = found.pop(3)
    assert isinstance(bad, StageOutOfMemoryError)
    assert poison.faults == MOST_SUSPICIONS
    assert found == [fakes.generation(prompt, 30) for prompt in good]


async def test_a_link_that_breaks_again_and_again_is_no_request_s_fault(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, survive_s=LONG_S) as engine:
        task = asyncio.create_task(ids_of(engine, request_of([1])))
        for _ in range(10):
            await settle()
            pipeline.fail(StageUnreachableError("stage 1 lost stage 2"))
            pipeline.recover()
        pipeline.gated = False
        await settle()
        pipeline.release(2)
        assert await task == fakes.generation([1], 5)


# A real tiny Kimi, in fp32, over two stages that fail every few steps.

SMALL = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4}
SAMPLINGS = (
    SamplingParams(temperature=0.0, logprobs=True, top_logprobs=2),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=1.3, seed=8, top_p=0.9, min_p=0.01, top_k=50),
    SamplingParams(temperature=0.9, seed=1, frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, seed=7, logit_bias=tuple((token, 30.0) for token in (5, 6, 7, 8))),
)


class Even:
    """A grammar with a state: an even token, then an odd one, and so on."""

    def __init__(self) -> None:
        self.count = 0

    def mask(self) -> bytes | None:
        return (b"\x55" if self.count % 2 == 0 else b"\xaa") * 128

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self.count % 2
        self.count += 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SMALL | {"num_hidden_layers": 3}
    return make_tiny(tmp_path_factory.mktemp("survival") / "tiny", dtype="F32", seed=3, config=config)


def pipeline_of(checkpoint: Path, kv_bits: int | None) -> InlinePipeline:
    def load() -> Sequence[StageModel]:
        models = [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise([0, 2, 3])]
        for model in models:
            model.set_kv_bits(kv_bits)
        return models

    return InlinePipeline(load, stages=2, context=4096, kv_capacity_tokens=100 * 16, cache_step=16)


@pytest.mark.parametrize(("kv_bits", "drafts"), [(None, 0), (8, 4)])
async def test_real_answers_are_the_same_through_faults(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kv_bits: int | None, drafts: int
) -> None:
    real = inline.run_chain
    steps, faults = [0], [0]

    def failing(workers: Sequence[StageWorker], step: Step) -> StepResult:
        result = real(workers, step)
        steps[0] += 1
        if steps[0] % 11 == 0:  # after the stages have done their work
            faults[0] += 1
            raise StageError("as if the answer had been lost")
        return result

    prompts = [[5, 6, 7, 8] * 6, list(range(30)), [3] * 5, list(range(100, 140)), [5, 6, 7, 8] * 4]
    found = []
    for broken in (False, True):
        monkeypatch.setattr(inline, "run_chain", failing if broken else real)
        step_bytes = StepBytes(shared_bytes=10, expert_bytes=40, experts=8, experts_per_token=2, kv_token_bytes=1)
        drafter = Drafter(step_bytes=step_bytes, limit=drafts, always=True) if drafts else None
        async with Engine(
            pipeline_of(checkpoint, kv_bits), drafter=drafter, prefill_chunk=64, survive_s=LONG_S
        ) as engine:
            requests = [request_of(p, 20, sampling=s) for p, s in zip(prompts, SAMPLINGS, strict=True)]
            requests.append(request_of([9, 9, 9], 20, sampling=SAMPLINGS[1], constraint=Even()))
            found.append(await asyncio.gather(*(collect(engine, each) for each in requests)))
            assert (engine.snapshot().requests_resumed_total > 0) == broken
    assert faults[0] > 2
    for plain, survived in zip(*found, strict=True):
        assert [e.token_id for e in survived] == [e.token_id for e in plain]
        for one, other in zip(plain, survived, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4) if one.logprob else other.logprob is None
            assert [i for i, _ in one.top_logprobs] == [i for i, _ in other.top_logprobs]
