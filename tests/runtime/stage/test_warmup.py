"""Warm-up: after it, the first requests ask for no kernel that was not asked for before; nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.vision import Grid
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.checkpoint.vision import VisionManifest, find_vision
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.pictures.picture import Picture
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.loading.vision import load_vision
from exo_kimi.runtime.protocol.frames import Message
from exo_kimi.runtime.protocol.messages import Loaded
from exo_kimi.runtime.requests import GenerationRequest, PromptPicture, SamplingParams
from exo_kimi.runtime.stage.backend import CheckpointLayers, MlxBackend
from exo_kimi.runtime.stage.compute_thread import Order, StageCompute, StageStatus
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.pictures import PictureTower
from exo_kimi.runtime.stage.prefix_disk import Changed, PrefixDisk
from exo_kimi.runtime.stage.stage_model import StageModel
from exo_kimi.runtime.stage.warmup import LAYERS_AT_ONCE, warm_up
from exo_kimi.runtime.stage.worker import StageWorker
from tests.runtime.stage.kernels import Kernel, recorded

pytestmark = pytest.mark.timeout(600)
# Widths that no class of token counts shares.
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 40}
SHAPE |= {"num_attention_heads": 4, "num_hidden_layers": 3, "kv_lora_rank": 64, "q_lora_rank": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("warm") / "tiny"
    return make_tiny(directory, vision=True, seed=3, config=SHAPE, template="k25")


def stages_of(checkpoint: Path, bounds: list[int], kv_bits: int | None) -> tuple[list[Model], PictureTower]:
    models = [load(checkpoint, a, b, dtype="float32", fuse=True) for a, b in pairwise(bounds)]
    for model in models:
        model.set_kv_bits(kv_bits)
    return models, PictureTower(load_vision(checkpoint, dtype="float32"))


def first_requests(checkpoint: Path) -> dict[str, list[GenerationRequest]]:
    """Ten kinds of requests; those of one kind come at once."""
    rng = np.random.default_rng(5)
    pad = Checkpoint(checkpoint).raw_config["media_placeholder_token_id"]
    greedy = SamplingParams(temperature=0.0)

    def ask(name: str, prompt: list[int], sampling: SamplingParams = greedy, **more: Any) -> GenerationRequest:
        return GenerationRequest(request_id=name, prompt_ids=tuple(prompt), max_tokens=12, sampling=sampling, **more)

    def words(count: int) -> list[int]:
        return rng.integers(0, 500, count).tolist()

    long, told = words(700), words(40)
    grid = Grid(1, 10, 8)
    pixels = rng.integers(0, 256, grid.patches * 14 * 14 * 3, np.uint8).tobytes()
    shown = PromptPicture(7, 20, Picture.of(grid, pixels))
    return {
        "one token": [ask("a", words(1))],
        "a sentence": [ask("b", words(12))],
        "a page, in chunks": [ask("c", long)],
        "the page again, from its prefix": [ask("d", [*long, *words(9)])],
        "drawn": [ask("e", words(30), SamplingParams(temperature=0.8, top_p=0.9, seed=4))],
        "penalties and log-probabilities": [
            ask("f", words(25), replace(greedy, repetition_penalty=1.2, logprobs=True, top_logprobs=3))
        ],
        "what can be guessed": [ask("g", told * 4)],
        "many at once": [ask(f"h{n}", words(4 + n)) for n in range(14)],
        "a page beside sentences": [ask(f"i{n}", words(count)) for n, count in enumerate((400, 6, 90, 33))],
        "a picture": [ask("j", [*words(7), *[pad] * 20, *words(5)], pictures=(shown,))],
    }


@pytest.mark.parametrize(("bounds", "kv_bits"), [([0, 3], None), ([0, 1, 3], 8)], ids=["one stage", "two, 8 bits"])
async def test_the_first_requests_ask_for_no_new_kernel(
    checkpoint: Path, bounds: list[int], kv_bits: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models, tower = stages_of(checkpoint, bounds, kv_bits)
    with recorded(monkeypatch) as warmed:
        for index, model in enumerate(models):
            worker = StageWorker(model, epoch=0, stage=index, tower=tower if index == 0 else None)
            warm_up(worker, model, after=lambda _: None)

    def open_disk(stage: int, model: StageModel, changed: Changed) -> PrefixDisk:
        return PrefixDisk(tmp_path, f"4{stage}" * 16, block_bytes=100_000, disk_bytes=1 << 24, changed=changed)

    pipeline = InlinePipeline(
        lambda: models,
        stages=len(models),
        context=4096,
        kv_capacity_tokens=40_000,
        cache_step=256,
        load_tower=lambda: tower,
        open_disk=open_disk,
    )
    drafter = Drafter.of(4, bytes_of_manifest(Checkpoint(checkpoint).manifest()))
    new: dict[str, set[Kernel]] = {}
    async with Engine(pipeline, prefill_chunk=256, prefixes=PrefixOptions(), drafter=drafter) as engine:
        for kind, requests in first_requests(checkpoint).items():
            with recorded(monkeypatch) as asked:
                await asyncio.gather(*(_drain(engine, request) for request in requests))
            assert len(asked) > 20, kind
            new[kind] = asked - warmed
    assert not any(new.values()), {kind: sorted(map(str, kernels))[:8] for kind, kernels in new.items() if kernels}


async def _drain(engine: Engine, request: GenerationRequest) -> None:
    async for _ in engine.generate(request):
        pass


def test_without_it_they_would(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: of a warm-up that only decodes, a chunk of a prompt asks for more."""
    (model,), _ = stages_of(checkpoint, [0, 3], None)

    def run(length: int) -> set[Kernel]:
        with recorded(monkeypatch) as found:
            caches = model.make_cache()
            mx.eval(model.forward_ragged(mx.zeros((length,), mx.int32), [(length, caches)]))
        return found

    once = run(1)
    assert run(1) <= once
    assert run(96) - once


