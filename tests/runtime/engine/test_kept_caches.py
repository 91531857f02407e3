"""Caches over an epoch: what all stages still hold is begun from, what is stale or half written never: the same tokens."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import RuntimeFault, StageDiedError, StageError, StageUnreachableError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.kept_caches import KnownCaches, held_by_all
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.prefix_index import as_tokens
from exo_kimi.runtime.engine.speculation import Drafter, StepBytes
from exo_kimi.runtime.pipeline import Failed, PipelineEvent, PipelineInfo, Ready
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, SamplingParams, StageHealth
from exo_kimi.runtime.stage.caches import has_states
from exo_kimi.runtime.stage.inline import run_chain
from exo_kimi.runtime.stage.worker import StageWorker, as_fault
from exo_kimi.runtime.steps import HeldCaches, Segment, SequenceStart, Step, StepResult

pytestmark = pytest.mark.timeout(120)
STEP = 16
SMALL = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4}
LINEAR = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_experts": 8}
FAULTS = ("cut", "restart", "broken", "cut twice")
Fault = Callable[["Chain"], RuntimeFault]


class Chain:
    """Real workers in one thread, each with a queue, so that a fault finds them at different steps."""

    def __init__(self, models: Sequence[Model], seed: int) -> None:
        self.models = models
        self.random = random.Random(seed)
        self.epoch = 1
        self.workers = [StageWorker(model, epoch=1, stage=stage) for stage, model in enumerate(models)]
        self.queues: list[deque[Step]] = [deque() for _ in models]
        self.events: asyncio.Queue[PipelineEvent] = asyncio.Queue()
        self.ticks = 0
        self.faults: list[str] = []
        self.plan: dict[int, str] = {}
        """At which tick which fault comes."""
        self.ready()

    @property
    def stages(self) -> int:
        return len(self.models)

    def info(self) -> PipelineInfo:
        recurrent = any(has_states(model.make_cache()) for model in self.models)
        return PipelineInfo(
            context=4096, kv_capacity_tokens=400 * STEP, cache_step=STEP, vocab_size=1000, recurrent=recurrent
        )

    def health(self) -> tuple[StageHealth, ...]:
        return ()

    def ready(self, held: tuple[tuple[HeldCaches, ...], ...] = ()) -> None:
        self.events.put_nowait(Ready(epoch=self.epoch, info=self.info(), held=held))

    async def send(self, step: Step) -> None:
        if step.epoch != self.epoch:
            raise StageError("not ready")
        self.queues[0].append(step)
        asyncio.get_running_loop().call_soon(self.tick)

    async def receive(self) -> PipelineEvent:
        return await self.events.get()

    async def close(self) -> None:
        pass

    def tick(self) -> None:
        """One stage does one step, or a fault comes."""
        busy = [stage for stage, queue in enumerate(self.queues) if queue]
        if not busy:
            return
        self.ticks += 1
        stage = self.random.choice(busy)
        fault = self.plan.pop(self.ticks, None)
        if fault is not None:
            self.fail(fault, stage)
            return
        moved = self.workers[stage].execute(self.queues[stage].popleft())
        if isinstance(moved, StepResult):
            self.events.put_nowait(moved)
            self.workers[stage].run_ahead()
        else:
            self.queues[stage + 1].append(moved)
        asyncio.get_running_loop().call_soon(self.tick)

    def fail(self, fault: str, stage: int) -> None:
        error: RuntimeFault = StageUnreachableError("the link is cut")
        if fault == "restart":
            self.workers[stage] = StageWorker(self.models[stage], epoch=0, stage=stage)
            error = StageDiedError("killed")
        elif fault == "broken":
            with pytest.MonkeyPatch.context() as patch:
                forward = self.workers[stage]._forward

                def half(step: Step) -> Any:
                    forward(step)
                    raise RuntimeError("after the caches were written")

                patch.setattr(self.workers[stage], "_forward", half)
                try:
                    self.workers[stage].execute(self.queues[stage].popleft())
                except RuntimeFault as found:
                    error = found
        self.faults.append(fault)
        for queue in self.queues:
            queue.clear()
        for _ in range(2 if fault == "cut twice" else 1):
            self.epoch += 1
            held = tuple(worker.keep(self.epoch) for worker in self.workers)
            self.events.put_nowait(Failed(error=as_fault(error, stage=stage)))
        self.ready(held)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kept")
    return {
        "kimi": make_tiny(folder / "kimi", dtype="F32", seed=3, config=SMALL | {"num_hidden_layers": 3}),
        "linear": make_tiny(folder / "linear", family="linear", layout="bf16", seed=3, config=LINEAR),
    }


def models_of(directories: dict[str, Path], kind: str, stages: int) -> list[Model]:
    bounds = {1: [0, 7], 3: [0, 3, 4, 7]} if kind == "linear" else {1: [0, 3], 3: [0, 1, 2, 3]}
    name = "linear" if kind == "linear" else "kimi"
    models = [exo_kimi.load(directories[name], a, b, dtype="float32") for a, b in pairwise(bounds[stages])]
    for model in models:
        model.set_kv_bits(8 if kind == "8 bits" else None)
    return models


def drafter_of(drafts: int) -> Drafter | None:
    step_bytes = StepBytes(shared_bytes=10, expert_bytes=40, experts=8, experts_per_token=2, kv_token_bytes=1)
    return Drafter(step_bytes=step_bytes, limit=drafts, always=True) if drafts else None


SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.9, seed=1, frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.2),
)


async def converse(engine: Engine, index: int) -> list[int]:
    """Two turns, the second of which begins with the first."""
    tokens, found = [5, 6, 7, 8] * (4 + 3 * index), list[int]()
    for turn in range(2):
        request = GenerationRequest(
            request_id=f"{index}.{turn}",
            prompt_ids=tuple(tokens),
            max_tokens=8,
            sampling=SAMPLINGS[index % len(SAMPLINGS)],
        )
        answer = [event.token_id async for event in engine.generate(request)]
        found += answer
        tokens += [*answer, 100 + index, *range(turn, 20 + turn)]
    return found


async def serve(chain: Chain, drafts: int = 0) -> tuple[list[list[int]], EngineSnapshot]:
    async with Engine(
        chain, drafter=drafter_of(drafts), prefill_chunk=24, prefixes=PrefixOptions(), survive_s=60
    ) as engine:
        found = await asyncio.gather(*(converse(engine, index) for index in range(3)))
        snapshot = engine.snapshot()
        for _ in range(10):
            await asyncio.sleep(0)
        held = {id(state): state for worker in chain.workers for state in worker._sequences.values()}
        reserved = snapshot.kv_prefix_tokens * len(chain.workers)
        assert sum(state.length for state in held.values()) <= reserved, "caches that nobody counts"
    return found, snapshot


@pytest.mark.parametrize(
    ("kind", "stages", "drafts"), [("kimi", 1, 0), ("kimi", 3, 4), ("8 bits", 3, 0), ("linear", 3, 0)]
)
async def test_whatever_fails_whenever_the_tokens_are_those_of_an_undisturbed_answer(
    directories: dict[str, Path], kind: str, stages: int, drafts: int
) -> None:
    models = models_of(directories, kind, stages)
    plain, _ = await serve(Chain(models, seed=0), drafts)
    chain = Chain(models, seed=stages)
    gaps, at = random.Random(kind), 3
    for fault in cycle(FAULTS):
        chain.plan[at] = fault
        at += gaps.randint(3, 9) * stages
        if at > 5000:
            break
    found, snapshot = await serve(chain, drafts)
    assert found == plain
    assert set(chain.faults) == set(FAULTS)
    assert snapshot.requests_failed_total == 0
    assert snapshot.resumed_tokens_total > 0


async def test_a_link_that_is_cut_costs_no_token_that_all_stages_have(directories: dict[str, Path]) -> None:
    """Every token of a prompt is computed once, with and without cuts, but for what was on its way."""
    models = models_of(directories, "kimi", 3)
    fed = []
    for faults in (0, 1):
        chain = Chain(models, seed=4)
        chain.plan = dict.fromkeys((20, 40, 60), "cut") if faults else {}
        count = 0
        execute = chain.workers[0].execute

        def counting(step: Step, execute: Callable[[Step], Step | StepResult] = execute) -> Step | StepResult:
            nonlocal count
            count += len(step.tokens)
            return execute(step)

        chain.workers[0].execute = counting  # type: ignore[method-assign]
        await serve(chain)
        assert len(chain.faults) == 3 * faults
        fed.append(count)
    again = fed[1] - fed[0]
    assert again <= 3 * 3 * 24, "at most what three steps in flight carried, three times"


async def test_a_stage_that_started_anew_makes_all_begin_anew(directories: dict[str, Path]) -> None:
    models = models_of(directories, "kimi", 3)
    plain, _ = await serve(Chain(models, seed=0))
    chain = Chain(models, seed=1)
    chain.plan = dict.fromkeys(range(20, 140, 20), "restart")
    found, snapshot = await serve(chain)
    assert found == plain
    assert len(chain.faults) > 3
    assert snapshot.requests_resumed_total > 0
    assert not [event for event in snapshot.events if "still cached" in event]


def test_after_work_that_was_broken_off_a_worker_keeps_nothing(directories: dict[str, Path]) -> None:
    (model,) = models_of(directories, "kimi", 1)
    chain = Chain([model], seed=0)
    worker = chain.workers[0]
    guessing = step_of(1, [5, 6, 7], epoch=1)
    worker.execute(replace(guessing, segments=(replace(guessing.segments[0], drafts=2),)))
    assert worker.keep(2) == (HeldCaches(seq_id=1, tokens=1),), "guesses are not certain"
    assert worker.keep(3) == (HeldCaches(seq_id=1, tokens=1),), "the leader failed twice"
    assert worker.kv_nbytes > 0
    with pytest.raises(StageError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_forward", lambda step: mx.array([1]) + mx.array([1, 2, 3]).reshape(5, 5))
        worker.execute(step_of(2, [8, 9], epoch=3))
    assert worker.keep(4) == ()
    assert worker.sequences == 0


def test_caches_that_moved_on_some_stages_alone_are_held_under_the_name_that_all_know(
    directories: dict[str, Path],
) -> None:
    models = models_of(directories, "kimi", 3)
    workers = [StageWorker(model, epoch=1, stage=stage) for stage, model in enumerate(models)]
    tokens = [5, 6, 7, 8, 9, 10]
    run_chain(workers, step_of(1, tokens, epoch=1))
    alone = run_chain(
        [StageWorker(model, epoch=1, stage=stage) for stage, model in enumerate(models)],
        step_of(3, [*tokens[:4], 50, 51], epoch=1),
    )
    # The first stage alone hears that sequence 2 goes on with four of the six tokens, and then the link is cut.
    workers[0].execute(step_of(2, [60, 61, 62], epoch=1, begins_with=(1, 4)))
    held = [worker.keep(2) for worker in workers]
    assert set(held[0]) == {HeldCaches(seq_id=1, tokens=4), HeldCaches(seq_id=2, tokens=7)}
    assert held[1] == held[2] == (HeldCaches(seq_id=1, tokens=6),)
    before = known(1, tokens[:4])
    (found,) = held_by_all([known(2, [*tokens[:4], 60, 61, 62, 63], before)], held)
    assert (found.seq_id, found.tokens.tolist()) == (1, tokens[:4])
    third = step_of(3, [50, 51], epoch=2, begins_with=(1, 4))
    assert run_chain(workers, replace(third, free=(2,))).sampled == alone.sampled
    assert [worker.sequences for worker in workers] == [1, 1, 1]


def step_of(seq_id: int, tokens: Sequence[int], *, epoch: int, begins_with: tuple[int, int] | None = None) -> Step:
    """A sequence's first step; `begins_with` are whose caches it takes over, and how many of their tokens."""
    source, offset = begins_with or (None, 0)
    start = SequenceStart(
        seq_id=seq_id,
        prompt_tokens=offset + len(tokens),
        sampling=SamplingParams(temperature=0),
        source=source,
        restore=offset,
        move=source is not None,
    )
    segment = Segment(seq_id=seq_id, offset=offset, length=len(tokens), sample=True)
    return Step(epoch=epoch, step_id=seq_id, segments=(segment,), tokens=np.array(tokens, np.int32), begin=(start,))


