"""A draft head beside a real tiny Kimi: the tokens are those of plain decoding, and the head's cache holds true entries only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models import ops
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.models.mla import Span
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.engine.draft_policy import HeadPolicy
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter, StepBytes
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.stage.drafting import DraftRunner, DraftState
from exo_kimi.runtime.stage.inline import InlinePipeline
from exo_kimi.runtime.stage.prefix_disk import PrefixDisk
from exo_kimi.runtime.stage.stage_model import StageModel

pytestmark = pytest.mark.timeout(120)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
}
BOUNDS = {1: [0, 7], 2: [0, 4, 7], 3: [0, 1, 3, 7]}
LAYERS = (0, 3, 5)
GREEDY = SamplingParams(temperature=0.0)
ANY_BYTES = StepBytes(shared_bytes=1, expert_bytes=1, experts=8, experts_per_token=2, kv_token_bytes=1)
LENGTHS = (1, 40, 7, 90, 23)
NEW = 24


class TableHead:
    """Guesses what a table says of the newest token. Its cache holds, for each entry, the token and the sum of its features."""

    def __init__(self, follows: dict[int, int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        table = np.full(vocab_size, -1, np.int64)
        for token, after in follows.items():
            table[token] = after
        self.table = mx.array(table.astype(np.int32))

    def make_cache(self) -> list[Any]:
        return [KVCache()]

    def fuse(self, features: mx.array) -> mx.array:
        return features.sum(axis=1, keepdims=True)

    def __call__(
        self, token_ids: mx.array, hidden: mx.array, segments: Sequence[tuple[int, Sequence[Any]]]
    ) -> mx.array:
        start = 0
        for length, caches in segments:
            rows = slice(start, start + length)
            start += length
            keys = token_ids[rows].astype(mx.float32).reshape(1, 1, -1, 1)
            ops.append_to_cache(caches[0], keys, hidden[rows].reshape(1, 1, -1, 1))
        return mx.concatenate([token_ids.astype(mx.float32)[:, None], hidden], axis=1)

    def logits(self, out: mx.array) -> mx.array:
        after = mx.take(self.table, out[:, 0].astype(mx.int32))
        return (mx.arange(self.vocab_size)[None] == after[:, None]).astype(mx.float32) * 20

    def next_hidden(self, out: mx.array) -> mx.array:
        return out[:, 1:]

    def to_target_ids(self, draft_ids: mx.array) -> mx.array:
        return draft_ids


class Watched(DraftRunner):
    """A runner that remembers what it follows."""

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        super().__init__(model, vocab_size=vocab_size)
        self.states: list[DraftState] = []

    def begin(self, *, prompt_tokens: int) -> DraftState:
        state = super().begin(prompt_tokens=prompt_tokens)
        self.states.append(state)
        return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("drafting") / "tiny", dtype="F32", seed=3, config=SMALL)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Model:
    return exo_kimi.load(checkpoint, dtype="float32")


def prompt_of(index: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(index).integers(0, 500, length).tolist())


def request_of(
    index: int, length: int, new: int = NEW, sampling: SamplingParams = GREEDY, **more: Any
) -> GenerationRequest:
    prompt = more.pop("prompt_ids", None) or prompt_of(index, length)
    return GenerationRequest(request_id=str(index), prompt_ids=prompt, max_tokens=new, sampling=sampling, **more)


def follows_of(texts: Iterable[Sequence[int]]) -> dict[int, int]:
    """What stands after each token, the last time that it stands there."""
    return {token: after for text in texts for token, after in pairwise(text)}


Make = Callable[..., tuple[InlinePipeline, list[Watched]]]


@pytest.fixture
def pipeline_of(checkpoint: Path) -> Make:
    def make(
        stages: int = 2,
        *,
        follows: dict[int, int] | None = None,
        kv_bits: int | None = None,
        kv_capacity_tokens: int = 100 * CACHE_STEP,
        cache_step: int = CACHE_STEP,
        directory: Path | None = None,
    ) -> tuple[InlinePipeline, list[Watched]]:
        runners: list[Watched] = []

        def load() -> Sequence[StageModel]:
            models = [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise(BOUNDS[stages])]
            for model in models:
                model.set_kv_bits(kv_bits)
                model.fuse_projections()
            return models

        def load_drafts(model: StageModel) -> DraftRunner:
            vocab_size = model.args.vocab_size
            runners.append(Watched(TableHead(follows or {}, vocab_size), vocab_size=vocab_size))
            return runners[-1]

        def open_disk(stage: int, model: StageModel, changed: Any) -> PrefixDisk:
            assert directory is not None
            return PrefixDisk(
                directory, f"{stage:032x}", block_bytes=1 << 20, disk_bytes=1 << 30, changed=changed
            )

        pipeline = InlinePipeline(
            load,
            stages=stages,
            context=4096,
            kv_capacity_tokens=kv_capacity_tokens,
            cache_step=cache_step,
            open_disk=open_disk if directory is not None else None,
            feature_layers=LAYERS if follows is not None else (),
            load_drafts=load_drafts if follows is not None else None,
        )
        return pipeline, runners

    return make


def drafter_of(tokens: int, *, lookups: bool = False) -> Drafter:
    head = HeadPolicy.of(tokens, draft_bytes=1)
    return Drafter(step_bytes=ANY_BYTES, lookups=lookups, always=lookups, limit=4, head=head)


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def generate(
    pipeline: InlinePipeline, requests: Sequence[GenerationRequest], *, together: bool = True, **options: Any
) -> tuple[list[list[TokenEvent]], EngineSnapshot]:
    async with Engine(pipeline, **options) as engine:
        if together:
            events = list(await asyncio.gather(*(collect(engine, r) for r in requests)))
        else:
            events = [await collect(engine, r) for r in requests]
        return events, engine.snapshot()


def ids(events: Iterable[Sequence[TokenEvent]]) -> list[list[int]]:
    return [[event.token_id for event in one] for one in events]


def features(model: Model, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """The sum of all features of each position, layer by layer without a cache."""
    h = model.model.embed_tokens(mx.array(tokens))
    positions, total = mx.arange(len(tokens), dtype=mx.int32), mx.zeros(len(tokens))
    for index, layer in enumerate(model.layers):
        total = total + h.sum(axis=1) if index in LAYERS else total
        h = layer(h, positions, [Span(1, len(tokens), "causal")], [None])
    return np.asarray(total)


def check_entries(whole: Model, runners: Sequence[Watched], texts: Iterable[Sequence[int]]) -> int:
    """Every entry that a head's caches hold is the true one; how many there were."""
    oracle = {tuple(text): features(whole, text) for text in texts}
    checked = 0
    for state in [state for runner in runners for state in runner.states]:
        cache, count = state.caches[0], state.entered
        if not count:
            continue
        keys, values = (np.asarray(side)[0, 0, :count, 0] for side in (cache.keys, cache.values))
        tokens = keys.astype(int).tolist()
        text = next((text for text in oracle if list(text[1 : 1 + count]) == tokens), None)
        assert text is not None, f"entries of tokens that nobody was given: {tokens}"
        np.testing.assert_allclose(values, oracle[text][:count], atol=2e-3)
        checked += count
    return checked


