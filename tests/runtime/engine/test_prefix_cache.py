"""Prefixes with a real tiny Kimi: the same tokens with and without them, on one to three stages, through memory and disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

import exo_kimi
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.prefix_key import KEY_DIGITS
from exo_kimi.runtime.protocol.messages import Join, Load
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.stage.backend import CheckpointLayers, MlxBackend
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.prefix_disk import BlockFiles, Changed, OpenedDisk, PrefixDisk
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.steps import Blocks, Segment, SequenceStart, Step

SMALL = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4}
BOUNDS = {1: [0, 3], 2: [0, 2, 3], 3: [0, 1, 2, 3]}
BLOCK = 16
NEW = 5

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Model]]:
    config = SMALL | {"num_hidden_layers": 3}
    checkpoint = make_tiny(tmp_path_factory.mktemp("prefix") / "tiny", dtype="F32", seed=5, config=config)
    return lambda stages: [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise(BOUNDS[stages])]


@pytest.fixture(scope="module")
def answer(models: Callable[[int], list[Model]]) -> Iterator[Callable[[Sequence[int]], list[int]]]:
    """Greedy tokens of the whole model without any cache."""
    (model,) = models(1)
    known: dict[tuple[int, ...], list[int]] = {}

    def generate(prompt: Sequence[int]) -> list[int]:
        if tuple(prompt) not in known:
            tokens = list(prompt)
            for _ in range(NEW):
                tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
            known[tuple(prompt)] = tokens[len(prompt) :]
        return known[tuple(prompt)]

    yield generate


Pipelines = Callable[..., InlinePipeline]


@pytest.fixture
def pipeline_of(models: Callable[[int], list[Model]], tmp_path: Path) -> Pipelines:
    def make(stages: int = 2, *, capacity: int = 200 * BLOCK, disk_blocks: int = 0) -> InlinePipeline:
        def open_disk(stage: int, model: StageModel, changed: Changed) -> PrefixDisk:
            size = 1000
            identity = f"{stages}{stage}" * 16
            return PrefixDisk(
                tmp_path, identity, block_bytes=size, disk_bytes=disk_blocks * (size + 8192), changed=changed
            )

        return InlinePipeline(
            lambda: models(stages),
            stages=stages,
            context=4096,
            kv_capacity_tokens=capacity,
            cache_step=BLOCK,
            open_disk=open_disk if disk_blocks else None,
        )

    return make


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 500, length).tolist())


def request_of(prompt: Sequence[int], sampling: SamplingParams | None = None) -> GenerationRequest:
    return GenerationRequest(
        request_id=str(id(prompt)),
        prompt_ids=tuple(prompt),
        max_tokens=NEW,
        sampling=sampling or SamplingParams(temperature=0.0),
    )


async def ask(engine: Engine, prompt: Sequence[int], sampling: SamplingParams | None = None) -> list[TokenEvent]:
    return [event async for event in engine.generate(request_of(prompt, sampling))]


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def engine_over(pipeline: InlinePipeline, **options: int) -> Engine:
    return Engine(pipeline, prefill_chunk=options.pop("prefill_chunk", 32), prefixes=PrefixOptions(**options))


async def written(engine: Engine, blocks: int) -> None:
    """Wait until every stage has so many blocks on disk."""
    while engine.snapshot().disk_blocks < blocks:
        await asyncio.sleep(0.01)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_shared_prefixes_change_no_greedy_token(
    pipeline_of: Pipelines, answer: Callable[[Sequence[int]], list[int]], data: st.DataObject
) -> None:
    """Three texts, cut at random and put together, asked at random moments; little memory on and off."""
    lengths = st.integers(1, 40)
    prompts = data.draw(
        st.lists(st.lists(st.tuples(st.integers(0, 2), lengths), min_size=1, max_size=3), min_size=1, max_size=4)
    )
    asked = [tuple(token for seed, length in parts for token in text(seed, length)) for parts in prompts]
    stages = data.draw(st.integers(1, 3))
    capacity = data.draw(st.sampled_from((14 * BLOCK, 200 * BLOCK)))
    together = data.draw(st.booleans())
    async with engine_over(pipeline_of(stages, capacity=capacity), prefill_chunk=24) as engine:
        if together:
            found = [ids(events) for events in await asyncio.gather(*(ask(engine, prompt) for prompt in asked))]
        else:
            found = [ids(await ask(engine, prompt)) for prompt in asked]
        for prompt in asked[:1]:
            turn = (*prompt, *answer(prompt), 3)
            found.append(ids(await ask(engine, turn)))
    assert found == [answer(prompt) for prompt in (*asked, *((*p, *answer(p), 3) for p in asked[:1]))]


async def test_a_conversation_is_fed_once_and_usage_says_so(
    pipeline_of: Pipelines, answer: Callable[[Sequence[int]], list[int]]
) -> None:
    prompt = text(7, 100)
    async with engine_over(pipeline_of(3)) as engine:
        for turn in range(3):
            events = await ask(engine, prompt)
            assert ids(events) == answer(prompt)
            assert {event.cached_tokens for event in events} == {0 if turn == 0 else len(prompt) - 3}
            prompt = (*prompt, *ids(events), 11, 12)
        snapshot = engine.snapshot()
        assert snapshot.cached_tokens_total == 104 + 111
        assert snapshot.kv_reserved_tokens == 0
        assert snapshot.kv_prefix_tokens > 0


async def test_a_running_sequence_lends_its_prompt(
    pipeline_of: Pipelines, answer: Callable[[Sequence[int]], list[int]]
) -> None:
    system = text(8, 80)
    prompts = [(*system, *text(20 + index, 5 + index)) for index in range(4)]
    async with engine_over(pipeline_of(2)) as engine:
        found = await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
    assert [ids(events) for events in found] == [answer(prompt) for prompt in prompts]
    assert sorted(events[0].cached_tokens for events in found)[1:] == [80, 80, 80]


async def test_penalties_and_seeds_see_the_whole_prompt(pipeline_of: Pipelines) -> None:
    sampling = SamplingParams(temperature=1.0, seed=9, repetition_penalty=1.5, frequency_penalty=0.5)
    prompt = text(9, 60)
    async with engine_over(pipeline_of(2)) as engine:
        first = await ask(engine, prompt, sampling)
        again = await ask(engine, prompt, sampling)
    assert again[0].cached_tokens == 59
    assert ids(again) == ids(first)


def damage_nothing(_: Path) -> None:
    """For comparison."""


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def swap(path: Path) -> None:
    """Another block's contents under this name."""
    other = next(file for file in path.parent.iterdir() if file != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("damage", [damage_nothing, cut_short, flip_a_bit, swap, Path.unlink])
async def test_after_a_restart_blocks_are_read_or_if_damaged_computed_again(
    pipeline_of: Pipelines,
    answer: Callable[[Sequence[int]], list[int]],
    tmp_path: Path,
    stages: int,
    damage: Callable[[Path], None],
) -> None:
    prompt = text(10, 10 * BLOCK + 3)
    async with engine_over(pipeline_of(stages, disk_blocks=50)) as engine:
        assert ids(await ask(engine, prompt)) == answer(prompt)
        await written(engine, 10)
    async with engine_over(pipeline_of(stages, disk_blocks=50)) as engine:
        await engine.wait_ready()
        # Some other stage's: each may lose what it likes.
        directory = sorted(tmp_path.iterdir())[stages // 2]
        files = sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        assert len(files) == 10
        damage(files[6])
        events = await ask(engine, prompt)
        assert ids(events) == answer(prompt)
        assert events[0].cached_tokens == (10 * BLOCK if damage is damage_nothing else 6 * BLOCK)
        assert engine.snapshot().restarts_total == 0
        await written(engine, 10)  # and written again


async def test_a_process_that_dies_while_writing_leaves_no_block(
    pipeline_of: Pipelines, answer: Callable[[Sequence[int]], list[int]], tmp_path: Path
) -> None:
    prompt = text(11, 4 * BLOCK + 3)
    async with engine_over(pipeline_of(1, disk_blocks=50)) as engine:
        await ask(engine, prompt)
        await written(engine, 4)
    (directory,) = tmp_path.iterdir()
    newest = max(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    unfinished = newest.with_name(f"{newest.stem}-1.part")
    newest.rename(unfinished)
    async with engine_over(pipeline_of(1, disk_blocks=50)) as engine:
        events = await ask(engine, prompt)
        assert events[0].cached_tokens == 3 * BLOCK
        assert not unfinished.exists()
    assert ids(events) == answer(prompt)


async def test_a_full_disk_is_warned_about_once_and_nothing_fails(
    pipeline_of: Pipelines,
    answer: Callable[[Sequence[int]], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write, room = BlockFiles.write, iter(range(3))

    def write_while_there_is_room(self: BlockFiles, *args: object) -> None:
        if next(room, None) is None:
            raise OSError(28, os.strerror(28))
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockFiles, "write", write_while_there_is_room)
    async with engine_over(pipeline_of(1, disk_blocks=50)) as engine:
        for seed in (12, 13):
            prompt = text(seed, 8 * BLOCK)
            assert ids(await ask(engine, prompt)) == answer(prompt)
        await written(engine, 3)
        again = await ask(engine, text(12, 8 * BLOCK))
        assert again[0].cached_tokens == 8 * BLOCK - 1
    assert [record.levelname for record in caplog.records if "not written" in record.message] == ["WARNING"]
    (directory,) = tmp_path.iterdir()
    assert len(list(directory.iterdir())) == 3


async def test_the_disk_keeps_within_its_budget(pipeline_of: Pipelines, tmp_path: Path) -> None:
    async with engine_over(pipeline_of(2, disk_blocks=6)) as engine:
        for seed in range(14, 18):
            await ask(engine, text(seed, 4 * BLOCK))
            await written(engine, 4)
        last = text(17, 4 * BLOCK)
    for directory in tmp_path.iterdir():
        assert 4 <= len(list(directory.iterdir())) <= 6
    async with engine_over(pipeline_of(2, disk_blocks=6)) as engine:
        assert (await ask(engine, last))[0].cached_tokens == 3 * BLOCK


def test_a_backend_keeps_blocks_for_its_own_layers_and_weights_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a stage process uses it: from an order to join to keys on disk, and again for the next process."""
    checkpoint = make_tiny(tmp_path / "tiny", dtype="F32", config=SMALL | {"num_hidden_layers": 3})
    manifest = resolve(open_index(checkpoint), 0, 3)
    load = Load(
        stage=0,
        directory=str(checkpoint),
        start_layer=0,
        end_layer=3,
        dtype="float32",
        fingerprint=stage_fingerprint(manifest),
    )
    told: list[tuple[str, ...]] = []
    key = "0" * KEY_DIGITS

    def joined(directory: Path, **changes: Any) -> tuple[MlxBackend, OpenedDisk]:
        backend = MlxBackend(CheckpointLayers(None))
        backend.load(structs.replace(load, **changes), lambda *_: None)
        backend.reset(1)
        order = Join(
            epoch=1,
            next_address=None,
            link="zmq",
            block_tokens=BLOCK,
            prefix_disk_bytes=1_000_000,
            prefix_directory=str(directory),
        )
        return backend, backend.open_disk(order, lambda added, _: told.append(added))

    backend, opened = joined(tmp_path / "blocks")
    assert opened.blocks > 10
    assert opened.keys == ()
    start = SequenceStart(seq_id=0, prompt_tokens=BLOCK, sampling=SamplingParams(temperature=0.0))
    segment = Segment(seq_id=0, offset=0, length=BLOCK, sample=True)
    store = Blocks(seq_id=0, offset=0, block_tokens=BLOCK, keys=(key,))
    tokens = np.arange(BLOCK, dtype=np.int32)
    backend.execute(Step(epoch=1, step_id=0, segments=(segment,), tokens=tokens, begin=(start,), store=(store,)))
    backend.unload()
    assert told == [(key,)]
    assert joined(tmp_path / "blocks")[1] == replace(opened, keys=(key,))
    assert joined(tmp_path / "blocks", dtype="bfloat16")[1].keys == ()
    (tmp_path / "file").write_text("")
    assert joined(tmp_path / "file")[1] == OpenedDisk()
    assert "no prefix is kept" in caplog.text
