"""Snapshots of a tiny Kimi Linear's states: who shares a beginning begins in it, from memory and from disk, on one to five
stages, with the tokens of one sequence alone; and the memory that they take is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.arch.geometry import kv_bytes_per_token, state_bytes_per_sequence
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.sequence import Sequence as Running
from exo_kimi.runtime.engine.snapshots import MOST_SNAPSHOTS
from exo_kimi.runtime.engine.speculation import Drafter, step_bytes_of
from exo_kimi.runtime.prefix_key import is_snapshot, snapshot_key
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.prefix_disk import Changed, PrefixDisk
from exo_kimi.runtime.stage.stage_model import StageModel

pytestmark = pytest.mark.timeout(240)

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_hidden_layers": 5,
    "linear_attn_config": {
        "head_dim": 32,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
        "full_attn_layers": [2, 5],
        "kda_layers": [1, 3, 4],
    },
}
# Stages of states alone, of latents alone, and of both.
BOUNDS = {1: [0, 5], 2: [0, 2, 5], 3: [0, 1, 4, 5], 5: [0, 1, 2, 3, 4, 5]}
BLOCK, END, NEW = 16, 999, 4
STATE_TOKENS, SNAPSHOT_TOKENS = 20, 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("snapshots") / "t", family="linear", layout="bf16", seed=3, config=SMALL)


@pytest.fixture(scope="module")
def models(directory: Path) -> Callable[[int], list[Model]]:
    return lambda stages: [
        exo_kimi.load(directory, a, b, dtype="float32", fuse=True) for a, b in pairwise(BOUNDS[stages])
    ]


@pytest.fixture(scope="module")
def answer(models: Callable[[int], list[Model]]) -> Callable[[Sequence[int]], list[int]]:
    """Greedy tokens after a prompt, from one sequence alone."""
    (model,) = models(1)
    known: dict[tuple[int, ...], list[int]] = {}

    def generate(prompt: Sequence[int]) -> list[int]:
        key = tuple(prompt)
        if key not in known:
            caches, found, chunk = model.make_cache(), list[int](), mx.array(prompt)
            for _ in range(NEW):
                chunk = mx.argmax(model.logits(model.forward_ragged(chunk, [(len(chunk), caches)])[-1:]), axis=-1)
                found.append(int(chunk.item()))
            known[key] = found
        return known[key]

    return generate


class Rig:
    """Pipelines over one model, and the disks that outlive them."""

    def __init__(self, models: Callable[[int], list[Model]], parent: Path, config_bytes: tuple[int, int]) -> None:
        self.models, self.parent = models, parent
        self.block_bytes, self.snapshot_bytes = config_bytes
        self.disks: list[PrefixDisk] = []

    def pipeline(self, stages: int = 1, *, capacity: int = 200 * BLOCK, disk_bytes: int = 0) -> InlinePipeline:
        def open_disk(stage: int, model: StageModel, changed: Changed) -> PrefixDisk:
            self.disks.append(
                PrefixDisk(
                    self.parent / f"{stages}",
                    f"{stages}{stage}" * 16,
                    block_bytes=self.block_bytes,
                    snapshot_bytes=self.snapshot_bytes,
                    disk_bytes=disk_bytes,
                    changed=changed,
                )
            )
            return self.disks[-1]

        self.disks.clear()
        return InlinePipeline(
            lambda: self.models(stages),
            stages=stages,
            context=4096,
            kv_capacity_tokens=capacity,
            cache_step=BLOCK,
            open_disk=open_disk if disk_bytes else None,
            state_tokens=STATE_TOKENS,
            snapshot_tokens=SNAPSHOT_TOKENS,
        )

    def engine(self, pipeline: InlinePipeline, drafter: Drafter | None = None, chunk: int = 32) -> Engine:
        return Engine(pipeline, prefill_chunk=chunk, prefixes=PrefixOptions(), drafter=drafter)


@pytest.fixture
def rig(models: Callable[[int], list[Model]], directory: Path, tmp_path: Path) -> Rig:
    config = Checkpoint(directory).config
    block_bytes = BLOCK * kv_bytes_per_token(config, 0, 5, bytes_per_element=4)
    return Rig(models, tmp_path, (block_bytes, state_bytes_per_sequence(config, 0, 5, bytes_per_element=4)))


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 500, length).tolist()


SYSTEM = [*text(1, 60), END]
"""A message of 61 tokens: what is shared of it are 3 blocks of 16."""
AGENTS = [[*SYSTEM, *text(2, 25)], [*SYSTEM, *text(3, 40)]]


def request_of(prompt: Sequence[int], name: str = "a") -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_ids=tuple(prompt),
        max_tokens=NEW,
        sampling=SamplingParams(temperature=0.0),
        stop_ids=frozenset({END}),
    )


async def ask(engine: Engine, prompt: Sequence[int], name: str = "a") -> tuple[list[int], int]:
    """Its tokens, and how many of the prompt's were cached."""
    events: list[TokenEvent] = [event async for event in engine.generate(request_of(prompt, name))]
    return [event.token_id for event in events if event.token_id is not None], events[0].cached_tokens or 0


