"""Prompts with pictures through the engine: the logits of transformers, and the same tokens whatever way they go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import exo_kimi
from exo_kimi.arch.vision import Grid
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.errors import StageDiedError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.vision import VisionModel
from exo_kimi.pictures.picture import Picture
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.loading.vision import load_vision
from exo_kimi.runtime.protocol.step_frames import encode_step
from exo_kimi.runtime.requests import GenerationRequest, PromptPicture, SamplingParams, TokenEvent
from exo_kimi.runtime.stage import inline
from exo_kimi.runtime.stage.inline import InlinePipeline, OpenDisk
from exo_kimi.runtime.stage.pictures import PictureTower
from exo_kimi.runtime.stage.prefix_disk import Changed, PrefixDisk
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Step, StepResult
from tests.runtime.stage.kernels import recorded
from tests.vision.conftest import LAYERS, patches_of, picture_of

BOUNDS = {1: [0, 3], 2: [0, 2, 3], 3: [0, 1, 2, 3]}
NEW = 6
BAR = 5e-5

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True)
class Asked:
    """A prompt and its pictures."""

    ids: tuple[int, ...]
    pictures: tuple[PromptPicture, ...]


def prompt_of(checkpoint: Path, *parts: Picture | int, seed: int = 1) -> Asked:
    """Pictures, and so many random tokens."""
    pad = Checkpoint(checkpoint).raw_config["media_placeholder_token_id"]
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    shown: list[PromptPicture] = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, 500, part).tolist()
        else:
            tokens = part.grid.rows * part.grid.columns // 4
            shown.append(PromptPicture(len(ids), tokens, part))
            ids += [pad] * tokens
    return Asked(tuple(ids), tuple(shown))


ONE, TWO = picture_of(Grid(1, 4, 6), seed=1), picture_of(Grid(1, 8, 4), seed=2)
SAME_SIZE = picture_of(Grid(1, 4, 6), seed=3)
PLACES: dict[str, Sequence[Picture | int]] = {
    "first": (ONE, 20),
    "middle": (10, ONE, 10),
    "last": (20, ONE),
    "two": (5, ONE, 7, TWO, 3),
    "side by side": (4, ONE, TWO, 4),
    "alone": (TWO,),
    "the same twice": (3, ONE, 3, ONE, 3),
}


@pytest.fixture(scope="module")
def tower(vision_checkpoint: Path) -> PictureTower:
    return PictureTower(load_vision(vision_checkpoint, dtype="float32"))


@pytest.fixture(scope="module")
def models(vision_checkpoint: Path) -> Callable[[int], list[Model]]:
    return lambda stages: [exo_kimi.load(vision_checkpoint, a, b, dtype="float32") for a, b in pairwise(BOUNDS[stages])]


def embedded(model: Model, tower: PictureTower, asked: Asked) -> mx.array:
    h = model.embed(mx.array(asked.ids))
    for shown in asked.pictures:
        pixels = np.frombuffer(shown.picture.pixels, np.uint8)
        grid = shown.picture.grid
        vectors = tower.model(mx.array(pixels.reshape(1, grid.rows * 14, grid.columns * 14, 3)), grid)
        h[shown.start : shown.start + shown.tokens] = vectors
    return h


@pytest.fixture(scope="module")
def answer(models: Callable[[int], list[Model]], tower: PictureTower) -> Callable[[Asked], list[int]]:
    """Greedy tokens of the whole model without any cache."""
    (model,) = models(1)
    known: dict[tuple[Any, ...], list[int]] = {}

    def generate(asked: Asked) -> list[int]:
        key = (asked.ids, *(shown.picture.digest for shown in asked.pictures))
        if key not in known:
            ids = list(asked.ids)
            for _ in range(NEW):
                h = embedded(model, tower, Asked(tuple(ids), asked.pictures))
                out = model.forward_ragged(h, [(len(ids), model.make_cache())])
                ids.append(int(mx.argmax(model.logits(out[-1:])[0]).item()))
            known[key] = ids[len(asked.ids) :]
        return known[key]

    return generate


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_logits_are_those_of_transformers(
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    theirs: Any,
    place: str,
    stages: int,
) -> None:
    import torch

    asked = prompt_of(vision_checkpoint, *PLACES[place])
    with torch.no_grad():
        expected = (
            theirs(
                input_ids=torch.tensor(asked.ids)[None],
                pixel_values=torch.tensor(np.concatenate([patches_of(shown.picture) for shown in asked.pictures])),
                image_grid_thw=torch.tensor([[1, p.picture.grid.rows, p.picture.grid.columns] for p in asked.pictures]),
                use_cache=False,
            )
            .logits[0]
            .numpy()
        )
    chain = models(stages)
    h = embedded(chain[0], tower, asked)
    for model in chain:
        h = model.forward_ragged(h, [(len(asked.ids), model.make_cache())])
    found = np.array(chain[-1].logits(h))
    assert np.abs(found - expected).max() <= BAR * expected.std()
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


def pipeline_of(
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    stages: int,
    capacity: int,
    open_disk: OpenDisk | None = None,
) -> InlinePipeline:
    return InlinePipeline(
        lambda: models(stages),
        stages=stages,
        context=4096,
        kv_capacity_tokens=capacity,
        cache_step=16,
        load_tower=lambda: tower,
        open_disk=open_disk,
    )


async def ask(engine: Engine, asked: Asked, max_tokens: int = NEW) -> list[TokenEvent]:
    request = GenerationRequest(
        request_id=str(id(asked)),
        prompt_ids=asked.ids,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0, seed=1),
        pictures=asked.pictures,
    )
    return [event async for event in engine.generate(request)]


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("prefill_chunk", [3, 7, 64])
async def test_chunks_that_cut_pictures_change_no_token(
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    answer: Callable[[Asked], list[int]],
    stages: int,
    prefill_chunk: int,
) -> None:
    prompts = [prompt_of(vision_checkpoint, *parts) for parts in PLACES.values()]
    pipeline = pipeline_of(models, tower, stages, capacity=4096)
    async with Engine(pipeline, prefill_chunk=prefill_chunk, prefixes=PrefixOptions(memory_bytes=0)) as engine:
        found = [ids(await ask(engine, asked)) for asked in prompts]
    assert found == [answer(asked) for asked in prompts]


async def test_pictures_go_in_one_step_beside_text_and_survive_preemption_and_faults(
    monkeypatch: pytest.MonkeyPatch,
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    answer: Callable[[Asked], list[int]],
) -> None:
    prompts = [prompt_of(vision_checkpoint, *parts) for parts in PLACES.values()]
    prompts += [prompt_of(vision_checkpoint, 30, seed=9), prompt_of(vision_checkpoint, 12, seed=8)]
    answers, preempted, resumed = [], [], []
    real, steps = inline.run_chain, count(1)

    def failing(workers: Sequence[StageWorker], step: Step) -> StepResult:
        if next(steps) % 40 == 0:
            raise StageDiedError("gone")
        return real(workers, step)

    for capacity, run_chain in ((4096, real), (128, real), (4096, failing)):
        monkeypatch.setattr(inline, "run_chain", run_chain)
        pipeline = pipeline_of(models, tower, 2, capacity=capacity)
        options = {"prefill_chunk": 24, "survive_s": 60}
        async with Engine(pipeline, prefixes=PrefixOptions(memory_bytes=0), **options) as engine:
            found = await asyncio.gather(*(ask(engine, asked, max_tokens=50) for asked in prompts))
            preempted.append(engine.snapshot().preemptions_total)
            resumed.append(engine.snapshot().requests_resumed_total)
        answers.append([ids(events) for events in found])
    assert [tokens[:NEW] for tokens in answers[0]] == [answer(asked) for asked in prompts]
    assert answers[1] == answers[2] == answers[0]
    assert preempted[0] == 0 < preempted[1]
    assert resumed[:2] == [0, 0] < resumed[2:]


async def test_text_alone_is_the_same_work_with_a_tower_and_without(
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same frames between the stages byte for byte, the same answers, and the same kernels: so the same speed."""
    prompts = [prompt_of(vision_checkpoint, length, seed=length) for length in (5, 33, 70)]
    found = []
    execute = StageWorker.execute
    for seeing in (tower, None):
        frames: list[Any] = []

        def told(worker: StageWorker, step: Step, frames: list[Any] = frames) -> Any:
            header, parts = encode_step(step)
            frames.append((str(header), [bytes(part) for part in parts]))
            return execute(worker, step)

        monkeypatch.setattr(StageWorker, "execute", told)
        pipeline = pipeline_of(models, tower, 2, capacity=4096)
        if seeing is None:
            monkeypatch.setattr(pipeline, "_load_tower", None)
        with recorded(monkeypatch) as kernels:
            async with Engine(pipeline, prefill_chunk=24, prefixes=PrefixOptions()) as engine:
                answers = [ids(await ask(engine, asked)) for asked in prompts]
        found.append((answers, frames, kernels))
    assert len(found[0][1]) > 20
    assert found[0] == found[1]


