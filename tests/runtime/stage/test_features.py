"""Features, as they reach the last stage: exactly what enters the named layers, however a model is split and fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import ProtocolError
from exo_kimi.models.features import FeatureTap, features_before
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.mla import Span
from exo_kimi.runtime.requests import SamplingParams
from exo_kimi.runtime.stage.drafting import DraftState
from exo_kimi.runtime.stage.inline import run_chain
from exo_kimi.runtime.stage.stage_model import pack
from exo_kimi.runtime.stage.worker import StageWorker
from exo_kimi.runtime.steps import Proposal, Segment, SequenceStart, Step

SMALL = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 8}
SPLITS = {1: [0, 7], 2: [0, 4, 7], 3: [0, 1, 3, 7]}
LAYERS = (0, 1, 3, 4, 6, 7)
"""The embedding's output, borders of the splits, inner layers, and what leaves the last layer."""
GREEDY = SamplingParams(temperature=0.0, seed=0)
PROMPT = np.random.default_rng(1).integers(0, 300, 30).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("features") / "tiny", dtype="F32", seed=3, config=SMALL)


def oracle(model: Model, tokens: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """What enters each layer, and what leaves the last: layer by layer over the whole sequence, without a cache."""
    h = model.model.embed_tokens(mx.array(tokens))
    positions = mx.arange(len(tokens), dtype=mx.int32)
    found = [np.asarray(h)]
    for layer in model.layers:
        h = layer(h, positions, [Span(1, len(tokens), "causal")], [None])
        found.append(np.asarray(h))
    return found


class Recorder:
    """In place of a draft head: keeps the features that it is given, by sequence."""

    def __init__(self) -> None:
        self.rows: dict[int, list[np.ndarray[Any, Any]]] = {}

    def begin(self, *, prompt_tokens: int) -> None:
        return None

    def follow(
        self, step: Step, sequences: Sequence[tuple[DraftState | None, Any]], features: mx.array, sampled: Any
    ) -> tuple[Proposal, ...]:
        start = 0
        for segment in step.segments:
            rows = np.asarray(features[start : start + segment.length])
            self.rows.setdefault(segment.seq_id, []).extend(rows)
            start += segment.length
        return ()


Chain = Callable[..., tuple[list[StageWorker], Recorder]]


@pytest.fixture(scope="module")
def chain(checkpoint: Path) -> Chain:
    loaded: dict[tuple[int, bool], list[Model]] = {}

    def make(stages: int, *, decodes: bool = False, layers: Sequence[int] = LAYERS) -> tuple[list[StageWorker], Any]:
        key = stages, decodes
        if key not in loaded:
            loaded[key] = [exo_kimi.load(checkpoint, a, b, dtype="float32") for a, b in pairwise(SPLITS[stages])]
            for model in loaded[key] if decodes else []:
                model.fuse_projections()
        recorder = Recorder()
        workers = [StageWorker(m, epoch=1, stage=i, feature_layers=layers) for i, m in enumerate(loaded[key])]
        workers[-1].drafts = recorder  # type: ignore[assignment]
        return workers, recorder

    return make


def steps(shares: Sequence[Sequence[tuple[int, Sequence[int], bool]]]) -> Iterator[Step]:
    lengths: dict[int, int] = {}
    for step_id, parts in enumerate(shares):
        begin = [SequenceStart(seq_id=s, prompt_tokens=1, sampling=GREEDY) for s, _, _ in parts if s not in lengths]
        segments = []
        for seq_id, tokens, sample in parts:
            offset = lengths.get(seq_id, 0)
            segments.append(Segment(seq_id=seq_id, offset=offset, length=len(tokens), sample=sample))
            lengths[seq_id] = offset + len(tokens)
        flat = np.array([token for _, tokens, _ in parts for token in tokens], np.int32)
        yield Step(epoch=1, step_id=step_id, segments=tuple(segments), tokens=flat, begin=tuple(begin))


def feed(workers: list[StageWorker], shares: Sequence[Sequence[tuple[int, Sequence[int], bool]]]) -> None:
    for step in steps(shares):
        run_chain(workers, step)
        workers[-1].run_ahead()


@pytest.mark.parametrize("stages", SPLITS)
@pytest.mark.parametrize(("decodes", "layers"), [(False, LAYERS), (True, LAYERS), (False, LAYERS[:-1])])
def test_features_are_what_enters_the_named_layers(
    checkpoint: Path, chain: Chain, stages: int, decodes: bool, layers: Sequence[int]
) -> None:
    """In chunks of a prompt, of which the last layer computes only the end unless its features are wanted, and in decoding, of
    one sequence and of two."""
    other = PROMPT[7:19]
    shares = [
        [(0, PROMPT[:16], False)],
        [(0, PROMPT[16:25], True), (1, other[:8], True)],
        *[[(0, [token], True)] for token in PROMPT[25:27]],
        *[[(1, [theirs], True), (0, [ours], True)] for ours, theirs in zip(PROMPT[27:], other[8:11], strict=True)],
    ]
    workers, recorder = chain(stages, decodes=decodes, layers=layers)
    feed(workers, shares)
    whole = exo_kimi.load(checkpoint, dtype="float32")
    for seq_id, tokens in ((0, PROMPT), (1, other[:11])):
        expected = oracle(whole, tokens)
        found = np.array(recorder.rows[seq_id]).reshape(len(tokens), len(layers), -1)
        for place, layer in enumerate(layers):
            np.testing.assert_allclose(
                found[:, place], expected[layer], atol=2e-5, err_msg=f"what enters layer {layer}"
            )
            for near in {layer - 1, layer + 1} & set(range(8)):
                assert np.abs(found[:, place] - expected[near]).max() > 1e-2, "the check would not see one layer off"


def test_what_runs_ahead_has_its_features_too(checkpoint: Path, chain: Chain) -> None:
    """The greedy tokens themselves are fed, as the leader would: all but the first are computed ahead."""
    workers, recorder = chain(1, decodes=True)
    tokens = list(PROMPT)
    for step_id in range(8):
        offset = 0 if step_id == 0 else len(tokens) - 1
        begin = [SequenceStart(seq_id=0, prompt_tokens=len(PROMPT), sampling=GREEDY)] if step_id == 0 else []
        step = Step(
            epoch=1,
            step_id=step_id,
            segments=(Segment(seq_id=0, offset=offset, length=len(tokens) - offset, sample=True),),
            tokens=np.array(tokens[offset:], np.int32),
            begin=tuple(begin),
        )
        tokens.append(run_chain(workers, step).sampled[0].token_id)
        workers[-1].run_ahead()
    assert workers[0].ahead.used == 7
    expected = oracle(exo_kimi.load(checkpoint, dtype="float32"), tokens[:-1])
    found = np.array(recorder.rows[0]).reshape(len(tokens) - 1, len(LAYERS), -1)
    for place, layer in enumerate(LAYERS):
        np.testing.assert_allclose(found[:, place], expected[layer], atol=2e-5)


def test_only_features_of_layers_before_a_stage_travel_to_it(chain: Chain) -> None:
    """What enters its first layer is the hidden state that it is given anyhow."""
    workers, _ = chain(3, layers=(1, 2, 5))
    moving: Any = next(steps([[(0, PROMPT, True)]]))
    widths = []
    for worker in workers[:-1]:
        moving = worker.execute(moving)
        widths.append(moving.hidden.hidden_size // 64)
    assert widths == [1, 3], "stage 1 has what enters layer 1; stage 2 gets it and what enters layer 2"
    assert features_before((1, 2, 5), 3) == 2


def test_a_pass_cut_in_pieces_has_the_features_of_all_rows(checkpoint: Path) -> None:
    model = exo_kimi.load(checkpoint, dtype="float32")
    model.set_scratch_bytes(1)
    tokens = np.random.default_rng(5).integers(0, 300, 600).tolist()
    tap = FeatureTap((0, 3))
    model.forward_ragged(mx.array(tokens), [(600, model.make_cache())], asked=[1], tap=tap)
    assert len(tap.rows) > 2
    expected = oracle(model, tokens)
    for layer, column in zip((0, 3), tap.columns(), strict=True):
        np.testing.assert_allclose(np.asarray(column), expected[layer], atol=1e-4)


def test_a_stage_refuses_rows_without_the_features_that_it_needs(chain: Chain) -> None:
    workers, _ = chain(2, layers=(1, 5))
    step = workers[0].execute(next(steps([[(0, PROMPT, True)]])))
    assert isinstance(step, Step)
    plain = Step(
        epoch=1,
        step_id=0,
        segments=step.segments,
        tokens=step.tokens,
        begin=step.begin,
        hidden=pack(mx.zeros((len(PROMPT), 64))),
    )
    with pytest.raises(ProtocolError, match="wrong size"):
        workers[1].execute(plain)


def test_feature_layers_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        FeatureTap((3, 1))
