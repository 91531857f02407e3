"""The engine over fake stages: its promises to readers, under failure, cancellation, load and foreign grammars."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exo_kimi.errors import (
    ContextLengthError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
    StageDiedError,
    StageError,
)
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.pipeline import PipelineInfo
from exo_kimi.runtime.requests import GenerationRequest, TokenEvent

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    yield
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def request_of(prompt: list[int], new: int | None = 5, **fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id=str(prompt), prompt_ids=tuple(prompt), max_tokens=new, **fields)


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def ids_of(engine: Engine, request: GenerationRequest) -> list[int]:
    return [event.token_id for event in await collect(engine, request)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_tokens_come_in_order_and_the_last_tells_why_it_is_the_last(fakes: SimpleNamespace) -> None:
    async with Engine(fakes.Pipeline()) as engine:
        events = await collect(engine, request_of([1, 2, 3], 6))
    assert [e.token_id for e in events] == fakes.generation([1, 2, 3], 6)
    assert [e.finish_reason for e in events] == [None] * 5 + ["length"]


async def test_a_stop_id_ends_the_request_and_is_its_last_event(fakes: SimpleNamespace) -> None:
    tokens = fakes.generation([1, 2, 3], 6)
    async with Engine(fakes.Pipeline()) as engine:
        events = await collect(engine, request_of([1, 2, 3], 6, stop_ids=frozenset([tokens[3]])))
    assert [e.token_id for e in events] == tokens[:4]
    assert events[-1].finish_reason == "stop"


async def test_without_max_tokens_a_request_ends_where_the_context_ends(fakes: SimpleNamespace) -> None:
    async with Engine(fakes.Pipeline(), context=20) as engine:
        events = await collect(engine, request_of([1] * 8, None))
    assert len(events) == 12
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("prefill_chunk", [1, 7, 512])
@pytest.mark.parametrize("stages", [1, 2, 7])
async def test_sixty_four_requests_at_once_each_get_their_own_tokens(
    fakes: SimpleNamespace, stages: int, prefill_chunk: int
) -> None:
    pipeline = fakes.Pipeline(stages=stages)
    prompts = [[i, *range(i % 13)] for i in range(64)]
    async with Engine(pipeline, prefill_chunk=prefill_chunk) as engine:
        found = await asyncio.gather(*(ids_of(engine, request_of(p, 3 + len(p))) for p in prompts))
        await settle()
        snapshot = engine.snapshot()
    assert found == [fakes.generation(p, 3 + len(p)) for p in prompts]
    assert pipeline.fake.held == {}
    assert pipeline.most_in_flight == stages
    assert (snapshot.kv_reserved_tokens, snapshot.requests) == (0, ())
    assert snapshot.requests_total == 64
    assert snapshot.generated_tokens_total == sum(map(len, found))
    assert snapshot.prompt_tokens_total == sum(map(len, prompts))
    assert snapshot.steps_total == pipeline.sent


async def test_preemption_under_tiny_memory_changes_no_token(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(stages=3, kv_capacity_tokens=16 * 7, cache_step=16)
    prompts = [[i, 5, 6] for i in range(9)]
    async with Engine(pipeline) as engine:
        found = await asyncio.gather(*(ids_of(engine, request_of(p, 70)) for p in prompts))
        assert engine.snapshot().preemptions_total > 0
        assert engine.snapshot().prompt_tokens_total == 27
    assert found == [fakes.generation(p, 70) for p in prompts]


async def test_closing_the_generator_frees_the_sequence_on_the_stages(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline()
    async with Engine(pipeline) as engine:
        stream = engine.generate(request_of([1, 2], 1000))
        assert (await anext(stream)).token_id == fakes.next_token([1, 2])
        assert pipeline.fake.held != {}
        await stream.aclose()
        await settle()
        assert pipeline.fake.held == {}
        assert engine.snapshot().requests_cancelled_total == 1
        assert engine.snapshot().kv_reserved_tokens == 0


async def test_a_reader_that_is_cancelled_mid_prefill_with_steps_in_flight_leaves_nothing(
    fakes: SimpleNamespace,
) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, prefill_chunk=8) as engine:
        task = asyncio.create_task(collect(engine, request_of([3] * 100)))
        await settle()
        assert pipeline.sent == 2
        assert [r.state for r in engine.snapshot().requests] == ["prefill"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pipeline.gated = False
        pipeline.release(2)
        await settle()
        assert pipeline.fake.held == {}
        # The engine goes on.
        assert await ids_of(engine, request_of([4])) == fakes.generation([4], 5)


async def test_a_finished_request_is_not_counted_as_cancelled_when_its_reader_leaves_at_once(
    fakes: SimpleNamespace,
) -> None:
    async with Engine(fakes.Pipeline()) as engine:
        stream = engine.generate(request_of([1], 1))
        await anext(stream)
        await stream.aclose()
        assert engine.snapshot().requests_cancelled_total == 0


async def test_a_failure_ends_what_touched_the_stages_and_serves_what_waited(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline, max_running=1) as engine:
        touched = asyncio.create_task(collect(engine, request_of([1])))
        await settle()
        waiting = asyncio.create_task(ids_of(engine, request_of([2])))
        await settle()
        pipeline.fail(StageDiedError("stage 1 died", stage=1))
        with pytest.raises(StageDiedError, match="stage 1 died") as caught:
            await touched
        assert caught.value.stage == 1
        assert not engine.snapshot().ready
        assert not waiting.done()
        late = asyncio.create_task(ids_of(engine, request_of([3])))
        await settle()
        pipeline.gated = False
        pipeline.recover()
        assert await waiting == fakes.generation([2], 5)
        assert await late == fakes.generation([3], 5)
        snapshot = engine.snapshot()
        assert (snapshot.ready, snapshot.restarts_total, snapshot.requests_failed_total) == (True, 1, 1)
        assert any("stage 1 died" in event for event in snapshot.events)


async def test_after_tokens_were_emitted_a_failure_is_an_error_and_not_a_retry(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline()
    async with Engine(pipeline) as engine:
        stream = engine.generate(request_of([1], 10_000 - 1))
        seen = [await anext(stream) for _ in range(3)]
        pipeline.fail(StageDiedError("gone"))
        pipeline.recover()
        with pytest.raises(StageDiedError):
            while True:
                seen.append(await anext(stream))
        assert [e.token_id for e in seen] == fakes.generation([1], len(seen))


async def test_two_readers_of_one_failure_get_their_own_exceptions(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline) as engine:
        tasks = [asyncio.create_task(collect(engine, request_of([i]))) for i in range(2)]
        await settle()
        pipeline.fail(StageDiedError("gone"))
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(e) for e in errors] == [StageDiedError, StageDiedError]
        assert errors[0] is not errors[1]


async def test_a_refused_step_ends_what_is_in_flight_even_if_no_failure_is_told(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True, stages=3)
    async with Engine(pipeline) as engine:
        sent = asyncio.create_task(collect(engine, request_of([1])))
        await settle()
        pipeline.up = False
        refused = asyncio.create_task(collect(engine, request_of([2])))
        await settle()
        waiting = asyncio.create_task(ids_of(engine, request_of([4])))
        for task in (sent, refused):
            with pytest.raises(StageError, match="not ready"):
                await task
        assert pipeline.refused == 1
        pipeline.release()  # a result that comes too late
        await settle()
        pipeline.gated = False
        pipeline.recover()
        assert await waiting == fakes.generation([4], 5)


async def test_what_failed_is_told_rather_than_that_a_step_was_refused(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline()
    async with Engine(pipeline) as engine:
        await engine.wait_ready()
        pipeline.up = False
        task = asyncio.create_task(collect(engine, request_of([1])))
        await settle()
        pipeline.fail(StageDiedError("stage 1 died"))
        with pytest.raises(StageDiedError, match="stage 1 died"):
            await task


async def test_stages_that_will_not_come_back_end_every_request_and_refuse_new_ones(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(ready=False)
    async with Engine(pipeline) as engine:
        waiting = asyncio.create_task(collect(engine, request_of([1])))
        await settle()
        pipeline.fail(StageDiedError("it dies at each start"), recovering=False)
        with pytest.raises(StageDiedError):
            await waiting
        with pytest.raises(StageDiedError):
            engine.check(request_of([1]))
        with pytest.raises(StageDiedError):
            await engine.wait_ready()


async def test_a_request_from_before_the_stages_were_ready_is_served(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(ready=False)
    async with Engine(pipeline) as engine:
        early = asyncio.create_task(ids_of(engine, request_of([1])))
        impossible = asyncio.create_task(ids_of(engine, request_of([1] * 20_000, 1)))
        await settle()
        assert [r.state for r in engine.snapshot().requests] == ["waiting", "waiting"]
        pipeline.recover()
        assert await early == fakes.generation([1], 5)
        with pytest.raises(ContextLengthError):
            await impossible


async def test_memory_that_shrank_refuses_what_no_longer_fits(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True, kv_capacity_tokens=160, cache_step=16)
    async with Engine(pipeline, max_running=1) as engine:
        first = asyncio.create_task(collect(engine, request_of([1])))
        await settle()
        second = asyncio.create_task(collect(engine, request_of([1] * 100, 20)))
        await settle()
        pipeline.fail(StageDiedError("gone"))
        pipeline.recover(PipelineInfo(context=10_000, kv_capacity_tokens=64, cache_step=16, vocab_size=1000))
        with pytest.raises(ContextLengthError, match="KV memory holds 64"):
            await second
        await asyncio.gather(first, return_exceptions=True)


async def test_close_ends_every_request_with_engine_stopped(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True)
    engine = Engine(pipeline, max_running=1)
    await engine.start()
    tasks = [asyncio.create_task(collect(engine, request_of([i]))) for i in range(3)]
    await settle()
    await engine.close()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(e) for e in errors] == [EngineStoppedError] * 3
    assert pipeline.closed
    with pytest.raises(EngineStoppedError):
        engine.check(request_of([1]))
    await engine.close()


async def test_a_pipeline_that_breaks_its_contract_ends_requests_instead_of_hanging(
    fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = fakes.Pipeline(gated=True)
    async with Engine(pipeline) as engine:
        task = asyncio.create_task(collect(engine, request_of([1])))
        await settle()
        pipeline.receive = None
        pipeline._unanswered.append("not a result")
        pipeline.release(2)
        with pytest.raises(StageError, match="the engine stopped"):
            await task
        with pytest.raises(StageError, match="the engine stopped"):
            await asyncio.wait_for(engine.wait_broken(), 5)
        pipeline.recover()  # nobody takes what the other loop would admit again
        await settle()
        with pytest.raises(StageError, match="the engine stopped"):
            engine.check(request_of([1]))
    assert "the engine stopped" in caplog.text


async def test_the_queue_has_a_limit(fakes: SimpleNamespace) -> None:
    async with Engine(fakes.Pipeline(gated=True), max_running=1, queue_limit=2) as engine:
        tasks = []
        for i in range(3):
            tasks.append(asyncio.create_task(collect(engine, request_of([i]))))
            await settle()
        with pytest.raises(OverloadedError, match="queue is full"):
            engine.check(request_of([9]))
        with pytest.raises(OverloadedError):
            await collect(engine, request_of([9]))
        assert len(engine.snapshot().requests) == 3
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_refused_request_never_reaches_the_stages(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline()
    async with Engine(pipeline) as engine:
        await engine.wait_ready()
        with pytest.raises(ContextLengthError):
            await collect(engine, request_of([1] * 20_000, 1))
        with pytest.raises(RequestError):
            await collect(engine, request_of([]))
        assert pipeline.sent == 0
        assert engine.snapshot().requests_total == 0


async def test_progress_tells_how_far_a_prompt_is(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline(gated=True, stages=1)
    async with Engine(pipeline, prefill_chunk=10) as engine:
        stream = engine.generate(request_of([1] * 25, 3))
        task = asyncio.ensure_future(anext(stream))
        seen = []
        for _ in range(3):
            await settle()
            (progress,) = engine.snapshot().requests
            seen.append((progress.state, progress.prompt_done, progress.generated_tokens))
            pipeline.release()
        await task
        (progress,) = engine.snapshot().requests
        seen.append((progress.state, progress.prompt_done, progress.generated_tokens))
        await stream.aclose()
    assert seen == [("prefill", 0, 0), ("prefill", 10, 0), ("prefill", 20, 0), ("decode", 25, 1)]


class Grammar:
    """Records what it is told; allows `ids`, or raises after `fail_after` tokens."""

    def __init__(self, ids: list[int] | None, fail_after: int = 10**9) -> None:
        self.ids, self.fail_after, self.accepted = ids, fail_after, []

    def mask(self) -> bytes | None:
        if len(self.accepted) >= self.fail_after:
            raise RuntimeError("the grammar is broken")
        if self.ids is None:
            return None
        words = np.zeros(32, "<u4")
        for i in self.ids:
            words[i // 32] |= np.uint32(1 << i % 32)
        return words.tobytes()

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


async def test_a_grammar_sees_every_token_and_its_mask_goes_with_every_sampling_segment(
    fakes: SimpleNamespace,
) -> None:
    pipeline = fakes.Pipeline()
    grammar = Grammar([1, 40])
    async with Engine(pipeline, prefill_chunk=4) as engine:
        ids = await ids_of(engine, request_of([1] * 10, 6, constraint=grammar))
    # The last token ends the request: nothing follows it.
    assert grammar.accepted == ids[:-1]
    segments = [s for step in pipeline.fake.steps for s in step.segments]
    assert all((s.mask == grammar.mask()) == s.sample for s in segments)
    assert sum(s.sample for s in segments) == 6


@pytest.mark.parametrize("fail_after", [0, 2])
async def test_a_grammar_that_raises_fails_its_request_and_no_other(fakes: SimpleNamespace, fail_after: int) -> None:
    pipeline = fakes.Pipeline()
    async with Engine(pipeline) as engine:
        bad = collect(engine, request_of([1], constraint=Grammar([5], fail_after)))
        good = ids_of(engine, request_of([2], constraint=Grammar(None)))
        failed, ids = await asyncio.gather(bad, good, return_exceptions=True)
        assert isinstance(failed, StageError)
        assert "the grammar is broken" in str(failed)
        assert ids == fakes.generation([2], 5)
        await settle()
        assert pipeline.fake.held == {}
        assert engine.snapshot().requests_failed_total == 1


async def test_a_grammar_that_allows_nothing_fails_its_request_before_a_stage_sees_it(fakes: SimpleNamespace) -> None:
    async with Engine(fakes.Pipeline()) as engine:
        await engine.wait_ready()
        # Bit 1001 is beyond the vocabulary.
        with pytest.raises(StageError, match="allows no token"):
            await collect(engine, request_of([1], constraint=Grammar([1001])))


async def test_every_sequence_reaches_the_stages_with_a_seed(fakes: SimpleNamespace) -> None:
    pipeline = fakes.Pipeline()
    async with Engine(pipeline) as engine:
        await asyncio.gather(*(collect(engine, request_of([i])) for i in range(3)))
    seeds = [start.sampling.seed for step in pipeline.fake.steps for start in step.begin]
    assert None not in seeds
    assert len(set(seeds)) == 3