def test_nothing_of_it_is_left_and_it_goes_a_few_layers_at_a_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (model,), tower = stages_of(checkpoint, [0, 3], None)
    widest: list[int] = []
    part: Callable[..., Model] = Model.part
    monkeypatch.setattr(Model, "part", lambda self, first, last: widest.append(last - first) or part(self, first, last))
    worker = StageWorker(model, epoch=0, stage=0, tower=tower)
    tokens = mx.array(np.arange(40, dtype=np.int32))

    def logits() -> np.ndarray[Any, Any]:
        return np.array(model.logits(model.forward_ragged(tokens, [(40, model.make_cache())])))

    answered = logits()
    before_bytes = mx.get_active_memory()
    told: list[int] = []
    passes = warm_up(worker, model, after=told.append)
    assert told == list(range(1, passes + 1))
    assert not caplog.records
    assert widest == [LAYERS_AT_ONCE, 1]
    assert mx.get_active_memory() - before_bytes < 1 << 20
    assert mx.get_cache_memory() == 0
    assert (worker.sequences, worker.kv_nbytes, worker.epoch) == (0, 0, 0)
    assert np.array_equal(logits(), answered)


def test_a_stage_says_that_it_warms_up_and_does_it_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    index = Checkpoint(checkpoint)
    tower = find_vision(index.index)
    assert isinstance(tower, VisionManifest)
    order = make_plan(index, split="2,1", vision=tower).stages[0].load
    backend = MlxBackend(CheckpointLayers(None, alone=True), warms=True)
    status = StageStatus(free=backend.free())
    states: list[str] = []
    warm = backend.warm_up
    backend.warm_up = lambda after: warm(lambda done: (after(done), states.append(status.state))[0])  # type: ignore[method-assign]
    posted: list[Message] = []
    orders: SimpleQueue[Order] = SimpleQueue()
    for each in (order, order, None):
        orders.put(each)
    StageCompute(backend, status, posted.append).run(orders)
    assert len(states) > 50 and set(states) == {"warming"}
    assert status.state == "loading"
    assert [type(message) for message in posted] == [Loaded, Loaded]
    assert len([record for record in caplog.records if "is warm" in record.message]) == 1