async def test_another_picture_of_the_same_size_is_never_taken_for_the_first(
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    answer: Callable[[Asked], list[int]],
) -> None:
    one, other = (prompt_of(vision_checkpoint, 20, picture, 20) for picture in (ONE, SAME_SIZE))
    assert one.ids == other.ids
    assert answer(one) != answer(other)
    async with Engine(
        pipeline_of(models, tower, 2, capacity=4096), prefill_chunk=64, prefixes=PrefixOptions()
    ) as engine:
        first, second, again = [await ask(engine, asked) for asked in (one, other, one)]
    assert [ids(first), ids(second), ids(again)] == [answer(one), answer(other), answer(one)]
    assert [events[0].cached_tokens for events in (first, second)] == [0, 20]
    assert again[0].cached_tokens == len(one.ids) - 1


async def test_a_second_turn_about_a_picture_does_not_run_the_tower(
    vision_checkpoint: Path, models: Callable[[int], list[Model]], answer: Callable[[Asked], list[int]]
) -> None:
    fresh = PictureTower(load_vision(vision_checkpoint, dtype="float32"))
    asked = prompt_of(vision_checkpoint, 20, ONE, 20)
    async with Engine(
        pipeline_of(models, fresh, 2, capacity=4096), prefill_chunk=7, prefixes=PrefixOptions()
    ) as engine:
        first = ids(await ask(engine, asked))
        assert fresh.runs == 1
        turn = Asked((*asked.ids, *first, 5, 6, 7), asked.pictures)
        second = await ask(engine, turn)
    assert ids(second) == answer(turn)
    assert second[0].cached_tokens == len(asked.ids) + NEW - 1
    assert fresh.runs == 1


