"""Loss and gradients in NumPy against MLX's own gradients of `models.kimi_k2`, the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.mla import Span
from exo_kimi.models.rope import Rope
from exo_kimi.train.model.forward import Batch, loss_and_gradients, predictions
from exo_kimi.train.model.layers import Parameters
from exo_kimi.train.model.parameters import BIAS, first_values
from tests.train.conftest import RECIPE

CONFIG = RECIPE.config
SPANS = [(3, 7), (2, 11)]
TOKENS = 43
TOLERANCE = 1e-4


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        inputs=rng.integers(0, CONFIG.vocab_size, TOKENS).astype(np.int32),
        spans=SPANS,
        rows=np.array([1, 4, 8, 20, 30, 42]),
        targets=rng.integers(0, CONFIG.vocab_size, 6).astype(np.int32),
        padding=np.zeros(TOKENS, bool),
    )


@pytest.fixture
def parameters() -> Parameters:
    """Nothing is zero or one, so that every path of the gradient is walked."""
    rng = np.random.default_rng(1)
    values = first_values(CONFIG, 0)
    return {
        name: value + np.float32(0.1) * rng.standard_normal(value.shape, np.float32) for name, value in values.items()
    }


def test_loss_and_gradients_are_those_of_mlx(
    batch: Batch, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = mx.argpartition
    # MLX asks for this before it differentiates through a choice.
    monkeypatch.setattr(mx, "argpartition", lambda *given, **named: mx.stop_gradient(choose(*given, **named)))
    model = Model(CONFIG)
    assert {name for name, _ in tree_flatten(model.parameters())} == set(parameters)
    positions = mx.array(
        np.concatenate([np.tile(np.arange(length), count) for count, length in SPANS]).astype(np.int32)
    )

    def loss(values: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(values.items())))
        h = model.model.embed_tokens(mx.array(batch.inputs))
        for layer in model.layers:
            h = layer(h, positions, [Span(count, length, "causal") for count, length in SPANS], [None, None])
        logits = model.lm_head(model.model.norm(h[mx.array(batch.rows)]))
        chosen: Any = nn.losses.cross_entropy(logits, mx.array(batch.targets), reduction="sum")
        return chosen

    expected, gradients = mx.value_and_grad(loss)({name: mx.array(value) for name, value in parameters.items()})
    outcome = loss_and_gradients(parameters, CONFIG, np.array(Rope.of(CONFIG).wavelengths), batch)
    assert outcome.loss == pytest.approx(expected.item(), rel=TOLERANCE)
    assert set(outcome.gradients) == {name for name in parameters if BIAS not in name}
    for name, found in outcome.gradients.items():
        wanted = np.array(gradients[name])
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max(), name


def test_padding_at_the_end_changes_nothing_but_loads(batch: Batch, parameters: Parameters) -> None:
    wavelengths = np.array(Rope.of(CONFIG).wavelengths)
    short = replace(batch, inputs=batch.inputs[:7], spans=[(1, 7)], rows=batch.rows[:2], targets=batch.targets[:2])
    padding = np.arange(12) >= 7
    padded = replace(short, inputs=np.pad(short.inputs, (0, 5)), spans=[(1, 12)], padding=padding)
    plain = loss_and_gradients(parameters, CONFIG, wavelengths, replace(short, padding=padding[:7]))
    other = loss_and_gradients(parameters, CONFIG, wavelengths, padded)
    assert other.loss == pytest.approx(plain.loss, rel=1e-6)
    assert all((other.loads[layer] == plain.loads[layer]).all() for layer in plain.loads)
    name = "model.layers.1.mlp.switch_mlp.down_proj.weight"
    np.testing.assert_allclose(other.gradients[name], plain.gradients[name], rtol=1e-4, atol=1e-6)


def test_predictions_are_the_likeliest_tokens(batch: Batch, parameters: Parameters) -> None:
    wavelengths = np.array(Rope.of(CONFIG).wavelengths)
    chosen = predictions(parameters, CONFIG, wavelengths, batch)
    best = loss_and_gradients(parameters, CONFIG, wavelengths, replace(batch, targets=chosen)).loss
    assert chosen.shape == batch.targets.shape
    assert best < loss_and_gradients(parameters, CONFIG, wavelengths, batch).loss
