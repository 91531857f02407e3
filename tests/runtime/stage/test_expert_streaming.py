"""The engine over stages whose experts stay on disk: the same tokens as when all are held, and faults that end who met them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ExpertReadError
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.experts.layout import layouts_of
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.engine import engine as engine_module
from exo_kimi.runtime.engine.draft_policy import HeadPolicy
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.stage.drafting import DraftRunner
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import StageModel
from tests.runtime.stage.test_drafting import TableHead

SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "vocab_size": 512,
}
PROMPTS = [
    tuple((7 * i * i + seed) % 200 for i in range(length)) for seed, length in ((1, 70), (2, 9), (3, 33), (4, 1))
]
REPEATING = tuple([5, 9, 11, 60, 7] * 8)


class Disk:
    """preadv, and what a test has it do."""

    def __init__(self) -> None:
        self.faults = 0
        """Reads that fail from now on."""
        self.gate = threading.Event()
        """Reads wait while it is not set."""
        self.gate.set()
        self.waiting = 0

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        self.waiting += 1
        self.gate.wait(60)
        self.waiting -= 1
        if self.faults:
            self.faults -= 1
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, position)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("streaming") / "tiny", seed=3, config=SMALL, layout="int4")


Make = Callable[..., InlinePipeline]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def make(checkpoint: Path, disk: Disk) -> Make:
    def pipeline(
        slots: int | None,
        *,
        stages: int = 1,
        kv_bits: int | None = None,
        head: Path | None = None,
        follows: dict[int, int] | None = None,
    ) -> InlinePipeline:
        bounds = [layer * 4 // stages for layer in range(stages + 1)]

        def load() -> list[Model]:
            models = []
            for start, end in pairwise(bounds):
                manifest = resolve(open_index(checkpoint), start, end)
                each = sum(layout.slot_bytes for layout in layouts_of(manifest.sources, floats="F32").values())
                cache = None if slots is None else ExpertCache(budget_bytes=slots * each)
                model = load_stage(manifest, dtype="float32", fuse=True, expert_cache=cache)
                model.set_kv_bits(kv_bits)
                if model.streamed is not None:
                    model.streamed.store._preadv = disk
                models.append(model)
            return models

        def load_drafts(model: StageModel) -> DraftRunner:
            if follows is not None:
                return DraftRunner(TableHead(follows, model.args.vocab_size), vocab_size=model.args.vocab_size)
            assert head is not None and isinstance(model, Model)
            drafts = load_draft_head(head, Checkpoint(checkpoint), model=model, dtype="float32")
            return DraftRunner(drafts, vocab_size=model.args.vocab_size)

        sizes = {"kv_capacity_tokens": 40 * CACHE_STEP, "cache_step": CACHE_STEP}
        layers: tuple[int, ...] = () if follows is None else (0, 2)
        return InlinePipeline(
            load,
            stages=stages,
            context=4096,
            ahead=slots is None,
            feature_layers=layers if head is None else resolve_draft(head).config.feature_layers(4),
            load_drafts=None if head is None and follows is None else load_drafts,
            **sizes,
        )

    return pipeline


LOUD = tuple((token, 40.0) for token in REPEATING[:3])
"""Few tokens to choose from, so that guesses are made and some are right."""


async def collect(
    engine: Engine, prompt: Sequence[int], count: int = 12, *, bias: tuple[tuple[int, float], ...] = ()
) -> list[int]:
    request = GenerationRequest(
        request_id=f"{len(prompt)} {prompt[0]} {count}",
        prompt_ids=tuple(prompt),
        max_tokens=count,
        sampling=SamplingParams(temperature=0.0, logit_bias=bias),
    )
    events: list[TokenEvent] = [event async for event in engine.generate(request)]
    return [event.token_id for event in events]


async def answers(engine: Engine) -> list[list[int]]:
    """Four sequences at a time, and then one that begins like another."""
    together = await asyncio.gather(*(collect(engine, prompt) for prompt in PROMPTS))
    return [*together, await collect(engine, (*PROMPTS[0], 3, 4)), await collect(engine, REPEATING, 24, bias=LOUD)]


async def expected_of(make: Make, *, kv_bits: int | None = None) -> list[list[int]]:
    async with Engine(make(None, kv_bits=kv_bits)) as engine:
        return await answers(engine)


@pytest.mark.parametrize(
    ("slots", "stages", "kv_bits", "drafts"),
    [(2, 1, None, None), (5, 1, None, 3), (1, 2, None, None), (3, 3, 8, 3)],
    ids=["top-k slots", "drafts", "fewer than top-k", "3 stages, 8-bit caches, drafts"],
)
async def test_batches_chunks_prefixes_and_drafts_give_the_same_tokens(
    make: Make, checkpoint: Path, slots: int, stages: int, kv_bits: int | None, drafts: int | None
) -> None:
    expected = await expected_of(make, kv_bits=kv_bits)
    drafter = None if drafts is None else Drafter.of(drafts, bytes_of_manifest(resolve(open_index(checkpoint))))
    pipeline = make(slots, stages=stages, kv_bits=kv_bits)
    async with Engine(pipeline, prefill_chunk=16, drafter=drafter, prefixes=PrefixOptions()) as engine:
        assert await answers(engine) == expected
        snapshot = engine.snapshot()
    assert snapshot.cached_tokens_total > 0
    assert drafts is None or snapshot.draft_tokens_total > 0
    experts = [stage.experts for stage in snapshot.stages if stage.experts is not None]
    assert experts and all(each.misses and each.read_bytes for each in experts)


async def test_a_draft_head_beside_experts_on_disk_gives_the_same_tokens(
    make: Make, checkpoint: Path, disk: Disk, tmp_path: Path
) -> None:
    """Guesses read experts of their own, and a read that fails in their midst ends who asked for it and no other."""
    expected = await expected_of(make)
    head = make_tiny_draft(tmp_path / "head", Checkpoint(checkpoint).config, kind="mla", dtype="F32")
    model = bytes_of_manifest(resolve(open_index(checkpoint)))
    drafter = Drafter.of("off", model, head=HeadPolicy.of(3, draft_bytes=1.0))
    pipeline = make(2, stages=2, head=head)
    async with Engine(pipeline, prefill_chunk=16, drafter=drafter, prefixes=PrefixOptions()) as engine:
        assert await answers(engine) == expected
        snapshot = engine.snapshot()
        assert snapshot.draft_tokens_total > 100 and snapshot.head_undrafted_total == 0
        assert all(stage.experts is not None and stage.experts.misses for stage in snapshot.stages)
        disk.faults = 1
        results = await asyncio.gather(*(collect(engine, prompt) for prompt in PROMPTS), return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        assert len(failed) <= 1 and all(isinstance(each, ExpertReadError) for each in failed)
        assert all(isinstance(a, BaseException) or a == b for a, b in zip(results, expected, strict=False))
        assert await answers(engine) == expected


@pytest.mark.parametrize(("stages", "lookups"), [(1, False), (3, False), (2, True)])
async def test_a_draft_head_gives_the_same_tokens_and_counts_what_its_guesses_would_read(
    make: Make, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stages: int, lookups: bool
) -> None:
    monkeypatch.setattr(engine_module, "DISK_COST_STEPS", 1)
    expected = await expected_of(make)
    after = {token: following for text in expected for token, following in pairwise(text)}
    step_bytes = Drafter.of(3, bytes_of_manifest(resolve(open_index(checkpoint)))).step_bytes
    drafter = Drafter(
        step_bytes=step_bytes, lookups=lookups, always=lookups, limit=3, head=HeadPolicy.of(3, draft_bytes=1)
    )
    async with Engine(make(3, stages=stages, follows=after), drafter=drafter, prefixes=PrefixOptions()) as engine:
        await engine.wait_ready()
        assert await answers(engine) == expected
        snapshot = engine.snapshot()
    tries, hits = zip(*snapshot.head_drafts_by_position, strict=True)
    assert tries[0] > hits[0] > 5, "guesses of the head are right now and then, and wrong now and then"
    experts = [stage.experts for stage in snapshot.stages if stage.experts is not None]
    assert experts and all(each.misses and each.read_bytes for each in experts)
    # What the slots missed is in the price of a guess: a step of 4 tokens costs more of the disk than one of 1.
    assert drafter.disk_cost > 0
    line = [step_bytes.cost(1 + count, sequences=1, cached_tokens=0, disk_cost=drafter.disk_cost) for count in (0, 3)]
    without = [step_bytes.cost(1 + count, sequences=1, cached_tokens=0) for count in (0, 3)]
    assert line[1] - line[0] > without[1] - without[0] > 0


async def test_a_read_that_fails_ends_its_request_and_no_other(make: Make, disk: Disk) -> None:
    expected = await expected_of(make)
    for stages in (1, 2):
        async with Engine(make(2, stages=stages), prefixes=PrefixOptions()) as engine:
            await engine.wait_ready()
            await collect(engine, PROMPTS[1], 3)
            tasks = [asyncio.create_task(collect(engine, prompt)) for prompt in PROMPTS]
            while min(request.generated_tokens for request in engine.snapshot().requests or [NoneYet]) < 2:
                await asyncio.sleep(0.01)
            # The pass of all, and then the first of them by itself.
            disk.faults = 2
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert disk.faults == 0
            failed = [result for result in results if isinstance(result, BaseException)]
            assert len(failed) == 1 and isinstance(failed[0], ExpertReadError)
            assert failed[0].what.startswith("stage ") and "mlp.experts." in failed[0].what
            assert (failed[0].found, failed[0].fix is not None) == ("Input/output error", True)
            for result, tokens in zip(results, expected, strict=False):
                assert isinstance(result, BaseException) or result == tokens
            # What the failed one left behind misleads nobody, and no stage was started again.
            assert await answers(engine) == expected
            snapshot = engine.snapshot()
            assert (snapshot.requests_failed_total, snapshot.restarts_total) == (1, 0)


class NoneYet:
    generated_tokens = 0


async def test_who_began_from_a_sequence_whose_read_failed_begins_again(make: Make, disk: Disk) -> None:
    """Caches are taken over while the step that fills them is still under way."""
    shared = PROMPTS[0] + PROMPTS[2]
    prompts = [(*shared, 3, 4), (*shared, 9), (*shared, 11, 12)]
    async with Engine(make(None)) as engine:
        expected = [await collect(engine, prompt) for prompt in prompts]
    async with Engine(make(2, stages=3), prefixes=PrefixOptions()) as engine:
        await engine.wait_ready()
        disk.faults = 1
        disk.gate.clear()
        first = asyncio.create_task(collect(engine, prompts[0]))
        while not disk.waiting:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(collect(engine, prompt)) for prompt in prompts[1:]]
        scheduler = engine._scheduler.current
        assert scheduler is not None
        while len(scheduler.in_flight) < 2:
            await asyncio.sleep(0.001)
        assert all(sequence.source is not None for sequence in scheduler.running[1:])
        disk.gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert isinstance(results[0], ExpertReadError) and disk.faults == 0
        assert results[1:] == expected[1:]
        snapshot = engine.snapshot()
        assert (snapshot.requests_failed_total, snapshot.restarts_total) == (1, 0)
        assert [await collect(engine, prompt) for prompt in prompts] == expected


async def test_a_prompt_that_fails_midway_ends_with_all_its_chunks_in_flight(make: Make, disk: Disk) -> None:
    expected = await expected_of(make)
    async with Engine(make(2, stages=3), prefill_chunk=4, prefixes=PrefixOptions()) as engine:
        await engine.wait_ready()
        disk.faults = 1
        with pytest.raises(ExpertReadError):
            await collect(engine, PROMPTS[0])
        assert await answers(engine) == expected
        assert engine.snapshot().restarts_total == 0


async def test_a_disk_that_stays_broken_ends_every_request_and_nothing_hangs(make: Make, disk: Disk) -> None:
    async with Engine(make(2, stages=2)) as engine:
        await engine.wait_ready()
        disk.faults = 10**9
        results = await asyncio.gather(*(collect(engine, prompt) for prompt in PROMPTS), return_exceptions=True)
        assert all(isinstance(result, ExpertReadError) for result in results)
        disk.faults = 0
        assert len(await collect(engine, PROMPTS[0])) == 12
        assert engine.snapshot().restarts_total == 0


@pytest.mark.parametrize("chosen", [(2,), (1, 2, 3)], ids=["a lone prompt", "three prompts"])
async def test_prompts_that_wait_read_each_expert_once_in_every_stage(make: Make, chosen: tuple[int, ...]) -> None:
    """In two halves, which two stages would work on at once, nearly all of them would be read twice."""
    expected = await expected_of(make)
    async with Engine(make(2, stages=3), prefill_chunk=2048) as engine:
        await engine.wait_ready()
        found = await asyncio.gather(*(collect(engine, PROMPTS[each], 1) for each in chosen))
        snapshot = engine.snapshot()
    assert found == [expected[each][:1] for each in chosen]
    experts = [stage.experts for stage in snapshot.stages if stage.experts is not None]
    # The first of four layers is dense, and of the last only what is asked for is computed.
    assert 2 * 8 < sum(each.hits + each.misses for each in experts) <= 3 * 8


async def test_a_cancelled_request_leaves_slots_in_order(make: Make) -> None:
    expected = await expected_of(make)
    async with Engine(make(2, stages=2)) as engine:
        request = GenerationRequest(request_id="gone", prompt_ids=PROMPTS[0], max_tokens=50)
        stream = engine.generate(request)
        await anext(stream)
        await stream.aclose()
        assert await answers(engine) == expected