Answer = Callable[[Sequence[int]], list[int]]


@pytest.mark.parametrize("stages", sorted(BOUNDS))
def test_the_second_agent_begins_at_the_last_whole_block_of_the_system_prompt(
    rig: Rig, answer: Answer, stages: int
) -> None:
    """A hit in the middle of a block falls back to the block's start: 61 shared tokens are 48."""

    async def run() -> tuple[list[tuple[list[int], int]], int]:
        async with rig.engine(rig.pipeline(stages)) as engine:
            found = [await ask(engine, prompt) for prompt in AGENTS]
            found.append(await ask(engine, [*AGENTS[0], *answer(AGENTS[0]), 7, 8]))
            return found, engine.snapshot().prefix_snapshots

    found, held = asyncio.run(run())
    third = [*AGENTS[0], *answer(AGENTS[0]), 7, 8]
    assert [tokens for tokens, _ in found] == [answer(AGENTS[0]), answer(AGENTS[1]), answer(third)]
    assert [cached for _, cached in found] == [0, 48, len(AGENTS[0]) + NEW - 1]
    assert held >= 2


def test_agents_that_come_together_compute_the_system_prompt_once(rig: Rig, answer: Answer) -> None:
    agents = [*AGENTS, [*SYSTEM, *text(4, 30)]]

    async def run() -> list[tuple[list[int], int]]:
        async with rig.engine(rig.pipeline(2)) as engine:
            return list(await asyncio.gather(*(ask(engine, prompt, f"{n}") for n, prompt in enumerate(agents))))

    found = asyncio.run(run())
    assert [tokens for tokens, _ in found] == [answer(prompt) for prompt in agents]
    assert [cached for _, cached in found] == [0, 48, 48]


def test_where_prompts_part_without_a_message_s_end_the_third_begins(rig: Rig, answer: Answer) -> None:
    """Nobody could know that the first would be shared up to 40 tokens; the second shows it, the third begins at 32."""
    shared = text(9, 40)
    prompts = [[*shared, *text(seed, 30)] for seed in (10, 11, 12)]

    async def run() -> list[tuple[list[int], int]]:
        async with rig.engine(rig.pipeline(3)) as engine:
            return [await ask(engine, prompt) for prompt in prompts]

    found = asyncio.run(run())
    assert [tokens for tokens, _ in found] == [answer(prompt) for prompt in prompts]
    assert [cached for _, cached in found] == [0, 0, 32]


@pytest.mark.parametrize("chunk", [5, 512])
def test_a_running_sequence_is_begun_from_as_well(rig: Rig, answer: Answer, chunk: int) -> None:
    async def run() -> list[tuple[list[int], int]]:
        async with rig.engine(rig.pipeline(2), chunk=chunk) as engine:
            first = asyncio.create_task(ask(engine, AGENTS[0], "0"))
            while not engine.snapshot().generated_tokens_total:
                await asyncio.sleep(0)
            return [await ask(engine, AGENTS[1], "1"), await first]

    second, first = asyncio.run(run())
    assert (first[0], second) == (answer(AGENTS[0]), (answer(AGENTS[1]), 48))


