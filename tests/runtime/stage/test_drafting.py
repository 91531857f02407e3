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
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models import ops
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.models.mla import Span
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.engine.draft_policy import HeadPolicy
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter, StepBytes
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.requests import EngineSnapshot, GenerationRequest, SamplingParams, TokenEvent
from exo_kimi.runtime.reserve import MOST_WAITING_ROWS
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
LENGTHS = (1, 40, 7)
NEW = 20


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

    def __init__(self, model: Any, *, vocab_size: int, most_waiting: int = MOST_WAITING_ROWS) -> None:
        super().__init__(model, vocab_size=vocab_size, most_waiting=most_waiting)
        self.states: list[DraftState] = []
        self.waited: list[int] = []

    def follow(self, *given: Any) -> Any:
        found = super().follow(*given)
        self.waited.append(sum(state.waiting for state in self._states))
        return found

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
        head: Path | None = None,
        most_waiting: int = MOST_WAITING_ROWS,
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
            if head is not None:
                assert isinstance(model, Model)
                loaded = load_draft_head(head, Checkpoint(checkpoint), model=model, dtype="float32")
                runners.append(Watched(loaded, vocab_size=vocab_size))
                return runners[-1]
            table = TableHead(follows or {}, vocab_size)
            runners.append(Watched(table, vocab_size=vocab_size, most_waiting=most_waiting))
            return runners[-1]

        def open_disk(stage: int, model: StageModel, changed: Any) -> PrefixDisk:
            assert directory is not None
            return PrefixDisk(directory, f"{stage:032x}", block_bytes=1 << 20, disk_bytes=1 << 30, changed=changed)

        layers = LAYERS if follows is not None else ()
        if head is not None:
            layers = resolve_draft(head).config.feature_layers(BOUNDS[1][-1])
        pipeline = InlinePipeline(
            load,
            stages=stages,
            context=4096,
            kv_capacity_tokens=kv_capacity_tokens,
            cache_step=cache_step,
            open_disk=open_disk if directory is not None else None,
            feature_layers=layers,
            load_drafts=load_drafts if layers else None,
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
    """Greedy tokens of the whole model with a cache, token by token."""
    found = []
    for index, length in enumerate(LENGTHS):
        cache, fed, tokens = whole.make_cache(), list(prompt_of(index, length)), list[int]()
        for _ in range(NEW):
            tokens.append(int(mx.argmax(whole(mx.array([fed]), cache)[0, -1]).item()))
            fed = tokens[-1:]
        found.append(tokens)
    return found


@pytest.fixture(scope="module")
def follows(plain: list[list[int]]) -> dict[int, int]:
    return follows_of([[*prompt_of(i, n)[-1:], *plain[i]] for i, n in enumerate(LENGTHS)])


@pytest.mark.parametrize(
    ("stages", "tokens", "chunk", "together"),
    [
        (1, 1, 512, True),
        (1, 2, 16, False),
        (1, 6, 512, True),
        (2, 3, 7, True),
        (2, 5, 33, False),
        (3, 4, 512, True),
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
    assert hits[0] > 5 and not any(tries[tokens:]), "guesses are right now and then, and never more than asked for"
    assert tries[0] > hits[0], "and wrong now and then"
    assert snapshot.steps_total < sum(len(one) for one in plain) + sum(LENGTHS)
    texts = [[*prompt_of(i, n), *plain[i]] for i, n in enumerate(LENGTHS)]
    assert check_entries(whole, runners, texts) > sum(LENGTHS)
    accepted = sum(one[-1].accepted_drafts for one in events)
    assert accepted == snapshot.draft_tokens_accepted_total >= sum(hits) - len(LENGTHS) * tokens


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "mla", "version": "3"},
        {"kind": "mha", "version": "3.1", "draft_vocab_size": 200, "own_embedding": False},
        {"kind": "mla", "version": "3.1", "own_embedding": False, "own_head": False},
        {"kind": "mha", "version": "3", "draft_vocab_size": 200},
    ],
)
async def test_heads_as_they_are_published(
    checkpoint: Path, pipeline_of: Make, plain: list[list[int]], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of random weights, so that hardly a guess is right; every one is a token that the head may draft, and none changes one."""
    head = make_tiny_draft(tmp_path / "head", Checkpoint(checkpoint).config, dtype="F32", **options)
    requests = [request_of(i, length) for i, length in enumerate(LENGTHS)]
    requests.append(request_of(3, 9, NEW, SamplingParams(temperature=0.8, seed=3)))
    (*_, sampled), _ = await generate(pipeline_of(2)[0], requests)
    pipeline, runners = pipeline_of(2, head=head)
    events, snapshot = await generate(pipeline, requests, drafter=drafter_of(3), prefill_chunk=16)
    assert ids(events) == [*plain, [event.token_id for event in sampled]]
    assert snapshot.draft_tokens_total > 3 * NEW and snapshot.head_undrafted_total == 0
    assert all(not state.caches[0].offset or state.caches[0].keys.dtype == mx.float32 for state in runners[0].states)


SAMPLINGS = (
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.2, top_p=0.9, seed=2, presence_penalty=0.7, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, top_k=20, min_p=0.01, seed=3, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, logit_bias=((5, 3.0), (6, -5.0)), repetition_penalty=1.2),
    SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3),
)


async def run_twice(
    pipeline_of: Make, requests: Sequence[GenerationRequest], *, stages: int = 2, tokens: int = 3, **options: Any
) -> tuple[list[list[TokenEvent]], list[list[TokenEvent]], EngineSnapshot, list[Watched]]:
    """Without a head, and with one that knows what comes; pipelines by `options["pipeline"]`, the rest to the engine."""
    made = options.pop("pipeline", {})
    pipeline, _ = pipeline_of(stages, **made)
    before, _ = await generate(pipeline, requests, **options)
    texts = [[request.prompt_ids[-1], *one] for request, one in zip(requests, ids(before), strict=True)]
    pipeline, runners = pipeline_of(stages, follows=follows_of(texts), **made)
    after, snapshot = await generate(pipeline, requests, drafter=drafter_of(tokens), **options)
    return before, after, snapshot, runners


async def test_samplings_penalties_biases_and_logprobs_are_those_of_plain_decoding(pipeline_of: Make) -> None:
    requests = [request_of(i, 9 + i, 24, sampling) for i, sampling in enumerate(SAMPLINGS)]
    before, after, snapshot, _ = await run_twice(pipeline_of, requests)
    assert ids(after) == ids(before)
    assert snapshot.draft_tokens_accepted_total > 10
    for ours, theirs in zip(after[4], before[4], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in ours.top_logprobs] == [token for token, _ in theirs.top_logprobs]


async def test_n_choices_of_one_prompt(whole: Model, pipeline_of: Make) -> None:
    """Each begins from a copy of what the first one computed, of the model's caches and of the head's."""
    prompt = prompt_of(2, 60)
    requests = [
        replace(request_of(i, 0, 20, SamplingParams(temperature=0.7, seed=i), prompt_ids=prompt)) for i in range(4)
    ]
    prefixes = {"prefixes": PrefixOptions()}
    before, after, snapshot, runners = await run_twice(pipeline_of, requests, pipeline={"cache_step": 16}, **prefixes)
    assert ids(after) == ids(before)
    assert snapshot.cached_tokens_total >= 3 * 59 - 3 and snapshot.head_undrafted_total == 0
    assert check_entries(whole, runners, [[*prompt, *one] for one in ids(after)]) > 4 * 60


async def test_8_bit_caches(pipeline_of: Make) -> None:
    requests = [request_of(i, length, 20) for i, length in enumerate(LENGTHS)]
    before, after, snapshot, _ = await run_twice(pipeline_of, requests, pipeline={"kv_bits": 8})
    assert ids(after) == ids(before)
    assert snapshot.draft_tokens_accepted_total > 10


async def test_preempted_sequences_and_a_cancelled_one(whole: Model, pipeline_of: Make) -> None:
    requests = [request_of(i, 12 + i, 36, SAMPLINGS[i]) for i in range(3)]
    tight = {"kv_capacity_tokens": 4 * 16, "cache_step": 16}
    before, after, snapshot, runners = await run_twice(
        pipeline_of, requests, stages=3, pipeline=tight, prefill_chunk=7, prefixes=PrefixOptions()
    )
    assert ids(after) == ids(before)
    assert snapshot.preemptions_total > 0 and snapshot.head_undrafted_total == 0
    check_entries(whole, runners, [[*r.prompt_ids, *one] for r, one in zip(requests, ids(after), strict=True)])
    pipeline, _ = pipeline_of(2, follows=follows_of(ids(after)))
    async with Engine(pipeline, drafter=drafter_of(3)) as engine:
        talking = engine.generate(request_of(0, 10, 3000))
        for _ in range(5):
            await anext(talking)
        await talking.aclose()
        while any(stage.sequences or stage.kv_bytes for stage in engine.snapshot().stages):
            await asyncio.sleep(0.01)


async def test_a_conversation_that_goes_on_and_one_that_begins_alike(whole: Model, pipeline_of: Make) -> None:
    """Caches taken over and copied, in memory: the head goes on from true entries, and loses nothing."""
    first = request_of(7, 50, 20)
    pipeline, _ = pipeline_of(2)
    (said,), _ = await generate(pipeline, [first])
    turn = (*first.prompt_ids, *(event.token_id for event in said), *prompt_of(8, 9))
    requests = [
        first,
        request_of(8, 0, 20, prompt_ids=turn),
        request_of(9, 0, 20, prompt_ids=(*turn[:40], *prompt_of(9, 7))),
    ]
    options = {"together": False, "prefixes": PrefixOptions()}
    before, after, snapshot, runners = await run_twice(pipeline_of, requests, pipeline={"cache_step": 16}, **options)
    assert ids(after) == ids(before)
    assert after[1][-1].cached_tokens == before[1][-1].cached_tokens - 1 >= 60, "one token is computed again"
    assert after[2][-1].cached_tokens == 39
    assert snapshot.head_undrafted_total == 0
    texts = [[*r.prompt_ids, *one] for r, one in zip(requests, ids(after), strict=True)]
    assert check_entries(whole, runners, texts) > 100


async def test_prefixes_on_disk_hold_the_head_s_entries(whole: Model, pipeline_of: Make, tmp_path: Path) -> None:
    first = request_of(3, 70, 8)
    second = request_of(4, 0, 12, prompt_ids=(*first.prompt_ids, *prompt_of(4, 5)))
    before, _ = await generate(pipeline_of(2)[0], [first, second], together=False)
    texts = [[*r.prompt_ids, *one] for r, one in zip([first, second], ids(before), strict=True)]
    made = {"follows": follows_of(texts), "cache_step": 16, "directory": tmp_path}
    pipeline, _ = pipeline_of(2, **made)
    async with Engine(pipeline, drafter=drafter_of(3), prefixes=PrefixOptions()) as engine:
        assert [event.token_id for event in await collect(engine, first)] == ids(before)[0]
        while engine.snapshot().disk_blocks < 4:
            await asyncio.sleep(0.01)
    pipeline, runners = pipeline_of(2, **made)
    events, snapshot = await generate(pipeline, [second], drafter=drafter_of(3), prefixes=PrefixOptions())
    assert ids(events)[0] == ids(before)[1]
    assert events[0][-1].cached_tokens == 4 * 16 - 1
    assert snapshot.head_undrafted_total == 0 and snapshot.draft_tokens_accepted_total > 0
    assert check_entries(whole, runners, texts) >= len(texts[1]) - 4


async def test_blocks_of_a_disk_without_the_head_s_part_are_used_and_nothing_is_guessed(
    pipeline_of: Make, tmp_path: Path
) -> None:
    first = request_of(3, 70, 8)
    second = request_of(4, 0, 12, prompt_ids=(*first.prompt_ids, *prompt_of(4, 5)))
    pipeline, _ = pipeline_of(2, cache_step=16, directory=tmp_path)
    async with Engine(pipeline, prefixes=PrefixOptions()) as engine:
        await collect(engine, first)
        while engine.snapshot().disk_blocks < 4:
            await asyncio.sleep(0.01)
    before, _ = await generate(pipeline_of(2)[0], [second])
    pipeline, _ = pipeline_of(2, follows=follows_of(ids(before)), cache_step=16, directory=tmp_path)
    events, snapshot = await generate(pipeline, [second], drafter=drafter_of(3), prefixes=PrefixOptions())
    assert ids(events) == ids(before)
    assert snapshot.head_undrafted_total == 1 and snapshot.draft_tokens_total == 0, "and that is counted"


async def test_a_stop_within_guesses_and_the_last_token(pipeline_of: Make, plain: list[list[int]]) -> None:
    follows = follows_of([[*prompt_of(i, n)[-1:], *plain[i]] for i, n in enumerate(LENGTHS)])
    for place in (1, 5, 9):
        stop = frozenset({plain[1][place]})
        wanted = plain[1][: plain[1].index(plain[1][place]) + 1]
        pipeline, _ = pipeline_of(2, follows=follows)
        request = request_of(1, LENGTHS[1], stop_ids=stop)
        events, _ = await generate(pipeline, [request], drafter=drafter_of(6))
        assert ids(events)[0] == wanted and events[0][-1].finish_reason == "stop"
    for new in (1, 2, 3, 4):
        pipeline, _ = pipeline_of(2, follows=follows)
        events, _ = await generate(pipeline, [request_of(1, LENGTHS[1], new)], drafter=drafter_of(6))
        assert ids(events)[0] == plain[1][:new] and events[0][-1].finish_reason == "length"


class Parity:
    """A grammar: even and odd tokens take turns; `masked` from the first token on or only after so many."""

    def __init__(self, vocab_size: int, first: int = 0) -> None:
        self.count, self.first, self.vocab_size = 0, first, vocab_size

    def mask(self) -> bytes | None:
        if self.count < self.first:
            return None
        bits = np.zeros(-(-self.vocab_size // 32) * 32, bool)
        bits[self.count % 2 : self.vocab_size : 2] = True
        return np.packbits(bits, bitorder="little").tobytes()

    def accept(self, token_id: int) -> None:
        assert self.count < self.first or token_id % 2 == self.count % 2, "a token that was not allowed"
        self.count += 1

    def fork(self) -> Parity:
        made = Parity(self.vocab_size, self.first)
        made.count = self.count
        return made


class Unforkable(Parity):
    fork = None  # type: ignore[assignment]


@pytest.mark.parametrize(("kind", "first"), [(Parity, 0), (Parity, 7), (Unforkable, 0)])
async def test_grammars(pipeline_of: Make, kind: type[Parity], first: int) -> None:
    async def once(follows: dict[int, int] | None, drafter: Drafter | None) -> Any:
        requests = [
            request_of(i, 20, 24, sampling, constraint=kind(1024, first))
            for i, sampling in enumerate((GREEDY, SamplingParams(temperature=0.9, seed=5)))
        ]
        pipeline, _ = pipeline_of(2, follows=follows)
        return await generate(pipeline, requests, drafter=drafter)

    before, _ = await once(None, None)
    after, snapshot = await once(follows_of(ids(before)), drafter_of(3))
    assert ids(after) == ids(before)
    drafted = snapshot.head_drafts_by_position[0][1]
    assert drafted > 10 if kind is Parity else drafted == 0


async def test_what_the_past_says_goes_before_the_head(pipeline_of: Make) -> None:
    prompt = prompt_of(1, 12) * 4
    request = request_of(1, 0, 40, prompt_ids=prompt)
    before, _ = await generate(pipeline_of(1)[0], [request])
    follows = follows_of([[prompt[-1], *ids(before)[0]]])
    pipeline, _ = pipeline_of(1, follows=follows)
    after, snapshot = await generate(pipeline, [request], drafter=drafter_of(3, lookups=True))
    assert ids(after) == ids(before)
    of_head = sum(tries for tries, _ in snapshot.head_drafts_by_position)
    assert snapshot.draft_tokens_total > of_head


async def test_a_stage_that_fails_and_comes_back(pipeline_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(1, 30, 30)
    before, _ = await generate(pipeline_of(2)[0], [request])
    pipeline, _ = pipeline_of(2, follows=follows_of(ids(before)))
    forward, calls = Model.forward_ragged, []

    def breaks(self: Model, *given: Any, **options: Any) -> mx.array:
        calls.append(self)
        if len(calls) == 15:
            raise RuntimeError("as if it died")
        return forward(self, *given, **options)

    monkeypatch.setattr(Model, "forward_ragged", breaks)
    after, snapshot = await generate(pipeline, [request], drafter=drafter_of(3), survive_s=60.0)
    assert ids(after) == ids(before)
    assert snapshot.requests_resumed_total == 1 and snapshot.head_undrafted_total == 0


@pytest.mark.parametrize("most", [5, 0])
async def test_features_that_wait_are_never_more_than_a_plan_has_room_for(
    whole: Model, pipeline_of: Make, plain: list[list[int]], most: int
) -> None:
    """Nothing is guessed for three sequences, so rows of all wait until as many do as may. The last row of a piece of a prompt
    cannot be entered yet: where there is no room for it either, the head loses the sequence, and no token changes."""
    requests = [request_of(i, length) for i, length in enumerate(LENGTHS)]
    pipeline, runners = pipeline_of(2, follows={}, most_waiting=most)
    events, snapshot = await generate(pipeline, requests, drafter=drafter_of(0), prefill_chunk=16)
    assert ids(events) == plain
    runner = runners[0]
    assert max(runner.waited) <= most and (max(runner.waited) == most or most == 0)
    held = sum(state.entered for state in runner.states)
    whole_length = sum(len(p) + NEW - 2 for p in (r.prompt_ids for r in requests))
    assert (held >= whole_length - 3 - most) == (most > 0)
    check_entries(whole, runners, [[*r.prompt_ids, *one] for r, one in zip(requests, plain, strict=True)])
    assert snapshot.draft_tokens_total == 0