def known(seq_id: int, tokens: Sequence[int], before: KnownCaches | None = None) -> KnownCaches:
    return KnownCaches(seq_id=seq_id, tokens=as_tokens(tokens), reserved_tokens=16, before=before)


def held(*each: tuple[int, int] | tuple[int, int, int]) -> list[HeldCaches]:
    return [HeldCaches(seq_id=one[0], tokens=one[1], least_tokens=one[2] if len(one) == 3 else 0) for one in each]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([held((1, 9)), held((1, 7)), held((1, 8))], [(1, 7)]),
        ([held((1, 9)), held(), held((1, 8))], []),
        ([held((1, 99)), held((1, 99))], [(1, 10)]),
        ([held((1, 9, 8)), held((1, 7, 6))], []),
        ([held((1, 9, 8)), held((1, 8, 7))], [(1, 8)]),
        ([held((2, 3), (3, 1)), held((2, 3), (3, 2))], [(2, 3), (3, 1)]),
        # Sequence 2 took over what was 0: a stage that has not heard of it holds it by that name alone.
        ([held((2, 6), (0, 4)), held((0, 9))], [(0, 4)]),
        ([held((2, 6), (0, 4)), held((2, 5), (0, 4))], [(2, 5)]),
        ([held((7, 6)), held((7, 6))], []),
        ([held((1, 0)), held((1, 5))], []),
        ([], []),
    ],
)
def test_what_all_stages_hold_is_the_fewest_tokens_of_any(
    stages: Sequence[Sequence[HeldCaches]], expected: list[tuple[int, int]]
) -> None:
    before = known(0, range(50, 54))
    every = [known(1, range(10)), known(2, range(50, 60), before), known(3, range(80, 90))]
    found = list(held_by_all(every, stages))
    assert [(each.seq_id, len(each.tokens)) for each in found] == expected
    for each in found:
        source = next(one for one in [*every, before] if one.seq_id == each.seq_id)
        assert each.tokens.tolist() == source.tokens[: len(each.tokens)].tolist()
