"""Several adapters in one engine: every row says what the fused model says, whatever else is in its step, stage or cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.adapters.config import FineTuneType
from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.experts.budget import ExpertCache
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.ops import CACHE_STEP
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter
from exo_kimi.runtime.loading.adapters import adapted_view
from exo_kimi.runtime.loading.loader import load_stage
from exo_kimi.runtime.prefix_key import block_keys, mark_adapter
from exo_kimi.runtime.requests import GenerationRequest, SamplingParams, ServedAdapter, TokenEvent
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.stage_model import AdaptedModels, StageModel
from exo_kimi.train.lora.recipe import DEFAULT_KEYS
from tests.runtime.adapters import KV_B, fused_model, write_random
from tests.train.lora.conftest import SHAPE

LAYERS = 4
BOUNDS = {1: [0, 4], 2: [0, 1, 4], 3: [0, 1, 3, 4]}
NEW = 12
GREEDY = SamplingParams(temperature=0.0)
Names = tuple[str | None, ...]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**SHAPE, "num_hidden_layers": LAYERS}
    return make_tiny(tmp_path_factory.mktemp("adapters") / "base", layout="bf16", dtype="F32", config=config, shards=1)


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterManifest]:
    folder = tmp_path_factory.mktemp("made")
    made = {
        "pirate": write_random(folder / "pirate", checkpoint, seed=1),
        "poet": write_random(folder / "poet", checkpoint, seed=2, kind="dora", written_as="peft", rank=3),
        "monk": write_random(folder / "monk", checkpoint, seed=3, keys=(*DEFAULT_KEYS, KV_B, "mlp.gate_proj")),
    }
    return {name: resolve_adapter(path, Checkpoint(checkpoint)) for name, path in made.items()}


@pytest.fixture(scope="module")
def answer(
    checkpoint: Path, adapters: Mapping[str, AdapterManifest]
) -> Callable[[Sequence[int], str | None], list[int]]:
    """Greedy tokens of the fused models, each prompt alone and without a cache."""
    models = {name: fused_model(checkpoint, adapters.get(name or "")) for name in (None, *adapters)}
    known: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}

    def tokens(prompt: Sequence[int], name: str | None) -> list[int]:
        key = (name, tuple(prompt))
        if key not in known:
            made = list(prompt)
            for _ in range(NEW):
                made.append(int(mx.argmax(models[name](mx.array([made]))[0, -1]).item()))
            known[key] = made[len(prompt) :]
        return known[key]

    return tokens


def pipeline_of(
    checkpoint: Path, adapters: Mapping[str, AdapterManifest], stages: int, *, fuse: bool, kv_bits: int | None = None
) -> InlinePipeline:
    def load() -> Sequence[StageModel]:
        models = []
        for start, end in pairwise(BOUNDS[stages]):
            model = exo_kimi.load(checkpoint, start, end, dtype="float32", fuse=fuse)
            model.set_kv_bits(kv_bits)
            models.append(model)
        return models

    def adapted(model: Any) -> Mapping[str, Model]:
        return {name: adapted_view(model, each) for name, each in adapters.items()}

    return InlinePipeline(
        load,
        stages=stages,
        context=4096,
        kv_capacity_tokens=60 * CACHE_STEP,
        cache_step=CACHE_STEP,
        load_adapted=adapted,
    )


def request_of(
    prompt: Sequence[int], adapter: AdapterManifest | None, name: str | None, sampling: SamplingParams = GREEDY
) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"{name} {len(prompt)}",
        prompt_ids=tuple(prompt),
        max_tokens=NEW,
        sampling=sampling,
        adapter=None if adapter is None or name is None else ServedAdapter(name=name, fingerprint=adapter.fingerprint),
    )


async def said(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


PROMPTS = [list(range(5, 5 + length)) for length in (3, 30, 61, 9)]
NAMES: Names = (None, "pirate", "poet", "monk")


@pytest.mark.parametrize(("stages", "fuse"), [(1, True), (2, False), (3, True)])
async def test_mixed_batches_say_what_each_fused_model_says(
    checkpoint: Path,
    adapters: Mapping[str, AdapterManifest],
    answer: Callable[[Sequence[int], str | None], list[int]],
    stages: int,
    fuse: bool,
) -> None:
    asked = [(prompt, name) for prompt in PROMPTS[: 3 if fuse else 2] for name in NAMES]
    assert len({tuple(answer(PROMPTS[0], name)) for name in NAMES}) == len(NAMES), "adapters change what is said"
    async with Engine(
        pipeline_of(checkpoint, adapters, stages, fuse=fuse), prefixes=PrefixOptions(), prefill_chunk=24
    ) as engine:
        found = await asyncio.gather(*(said(engine, request_of(p, adapters.get(n or ""), n)) for p, n in asked))
    for (prompt, name), events in zip(asked, found, strict=True):
        assert ids(events) == answer(prompt, name), (name, len(prompt))


async def test_guesses_change_no_token_of_an_adapter(checkpoint: Path, adapters: Mapping[str, AdapterManifest]) -> None:
    loud = SamplingParams(temperature=1.0, seed=7, logit_bias=tuple((token, 30.0) for token in (5, 6, 7, 8)))
    prompt, found, accepted = [5, 6, 7, 8] * 8, [], 0
    drafter = Drafter.of(4, bytes_of_manifest(Checkpoint(checkpoint).manifest()))
    for used in (None, drafter):
        async with Engine(pipeline_of(checkpoint, adapters, 2, fuse=True), drafter=used) as engine:
            requests = [request_of(prompt, adapters.get(n or ""), n, loud) for n in NAMES]
            found.append([ids(events) for events in await asyncio.gather(*(said(engine, r) for r in requests))])
            accepted = engine.snapshot().draft_tokens_accepted_total
    assert found[1] == found[0]
    assert accepted > 4


async def test_8_bit_caches_say_the_same_as_the_model_with_the_adapter_in_its_weights(
    checkpoint: Path, adapters: Mapping[str, AdapterManifest]
) -> None:
    name = "pirate"
    fused = fused_model(checkpoint, adapters[name])
    fused.set_kv_bits(8)
    fused.fuse_projections()
    caches, made = fused.make_cache(), list(PROMPTS[1])
    hidden = fused.forward_ragged(mx.array(made), [(len(made), caches)])[-1:]
    for _ in range(NEW):
        made.append(int(mx.argmax(fused.logits(hidden)[0]).item()))
        hidden = fused.forward_ragged(mx.array(made[-1:]), [(1, caches)])
    async with Engine(pipeline_of(checkpoint, adapters, 2, fuse=True, kv_bits=8)) as engine:
        events, _ = await asyncio.gather(
            said(engine, request_of(PROMPTS[1], adapters[name], name)), said(engine, request_of(PROMPTS[2], None, None))
        )
    assert ids(events) == made[len(PROMPTS[1]) :]


async def test_no_prefix_is_shared_between_adapters(
    checkpoint: Path,
    adapters: Mapping[str, AdapterManifest],
    answer: Callable[[Sequence[int], str | None], list[int]],
) -> None:
    prompt = PROMPTS[2]
    async with Engine(pipeline_of(checkpoint, adapters, 2, fuse=True), prefixes=PrefixOptions()) as engine:
        for name in NAMES:
            first = await said(engine, request_of(prompt, adapters.get(name or ""), name))
            assert first[-1].cached_tokens == 0 and ids(first) == answer(prompt, name)
        for name in NAMES:
            again = await said(engine, request_of(prompt, adapters.get(name or ""), name))
            assert again[-1].cached_tokens > 50 and ids(again) == answer(prompt, name)


def test_blocks_on_disk_have_other_names_with_an_adapter() -> None:
    tokens = np.arange(64)
    keys = [
        block_keys(tokens, 16),
        block_keys(mark_adapter(tokens.copy(), "a" * 64), 16),
        block_keys(mark_adapter(tokens.copy(), "b" * 64), 16),
    ]
    assert len({key for each in keys for key in each}) == 3 * 4
    assert block_keys(mark_adapter(tokens.copy(), "a" * 64), 16) == keys[1]
    assert mark_adapter(tokens[:0].copy(), "a").size == 0


class Counting:
    """A model that counts its passes."""

    def __init__(self, model: Model) -> None:
        self.model, self.passes, self.is_last, self.start_layer, self.args = model, 0, True, 0, model.args
        self.end_layer = LAYERS

    def forward_ragged(self, *given: Any, **options: Any) -> mx.array:
        self.passes += 1
        return self.model.forward_ragged(*given, **options)


def test_a_step_without_adapters_is_one_pass_through_the_base_itself(
    checkpoint: Path, adapters: Mapping[str, AdapterManifest]
) -> None:
    model = exo_kimi.load(checkpoint, dtype="float32", fuse=True)
    base, other = Counting(model), Counting(adapted_view(model, adapters["pirate"]))
    models = AdaptedModels(base, {"pirate": other})  # type: ignore[arg-type, dict-item]
    segments = [(1, model.make_cache()) for _ in range(3)]
    models.forward(mx.array([5, 6, 7]), segments, [None] * 3, feature_layers=())
    assert (base.passes, other.passes) == (1, 0)
    models.forward(mx.array([5, 6, 7]), segments, ["pirate", None, "pirate"], feature_layers=())
    assert (base.passes, other.passes) == (2, 1)


def test_a_view_shares_every_array_and_keeps_fast_paths_where_nothing_is_adapted(
    checkpoint: Path, adapters: Mapping[str, AdapterManifest], tmp_path: Path
) -> None:
    model = exo_kimi.load(checkpoint, dtype="float32", fuse=True)
    mx.clear_cache()
    before = mx.get_active_memory()
    view = adapted_view(model, adapters["pirate"])
    grown = mx.get_active_memory() - before
    assert grown <= 2 * adapters["pirate"].bytes_within(0, LAYERS) + 2**16
    assert view.layers[1].mlp.switch_mlp is model.layers[1].mlp.switch_mlp
    assert view.layers[1].mlp.gate is model.layers[1].mlp.gate
    assert view.layers[0].mlp is model.layers[0].mlp
    assert not model.layers[1].self_attn.adapted and model.layers[1].self_attn.fused is not None
    only_out = resolve_adapter(
        write_random(tmp_path / "out", checkpoint, seed=5, keys=("self_attn.o_proj",)), Checkpoint(checkpoint)
    )
    narrow = adapted_view(model, only_out)
    assert narrow.layers[1].self_attn.fused is model.layers[1].self_attn.fused
    assert not narrow.layers[1].self_attn.adapted


def spoken(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens by a prefill and decode steps."""
    caches, made = model.make_cache(), list(prompt)
    hidden = model.forward_ragged(mx.array(made), [(len(made), caches)])[-1:]
    for _ in range(count):
        made.append(int(mx.argmax(model.logits(hidden)[0]).item()))
        hidden = model.forward_ragged(mx.array(made[-1:]), [(1, caches)])
    return made[len(prompt) :]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layers_of_states_have_adapters_too(tmp_path: Path, kind: FineTuneType) -> None:
    base = make_tiny(tmp_path / "linear", layout="bf16", dtype="F32", family="linear", shards=1)
    keys = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "f_a", "f_b", "g_a", "g_b", "b"))
    adapter = resolve_adapter(write_random(tmp_path / "a", base, seed=1, kind=kind, keys=keys), Checkpoint(base))
    model = exo_kimi.load(base, dtype="float32", fuse=True)
    view = adapted_view(model, adapter)
    fused = fused_model(base, adapter)
    fused.fuse_projections()
    assert spoken(view, PROMPTS[1], 6) == spoken(fused, PROMPTS[1], 6) != spoken(model, PROMPTS[1], 6)


def test_experts_that_stay_on_disk_serve_an_adapter_of_the_others(
    tmp_path: Path,
) -> None:
    packed = make_tiny(tmp_path / "packed", layout="mlx", config={**SHAPE, "num_hidden_layers": LAYERS}, group_size=32)
    adapter = resolve_adapter(write_random(tmp_path / "a", packed, seed=1), Checkpoint(packed))
    manifest = Checkpoint(packed).manifest()
    whole = adapted_view(load_stage(manifest, dtype="float32", fuse=True), adapter)
    size = sum(each.resident_bytes for each in manifest.sources if each.spec.kind == "experts")
    cache = ExpertCache(budget_bytes=int(0.8 * size), prefetch="off")
    streamed = load_stage(manifest, dtype="float32", fuse=True, expert_cache=cache)
    assert streamed.streamed is not None
    assert spoken(adapted_view(streamed, adapter), PROMPTS[0], 6) == spoken(whole, PROMPTS[0], 6)
