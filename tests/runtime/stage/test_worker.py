"""Stages of a real tiny Kimi: the same tokens however it is split, chunked or batched; and what a stage refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ProtocolError, StageError, StageOutOfMemoryError
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.inline import run_chain
from exo_kimi.runtime.stage.stage_model import pack, unpack
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Hidden, Segment, SequenceStart, Step, StepResult

SMALL = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8}
SPLITS = {1: [7], 2: [4, 3], 3: [1, 2, 4], 7: [1] * 7}
GREEDY = SamplingParams(temperature=0.0, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("stage") / "tiny", dtype="F32", seed=3, config=SMALL)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Model:
    return exo_kimi.load(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def chain(checkpoint: Path) -> Callable[[int], list[StageWorker]]:
    """Fresh workers of a split; each split is loaded once."""
    loaded: dict[int, list[Model]] = {}

    def workers(stages: int) -> list[StageWorker]:
        if stages not in loaded:
            bounds = np.cumsum([0, *SPLITS[stages]]).tolist()
            loaded[stages] = [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise(bounds)]
        return [StageWorker(model, epoch=1, stage=i) for i, model in enumerate(loaded[stages])]

    return workers


def steps_of(shares: list[list[tuple[int, list[int], bool]]]) -> Iterator[Step]:
    """Steps from (sequence, tokens, sample) lists; sequences begin when they are first seen."""
    lengths: dict[int, int] = {}
    for step_id, parts in enumerate(shares):
        begin = [SequenceStart(seq_id=s, prompt_tokens=1, sampling=GREEDY) for s, _, _ in parts if s not in lengths]
        segments = [
            Segment(seq_id=s, offset=lengths.get(s, 0), length=len(tokens), sample=sample)
            for s, tokens, sample in parts
        ]
        for s, tokens, _ in parts:
            lengths[s] = lengths.get(s, 0) + len(tokens)
        yield Step(
            epoch=1,
            step_id=step_id,
            segments=tuple(segments),
            tokens=np.array([t for _, tokens, _ in parts for t in tokens], np.int32),
            begin=tuple(begin),
        )


def generate(workers: list[StageWorker], prompt: list[int], count: int, chunk: int) -> list[int]:
    """Greedy tokens of one sequence, its prompt fed in chunks."""
    shares = [[(0, prompt[i : i + chunk], i + chunk >= len(prompt))] for i in range(0, len(prompt), chunk)]
    steps = list(steps_of(shares))
    results = [run_chain(workers, step) for step in steps]
    assert all(result.sampled == () for result in results[:-1])
    found = [results[-1].sampled[0].token_id]
    for offset in range(len(prompt), len(prompt) + count - 1):
        step = Step(
            epoch=1,
            step_id=offset,
            segments=(Segment(seq_id=0, offset=offset, length=1, sample=True),),
            tokens=np.array(found[-1:], np.int32),
        )
        found.append(run_chain(workers, step).sampled[0].token_id)
    return found


def oracle(model: Model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens with no cache at all: everything again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    return tokens[len(prompt) :]


PROMPT = np.random.default_rng(0).integers(0, 300, 37).tolist()


@pytest.fixture(scope="module")
def expected(whole: Model) -> list[int]:
    tokens = oracle(whole, PROMPT, 12)
    assert len(set(tokens)) > 4  # a model that repeats itself would prove little
    return tokens


@pytest.mark.parametrize("stages", SPLITS)
def test_any_split_and_any_chunks_give_the_tokens_of_the_whole_model_without_a_cache(
    expected: list[int], chain: Callable[[int], list[StageWorker]], stages: int
) -> None:
    for chunk in (len(PROMPT), 16, 5, 1):
        assert generate(chain(stages), PROMPT, 12, chunk) == expected, f"chunks of {chunk}"


def test_a_ragged_step_gives_each_sequence_what_it_gets_alone(
    whole: Model, chain: Callable[[int], list[StageWorker]]
) -> None:
    prompts = [PROMPT[:1], PROMPT[3:20], PROMPT, PROMPT[5:9]]
    workers = chain(3)
    # Two begin; the others join while those decode; the last is cut in chunks.
    shares: list[list[tuple[int, list[int], bool]]] = [
        [(0, prompts[0], True), (1, prompts[1], True)],
        [(2, prompts[2][:20], False), (1, [], True), (0, [], True)],
        [(0, [], True), (2, prompts[2][20:], True), (3, prompts[3], True)],
        [(3, [], True), (2, [], True), (1, [], True), (0, [], True)],
    ]
    found: dict[int, list[int]] = {i: [] for i in range(4)}
    for step_id, parts in enumerate(shares):
        filled = [(s, tokens or [found[s][-1]], sample) for s, tokens, sample in parts]
        step = list(steps_of([*shares[:step_id], filled]))[-1]
        for sampled in run_chain(workers, step).sampled:
            found[sampled.seq_id].append(sampled.token_id)
        shares[step_id] = filled
    for seq_id, prompt in enumerate(prompts):
        assert found[seq_id] == oracle(whole, prompt, len(found[seq_id]))
    assert [len(found[i]) for i in range(4)] == [4, 3, 2, 2]


def test_memory_of_a_sequence_is_counted_in_whole_steps_and_freed_on_every_stage(
    chain: Callable[[int], list[StageWorker]],
) -> None:
    workers = chain(2)
    config = workers[0].model.args
    a_token = (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    for step in steps_of([[(0, PROMPT, False), (1, PROMPT[:3], True)], [(0, PROMPT, True)]]):
        run_chain(workers, step)
    for worker, layers in zip(workers, SPLITS[2], strict=True):
        assert worker.sequences == 2
        assert worker.kv_nbytes == 2 * CACHE_STEP * layers * a_token
    free = Step(epoch=1, step_id=9, segments=(), tokens=np.zeros(0, np.int32), free=(0, 1, 77))
    assert run_chain(workers, free) == StepResult(epoch=1, step_id=9, sampled=())
    assert [(w.sequences, w.kv_nbytes) for w in workers] == [(0, 0), (0, 0)]


def test_reset_drops_every_sequence_and_changes_the_epoch(chain: Callable[[int], list[StageWorker]]) -> None:
    (worker,) = chain(1)
    (step,) = steps_of([[(0, PROMPT, True)]])
    before = worker.execute(step)
    worker.reset(5)
    assert (worker.sequences, worker.kv_nbytes) == (0, 0)
    with pytest.raises(ProtocolError, match="another epoch"):
        worker.execute(step)
    again = worker.execute(replace(step, epoch=5))
    assert isinstance(before, StepResult)
    assert isinstance(again, StepResult)
    assert again.sampled == before.sampled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": (Segment(seq_id=0, offset=2, length=2, sample=True),)}, "does not follow"),
        ({"segments": (Segment(seq_id=9, offset=0, length=2, sample=True),)}, "does not follow"),
        ({"segments": (Segment(seq_id=0, offset=0, length=3, sample=True),)}, "do not fill"),
        ({"segments": (Segment(seq_id=0, offset=0, length=1, sample=True),) * 2}, "two segments"),
        ({"tokens": np.array([1, 10**6], np.int32)}, "outside the vocabulary"),
        ({"tokens": np.array([-1, 1], np.int32)}, "outside the vocabulary"),
        ({"begin": (SequenceStart(seq_id=0, prompt_tokens=2, sampling=GREEDY),) * 2}, "began twice"),
    ],
)
def test_a_step_that_contradicts_the_stage_is_refused_and_computes_nothing(
    chain: Callable[[int], list[StageWorker]], change: dict[str, Any], message: str
) -> None:
    (worker,) = chain(1)
    (step,) = steps_of([[(0, [1, 2], True)]])
    with pytest.raises(ProtocolError, match=message):
        worker.execute(replace(step, **change))
    assert worker.kv_nbytes == 0


def test_a_later_stage_refuses_a_step_without_hidden_states_or_with_too_few(
    chain: Callable[[int], list[StageWorker]],
) -> None:
    first, second = chain(2)
    (step,) = steps_of([[(0, [1, 2, 3], True)]])
    with pytest.raises(ProtocolError, match="without hidden states"):
        second.execute(step)
    moving = first.execute(step)
    assert isinstance(moving, Step)
    assert moving.hidden is not None
    second.reset(1)
    with pytest.raises(ProtocolError, match="wrong size") as caught:
        second.execute(replace(moving, hidden=replace(moving.hidden, data=bytes(moving.hidden.data)[:-4])))
    assert caught.value.stage == 1


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("[metal::malloc] Attempting to allocate 99 bytes"), StageOutOfMemoryError),
        (MemoryError(), StageOutOfMemoryError),
        (ValueError("[reshape] no"), StageError),
    ],
)
def test_what_mlx_raises_becomes_an_error_that_names_the_stage(
    chain: Callable[[int], list[StageWorker]],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[StageError],
) -> None:
    worker = chain(2)[1]

    def broken(*_: object, **__: object) -> mx.array:
        raise raised

    monkeypatch.setattr(Model, "forward_ragged", broken)
    hidden = Hidden(dtype="float32", tokens=1, hidden_size=worker.model.args.hidden_size, data=b"")
    full = replace(hidden, data=bytes(4 * hidden.hidden_size))
    (step,) = steps_of([[(0, [1], True)]])
    with pytest.raises(expected, match="stage 1") as caught:
        worker.execute(replace(step, hidden=full))
    assert caught.value.stage == 1


def test_weights_that_are_not_numbers_are_an_error_and_never_a_token(
    chain: Callable[[int], list[StageWorker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = chain(2)
    (step,) = steps_of([[(0, [1, 2], True)]])
    moving = first.execute(step)
    assert isinstance(moving, Step)
    assert moving.hidden is not None
    poison = np.full(2 * moving.hidden.hidden_size, np.nan, np.float32).tobytes()
    with pytest.raises(StageError, match="not finite") as caught:
        second.execute(replace(moving, hidden=replace(moving.hidden, data=poison)))
    assert caught.value.stage == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_hidden_states_survive_the_way_as_bytes_bit_for_bit(dtype: mx.Dtype) -> None:
    array = mx.random.normal((5, 24), key=mx.random.key(1)).astype(dtype)
    hidden = pack(array[1:4])
    assert memoryview(hidden.data).nbytes == 3 * 24 * dtype.size
    back = unpack(replace(hidden, data=bytes(hidden.data)), tokens=3, hidden_size=24)
    assert back.dtype == dtype
    assert mx.array_equal(back, array[1:4]).item()


def test_hidden_states_that_are_packed_outlive_their_array() -> None:
    hidden = pack(mx.full((64, 256), 3.0))
    for _ in range(8):
        mx.eval(mx.zeros((64, 256)) + 1)
    assert set(np.frombuffer(hidden.data, np.float32).tolist()) == {3.0}


def test_integers_are_no_hidden_states() -> None:
    with pytest.raises(ProtocolError, match="dtype"):
        pack(mx.zeros((2, 2), mx.int32))