def test_fifty_turns_take_a_bounded_memory_and_compute_only_what_is_new(rig: Rig, answer: Answer) -> None:
    """A turn that is answered and goes on; another that begins anew from the middle; snapshots never more than allowed."""

    async def run() -> list[int]:
        held, history = [], list(SYSTEM)
        pipeline = rig.pipeline(capacity=90 * BLOCK)
        async with rig.engine(pipeline) as engine:
            for turn in range(50):
                prompt = [*history, *text(100 + turn, 8), END, 7]
                tokens, cached = await ask(engine, prompt)
                if turn in (24, 49):
                    assert tokens == answer(prompt), turn
                if turn:
                    assert cached >= len(history) - 1, turn
                look = engine.snapshot()
                assert look.prefix_snapshots <= MOST_SNAPSHOTS
                assert look.kv_prefix_tokens + look.kv_reserved_tokens <= 90 * BLOCK
                held.append(sum(stage.kv_bytes for stage in look.stages))
                history = [*prompt, *tokens]
            assert engine.snapshot().prefix_snapshots_total >= 20
        return held

    held = asyncio.run(run())
    per_token = rig.block_bytes // BLOCK
    room = -(-(len(SYSTEM) + 50 * (10 + NEW)) // CACHE_STEP) * CACHE_STEP
    # Latents, two states, and as many snapshots as a sequence may have.
    assert max(held) <= per_token * room + (2 + MOST_SNAPSHOTS) * rig.snapshot_bytes


def test_little_memory_gives_the_same_tokens_and_no_more_than_there_is(rig: Rig, answer: Answer) -> None:
    """Prefixes give way, snapshots are let go of, sequences are preempted: whatever is in order."""
    others = [*text(19, 50), END]
    prompts = [[*(SYSTEM if seed % 2 else others), *text(seed, seed)] for seed in range(20, 26)]

    async def run() -> tuple[list[list[int]], int]:
        async with rig.engine(rig.pipeline(2, capacity=16 * BLOCK)) as engine:
            found = []
            for start in (0, 3):
                some = prompts[start : start + 3]
                asked = await asyncio.gather(*(ask(engine, prompt, f"{n}") for n, prompt in enumerate(some)))
                found += [tokens for tokens, _ in asked]
                look = engine.snapshot()
                assert look.kv_prefix_tokens + look.kv_reserved_tokens <= 16 * BLOCK
            return found, engine.snapshot().prefix_evictions_total

    found, evictions = asyncio.run(run())
    assert found == [answer(prompt) for prompt in prompts]
    assert evictions > 0


class Half(Drafter):
    """Guesses the right tokens, and of each run the second wrong."""

    answers: ClassVar[dict[int, list[int]]] = {}

    def _guess(self, sequence: Running) -> tuple[list[int], list[float]]:
        told = self.answers[len(sequence.prompt_ids)]
        guess = told[len(sequence.tokens) - len(sequence.prompt_ids) :][:3]
        return [token + (number == 1) for number, token in enumerate(guess)], [1.0] * len(guess)


@pytest.mark.parametrize("stages", [1, 3])
def test_wrong_guesses_leave_snapshots_alone(rig: Rig, answer: Answer, directory: Path, stages: int) -> None:
    drafter = Half(step_bytes=step_bytes_of(bytes_of_manifest(Checkpoint(directory).manifest())), always=True)
    drafter.answers.update({len(prompt): answer(prompt) for prompt in AGENTS})

    async def run() -> list[tuple[list[int], int]]:
        async with rig.engine(rig.pipeline(stages), drafter) as engine:
            return [await ask(engine, prompt) for prompt in (*AGENTS, AGENTS[0])]

    found = asyncio.run(run())
    assert [tokens for tokens, _ in found] == [answer(prompt) for prompt in (*AGENTS, AGENTS[0])]
    assert [cached for _, cached in found][:2] == [0, 48] and found[2][1] >= 48
    assert drafter.counts.drafted > drafter.counts.accepted


async def written(engine: Engine, count: int) -> None:
    """Wait until every stage has so many files."""
    async with asyncio.timeout(60):
        while engine.snapshot().disk_blocks < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stages", sorted(BOUNDS))
def test_after_a_restart_a_known_beginning_comes_from_the_disks(rig: Rig, answer: Answer, stages: int) -> None:
    async def run() -> list[tuple[list[int], int]]:
        found = []
        for prompt in AGENTS:
            async with rig.engine(rig.pipeline(stages, disk_bytes=10**7)) as engine:
                found.append(await ask(engine, prompt))
                await written(engine, 3 + 1)  # three blocks, and the states after them
        return found

    assert asyncio.run(run()) == [(answer(AGENTS[0]), 0), (answer(AGENTS[1]), 48)]


@pytest.mark.parametrize("how", ["gone", "damaged", "a block"])
def test_a_stage_that_lost_its_snapshot_costs_time_alone(rig: Rig, answer: Answer, how: str) -> None:
    """Of three stages one lost what it kept after 96 tokens: all begin at what was kept after 48."""
    first = [*SYSTEM, *text(5, 40), END, 7]  # ends of messages at 61 and 102
    second = [*first, *text(6, 10)]

    async def run() -> tuple[tuple[list[int], int], int, tuple[list[int], int]]:
        async with rig.engine(rig.pipeline(3, disk_bytes=10**7)) as engine:
            await ask(engine, first)
            await written(engine, 6 + 2)
        disk = rig.disks[1]
        keys = disk.keys()
        newest = [key for key in keys if is_snapshot(key)][-1]
        if how == "a block":
            newest = next(key for key in keys if snapshot_key(key) == newest and key != newest)
        file = disk.files.directory / f"{newest}.safetensors"
        async with rig.engine(rig.pipeline(3, disk_bytes=10**7)) as engine:
            while not engine.snapshot().ready:
                await asyncio.sleep(0.01)
            if how == "gone":
                file.unlink()
            else:
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data)
            found = await ask(engine, second)
            lost = engine.snapshot().prefix_snapshots_lost_total
            return found, lost, await ask(engine, [*second, *found[0], 3])

    found, lost, after = asyncio.run(run())
    assert found == (answer(second), 48)
    assert lost == 1
    assert after[0] == answer([*second, *found[0], 3])


def test_a_disk_that_is_full_drops_what_was_used_least(rig: Rig, answer: Answer) -> None:
    room = 12 * (rig.block_bytes + 8192) + 2 * (rig.snapshot_bytes + 8192)
    prompts = [[*text(seed, 50), END, *text(seed + 50, 9)] for seed in range(30, 36)]

    async def run() -> None:
        async with rig.engine(rig.pipeline(2, disk_bytes=room)) as engine:
            for prompt in prompts:
                tokens, _ = await ask(engine, prompt)
                assert tokens == answer(prompt)
            for disk in rig.disks:
                disk.flush()

    asyncio.run(run())
    for disk in rig.disks:
        size = sum(file.stat().st_size for file in disk.files.directory.iterdir())
        assert 0 < size <= room