@pytest.fixture(scope="module")
def plain(whole: Model) -> list[list[int]]:
    """Greedy tokens of the whole model with no cache, one request after the other."""
    found = []
    for index, length in enumerate(LENGTHS):
        tokens = list(prompt_of(index, length))
        for _ in range(NEW):
            tokens.append(int(mx.argmax(whole(mx.array([tokens]))[0, -1]).item()))
        found.append(tokens[length:])
    return found


@pytest.fixture(scope="module")
def follows(plain: list[list[int]]) -> dict[int, int]:
    return follows_of([[*prompt_of(i, n)[-1:], *plain[i]] for i, n in enumerate(LENGTHS)])


@pytest.mark.parametrize(
    ("stages", "tokens", "chunk", "together"),
    [
        (1, 1, 512, True),
        (1, 2, 16, False),
        (1, 3, 512, True),
        (1, 6, 512, False),
        (2, 1, 7, True),
        (2, 3, 512, True),
        (2, 5, 33, False),
        (3, 2, 512, True),
        (3, 4, 5, True),
        (3, 6, 512, False),
    ],
)
async def test_a_head_changes_no_greedy_token(
    whole: Model,
    pipeline_of: Make,
    plain: list[list[int]],
    follows: dict[int, int],
    stages: int,
    tokens: int,
    chunk: int,
    together: bool,
) -> None:
    requests = [request_of(i, length) for i, length in enumerate(LENGTHS)]
    pipeline, runners = pipeline_of(stages, follows=follows)
    events, snapshot = await generate(
        pipeline, requests, together=together, drafter=drafter_of(tokens), prefill_chunk=chunk
    )
    assert ids(events) == plain
    tries, hits = zip(*snapshot.head_drafts_by_position, strict=True)
    assert hits[0] > 10 and not any(tries[tokens:]), "guesses are right now and then, and never more than asked for"
    assert tries[0] > hits[0], "and wrong now and then"
    assert snapshot.steps_total < sum(len(one) for one in plain) + sum(LENGTHS)
    texts = [[*prompt_of(i, n), *plain[i]] for i, n in enumerate(LENGTHS)]
    assert check_entries(whole, runners, texts) > sum(LENGTHS)
    accepted = sum(one[-1].accepted_drafts for one in events)
    assert accepted == snapshot.draft_tokens_accepted_total >= sum(hits) - len(LENGTHS) * tokens