async def test_prefixes_on_disk_know_the_picture_after_a_restart(
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    answer: Callable[[Asked], list[int]],
    tmp_path: Path,
) -> None:
    one, other = (prompt_of(vision_checkpoint, 40, picture, 40) for picture in (ONE, SAME_SIZE))

    def open_disk(stage: int, model: StageModel, changed: Changed) -> PrefixDisk:
        return PrefixDisk(tmp_path, f"2{stage}" * 16, block_bytes=1000, disk_bytes=1 << 20, changed=changed)

    found = []
    for asked in (one, one, other):
        pipeline = pipeline_of(models, tower, 2, capacity=4096, open_disk=open_disk)
        async with Engine(pipeline, prefill_chunk=64, prefixes=PrefixOptions()) as engine:
            events = await ask(engine, asked)
            found.append((ids(events), events[0].cached_tokens))
            while engine.snapshot().disk_blocks < len(asked.ids) // 16:
                await asyncio.sleep(0.01)
    assert [tokens for tokens, _ in found] == [answer(one), answer(one), answer(other)]
    # Blocks of 16: all whole ones of the same picture, of the other one those before it.
    assert [cached for _, cached in found] == [0, (len(one.ids) - 1) // 16 * 16, 40 // 16 * 16]


async def test_prefixes_on_disk_know_the_tower_that_saw_the_picture(
    vision_checkpoint: Path, models: Callable[[int], list[Model]], tmp_path: Path
) -> None:
    """The text model's weights name the caches' directory, and they are the same beside every tower."""
    other = VisionModel(load_vision(vision_checkpoint, dtype="float32").config)
    rng = np.random.default_rng(8)
    shapes = {name: value.shape for name, value in tree_flatten(other.parameters())}
    other.load_weights([(name, mx.array(rng.normal(0, 0.2, shape), mx.float32)) for name, shape in shapes.items()])
    towers = {"one": load_vision(vision_checkpoint, dtype="float32"), "other": other}
    found = {}

    def open_disk(stage: int, text: StageModel, changed: Changed) -> PrefixDisk:
        return PrefixDisk(tmp_path, f"3{stage}" * 16, block_bytes=1000, disk_bytes=1 << 20, changed=changed)

    for kept in (True, False):
        for name, model in towers.items():
            asked = prompt_of(vision_checkpoint, 40, Picture.of(ONE.grid, ONE.pixels, tower=name), 40)

            pipeline = pipeline_of(models, PictureTower(model), 2, capacity=4096, open_disk=open_disk if kept else None)
            async with Engine(pipeline, prefill_chunk=64, prefixes=PrefixOptions()) as engine:
                events = await ask(engine, asked)
                found[kept, name] = ids(events)
                assert events[0].cached_tokens == (32 if kept and name == "other" else 0)
                while kept and engine.snapshot().disk_blocks < len(asked.ids) // 16:
                    await asyncio.sleep(0.01)
    assert found[True, "one"] == found[False, "one"]
    assert found[True, "other"] == found[False, "other"] != found[False, "one"]


async def test_guesses_change_no_token_about_pictures(
    vision_checkpoint: Path,
    models: Callable[[int], list[Model]],
    tower: PictureTower,
    answer: Callable[[Asked], list[int]],
) -> None:
    drafter = Drafter.of(4, bytes_of_manifest(Checkpoint(vision_checkpoint).manifest()))
    prompts = [prompt_of(vision_checkpoint, *parts) for parts in PLACES.values()]
    pipeline = pipeline_of(models, tower, 2, capacity=4096)
    async with Engine(pipeline, prefill_chunk=16, drafter=drafter) as engine:
        found = await asyncio.gather(*(ask(engine, asked) for asked in prompts))
    assert [ids(events) for events in found] == [answer(asked) for asked in prompts]


def test_the_stages_are_those_of_the_checkpoint() -> None:
    assert all(bounds[-1] == LAYERS for bounds in BOUNDS.values())
