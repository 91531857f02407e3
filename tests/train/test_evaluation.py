"""Evaluation: intervals, greedy replies, and the whole of it on a random checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.compare.greedy import greedy
from exo_kimi.compress.compare.score import Score
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.evaluation.evaluate import evaluate, held_out_texts
from exo_kimi.train.evaluation.likelihood import likelihood
from exo_kimi.train.export import write_checkpoint
from exo_kimi.train.model.parameters import fake_quant, first_values, is_expert
from tests.train.conftest import RECIPE


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(2)
    parameters = {
        name: value + np.float32(0.1) * rng.standard_normal(value.shape, np.float32)
        for name, value in first_values(RECIPE.config, 0).items()
    }
    root = tmp_path_factory.mktemp("eval")
    write_checkpoint(root / "bf16", vocabulary, parameters, layout="bf16")
    write_checkpoint(root / "int4", vocabulary, parameters, layout="int4")
    return root


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(95, 100, 0.8882, 0.9785), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_intervals_are_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert Score(right=right, count=count).interval == pytest.approx((low, high), abs=2e-4)


def test_greedy_replies_are_those_of_one_prompt_at_a_time(checkpoint: Path) -> None:
    model = load(checkpoint / "int4", dtype="float32")
    prompts = [[5, 9, 300], [7, 8, 9], [4, 4, 4, 4], [600]]
    stop = frozenset({KimiTokenizer.from_directory(checkpoint / "int4").special["<|im_end|>"]})
    together = greedy(model, prompts, stop_ids=stop, max_tokens=6)
    for prompt, reply in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for token in reply:
            assert model(mx.array([tokens]))[0, -1].argmax().item() == token
            tokens.append(token)


def test_a_random_model_is_judged_as_one(checkpoint: Path) -> None:
    report = evaluate(checkpoint / "int4", against=checkpoint / "bf16", count=1, seed=0, texts=4, max_tokens=8)
    assert report.overall.right == 0
    assert report.overall.count > 20
    assert report.calls_right.count == 3
    assert report.likelihood.kl is not None
    assert 0 < report.likelihood.kl.low <= report.likelihood.kl.value <= report.likelihood.kl.high < 1
    assert set(report.likelihood.loads) == {1, 2}
    assert report.wrong
    document = json.loads(report.to_json())
    assert document["scores"]["addition"] == [0, 1]
    assert "tool calls right" in report.to_text(wrong=2)


@pytest.mark.parametrize("template", ["instruct", "k25"])
def test_any_kimi_can_be_asked(template: str, tmp_path: Path) -> None:
    """Whatever its vocabulary, its layout, and its way with think tags."""
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    directory = make_tiny(tmp_path / "tiny", template=template, config=shape)
    report = evaluate(directory, against=None, count=1, seed=0, texts=2, max_tokens=3)
    assert report.overall.right == 0
    assert report.likelihood.perplexity > 10


def test_a_model_is_no_distance_from_itself(checkpoint: Path, encoder: Encoder) -> None:
    walk = LayerWalk(checkpoint=Checkpoint(checkpoint / "bf16"), dtype="float32")
    texts = held_out_texts(encoder, 3, seed=0)
    measured = likelihood(walk, texts, walk)
    assert measured.kl is not None
    assert measured.same_choice is not None
    assert measured.kl.value == pytest.approx(0, abs=1e-6)
    assert measured.same_choice.value == 1.0
    tokens = sum(len(text.ids) for text in texts)
    assert all(sum(loads) == tokens * RECIPE.config.num_experts_per_tok for loads in measured.loads.values())
    assert likelihood(walk, texts).kl is None


def test_experts_are_what_int4_changes(checkpoint: Path) -> None:
    plain, native = load(checkpoint / "bf16", dtype="float32"), load(checkpoint / "int4", dtype="float32")
    assert is_expert("model.layers.1.mlp.switch_mlp.gate_proj.weight")
    expert = np.array(plain.layers[1].mlp.switch_mlp.gate_proj.weight)
    quantized = native.layers[1].mlp.switch_mlp.gate_proj
    values = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, group_size=32, bits=4)
    # bf16 rounds first there, so a code may differ at a tie; never by more than one step.
    step = np.abs(expert).max() / 7
    assert np.abs(np.array(values) - fake_quant(expert)).max() <= 1.01 * step
