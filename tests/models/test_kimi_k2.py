"""The same numbers, however the tokens are fed and however the layers are split."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import stage_modules
from exo_kimi.errors import SplitError
from exo_kimi.models.kimi_k2 import CACHE_STEP, Model

TOLERANCE = 2e-5


def close(found: mx.array, expected: mx.array) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=TOLERANCE)


def ragged_logits(model: Model, chunks: list[mx.array]) -> mx.array:
    caches = model.make_cache()
    return mx.concatenate([model.logits(model.forward_ragged(chunk, [(len(chunk), caches)])) for chunk in chunks])


def stages_of(model: Model, bounds: list[int]) -> list[Model]:
    """The model cut at `bounds`, with the same weights."""
    weights = tree_flatten(model.parameters())
    stages = []
    for start, end in itertools.pairwise(bounds):
        stage = Model(model.args, start, end)
        names = {name for name, _ in tree_flatten(stage.parameters())}
        stage.load_weights([(name, value) for name, value in weights if name in names])
        stages.append(stage)
    return stages


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 1, 30, 22], [59, 1]], ids=str)
def test_chunks_of_any_size_give_the_logits_of_one_pass(model: Model, tokens: mx.array, sizes: list[int]) -> None:
    chunks = mx.split(tokens, np.cumsum(sizes)[:-1].tolist()) if len(sizes) > 1 else [tokens]
    close(ragged_logits(model, chunks), model(tokens[None])[0])


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_the_last_layer_may_only_remember(model: Model, tokens: mx.array, chunk_bytes: int | None) -> None:
    """All but the last chunk of a prompt: the caches are those of a whole pass, and so are the logits that follow."""
    whole, spared = model.make_cache(), model.make_cache()
    if chunk_bytes is not None:
        model.set_scratch_bytes(chunk_bytes)  # the pass is cut into pieces
    model.forward_ragged(tokens[:40], [(40, whole)])
    model.forward_ragged(tokens[:40], [(40, spared)], asked=[0])
    for one, other in zip(whole, spared, strict=True):
        assert one.offset == other.offset == 40
        close(other.keys[:, :, :40], one.keys[:, :, :40])
        close(other.values[:, :, :40], one.values[:, :, :40])
    after = [model.logits(model.forward_ragged(tokens[40:], [(20, caches)])) for caches in (whole, spared)]
    close(after[1], after[0])


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_what_is_asked_for_is_that_of_a_whole_pass(model: Model, tokens: mx.array, chunk_bytes: int | None) -> None:
    """A prompt's end, a chunk of which nothing is asked, a guess with its verification, all in one pass."""
    lengths, asked = [25, 20, 4, 1], [1, 0, 3, 1]
    whole, spared = ([(length, model.make_cache()) for length in lengths] for _ in range(2))
    expected = model.forward_ragged(tokens[:50], whole)
    if chunk_bytes is not None:
        model.set_scratch_bytes(chunk_bytes)
    found = model.forward_ragged(tokens[:50], spared, asked=asked)
    rows = mx.array([24, 46, 47, 48, 49])
    close(model.logits(found[rows]), model.logits(expected[rows]))
    for (length, one), (_, other) in zip(whole, spared, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.offset == theirs.offset == length
            close(theirs.keys[:, :, :length], mine.keys[:, :, :length])


def test_a_sequence_computes_the_same_alone_and_among_others(model: Model, tokens: mx.array) -> None:
    first, second, third = tokens[:20], tokens[20:21], tokens[21:60]
    alone = [ragged_logits(model, [part]) for part in (first, second, third)]
    segments = [(len(part), model.make_cache()) for part in (first, second, third)]
    mixed = model.logits(model.forward_ragged(tokens, segments))
    close(mixed, mx.concatenate(alone))
    # Decode tokens of two sequences beside a prefill chunk of a third.
    after = model.forward_ragged(
        mx.concatenate([tokens[:1], tokens[5:30], tokens[1:2]]),
        [(1, segments[0][1]), (25, model.make_cache()), (1, segments[2][1])],
    )
    close(model.logits(after[:1])[0], ragged_logits(model, [first, tokens[:1]])[-1])
    close(model.logits(after[1:26]), ragged_logits(model, [tokens[5:30]]))
    close(model.logits(after[26:])[0], ragged_logits(model, [third, tokens[1:2]])[-1])


@pytest.mark.parametrize("bounds", [[0, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_stages_one_after_another_are_the_whole(model: Model, tokens: mx.array, bounds: list[int]) -> None:
    stages = stages_of(model, bounds)
    assert [(stage.is_first, stage.is_last) for stage in stages] == [
        (start == 0, end == 4) for start, end in itertools.pairwise(bounds)
    ]
    segments = [[(40, stage.make_cache()), (20, stage.make_cache())] for stage in stages]
    hidden = tokens
    for stage, own in zip(stages, segments, strict=True):
        hidden = stage.forward_ragged(hidden, own)
    assert hidden.shape == (60, model.args.hidden_size)
    close(stages[-1].logits(hidden), mx.concatenate([model(tokens[None, :40])[0], model(tokens[None, 40:])[0]]))
    close(_compose(stages, tokens[None]), model(tokens[None]))


def _compose(stages: list[Model], x: mx.array) -> mx.array:
    for stage in stages:
        x = stage(x, stage.make_cache())
    return x


@pytest.mark.parametrize(("start", "end"), [(0, 4), (0, 2), (1, 3), (2, 4)])
def test_a_stage_owns_exactly_the_modules_of_its_layers(config: KimiConfig, start: int, end: int) -> None:
    stage = Model(config, start, end)
    owned = {name.rpartition(".")[0] for name, _ in tree_flatten(stage.parameters())}
    assert owned == {spec.path for spec in stage_modules(config, start, end)}
    layers_only = Model(config, start, end, layers_only=True)
    owned = {name.rpartition(".")[0] for name, _ in tree_flatten(layers_only.parameters())}
    assert owned == {spec.path for spec in stage_modules(config, start, end) if spec.layer is not None}
    assert len(stage.layers) == len(stage.make_cache()) == end - start


def test_a_range_outside_the_model_is_refused(config: KimiConfig) -> None:
    with pytest.raises(SplitError, match="no such layer range"):
        Model(config, 2, 5)
    with pytest.raises(SplitError, match="no such layer range"):
        Model(config, 2, 2)


def test_cache_bytes_are_the_length_rounded_up_to_the_step(model: Model, tokens: mx.array) -> None:
    caches = model.make_cache()
    assert model.cache_nbytes(caches) == 0
    model.forward_ragged(tokens, [(60, caches)])
    per_token = 4 * (model.args.kv_lora_rank + model.args.qk_rope_head_dim) * len(model.layers)
    assert model.cache_nbytes(caches) == CACHE_STEP * per_token
    for _ in range(4):
        model.forward_ragged(tokens, [(60, caches)])
    assert model.cache_nbytes(caches) == 2 * CACHE_STEP * per_token


def greedy(model: Model, prompt: mx.array, count: int) -> list[int]:
    caches, ids = model.make_cache(), []
    step = prompt
    for _ in range(count):
        logits = model.logits(model.forward_ragged(step, [(len(step), caches)])[-1:])
        ids.append(int(mx.argmax(logits[0]).item()))
        step = mx.array(ids[-1:])
    return ids


@pytest.mark.parametrize("prefill_step_size", [2048, 16])
def test_mlx_lm_generates_with_this_model(model: Model, tokens: mx.array, prefill_step_size: int) -> None:
    steps = generate_step(tokens, model, max_tokens=12, prefill_step_size=prefill_step_size)
    assert [int(token) for token, _ in steps] == greedy(model, tokens, 12)


def test_mlx_lm_batches_with_left_padding_on_this_model(model: Model, tokens: mx.array) -> None:
    parts, width = [tokens[:30], tokens[30:37], tokens[37:60]], 30
    rows = [mx.concatenate([mx.zeros((width - len(part),), tokens.dtype), part]) for part in parts]
    padding = [width - len(part) for part in parts]
    caches = [BatchKVCache(padding) for _ in model.layers]
    prefill = model(mx.stack(rows), caches)
    step = model(mx.stack([tokens[:1]] * 3), caches)
    longer = model(mx.stack([tokens[1:6]] * 3), caches)
    for index, part in enumerate(parts):
        expected = ragged_logits(model, [part, tokens[:1], tokens[1:6]])
        close(prefill[index, padding[index] :], expected[: len(part)])
        close(step[index, 0], expected[len(part)])
        close(longer[index], expected[len(part) + 1 :])


def test_mlx_lms_prompt_cache_is_this_models_own(model: Model) -> None:
    assert [type(cache).__name__ for cache in make_prompt_cache(model)] == ["KVCache"] * 4


def test_a_nested_k25_config_builds_the_same_model(raw_config: dict[str, Any], model: Model, tokens: mx.array) -> None:
    nested = KimiConfig.from_dict({"model_type": "kimi_k25", "text_config": raw_config})
    twin = Model(nested)
    twin.load_weights(tree_flatten(model.parameters()))
    assert mx.array_equal(twin(tokens[None]), model(tokens[None]))
