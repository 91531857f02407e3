"""Gradients of adapters: MLX's and NumPy's are the same, over packed weights too; and frozen is frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.errors import UsageError
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.export import read_parameters
from exo_kimi.train.lora.command import read_rows
from exo_kimi.train.lora.mlx_gradients import MlxGradients
from exo_kimi.train.lora.numpy_gradients import NumpyGradients
from exo_kimi.train.lora.recipe import LoraRecipe
from tests.train.lora.conftest import RECIPE, SHAPE

KV_B = "self_attn.kv_b_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("packed") / "q4", layout="mlx", config=SHAPE, shards=1, group_size=32)


def texts_of(directory: Path, rows: Path, count: int = 3) -> list[Encoded]:
    return read_rows(rows, Encoder.from_directory(directory))[:count]


def moved(gradients: MlxGradients | NumpyGradients, seed: int = 3) -> dict[str, np.ndarray]:
    """Parameters that change something."""
    made = {}
    for name, value in gradients.first_values().items():
        rng = np.random.default_rng([seed, *name.encode()])
        factor = 1 + 0.1 * rng.random(value.shape) if name.endswith(".m") else 0
        made[name] = (value * factor if name.endswith(".m") else rng.normal(0, 0.1, value.shape)).astype(np.float32)
    return made


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("where", ["plain", "packed"])
def test_mlx_and_numpy_have_the_same_loss_and_gradients(
    base: Path, packed: Path, rows: Path, kind: str, where: str
) -> None:
    directory = base if where == "plain" else packed
    keys = RECIPE.keys if where == "packed" else (*RECIPE.keys, KV_B)
    recipe = replace(RECIPE, fine_tune_type=kind, keys=keys)
    texts = texts_of(directory, rows)
    by_mlx = MlxGradients(recipe, load(directory, dtype="float32"))
    by_numpy = NumpyGradients(recipe, Checkpoint(directory).config, read_parameters(directory))
    first, second = by_mlx.first_values(), by_numpy.first_values()
    assert first.keys() == second.keys() and len(first) >= 11 * (2 if kind == "lora" else 3)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-6, err_msg=name)
    parameters = moved(by_numpy)
    loss, gradients = by_mlx.gradients(parameters, texts, step=0)
    oracle_loss, oracle = by_numpy.gradients(parameters, texts, step=0)
    assert loss == pytest.approx(oracle_loss, rel=1e-5)
    assert by_mlx.loss(parameters, texts) == pytest.approx(by_numpy.loss(parameters, texts), rel=1e-5)
    for name, expected in oracle.items():
        bound = 2e-4 * np.abs(expected).max()
        assert np.abs(gradients[name] - expected).max() <= bound, name
        assert np.abs(expected).max() > 0, name


def test_layers_that_are_computed_twice_give_the_same_gradients(base: Path, rows: Path) -> None:
    texts = texts_of(base, rows)
    plain = MlxGradients(RECIPE, load(base, dtype="float32"))
    again = MlxGradients(replace(RECIPE, grad_checkpoint=True), load(base, dtype="float32"))
    parameters = moved(plain)
    _, expected = plain.gradients(parameters, texts, step=0)
    _, found = again.gradients(parameters, texts, step=0)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_dropout_is_the_same_for_the_same_step(base: Path, rows: Path) -> None:
    texts = texts_of(base, rows)
    gradients = MlxGradients(replace(RECIPE, dropout=0.3), load(base, dtype="float32"))
    parameters = moved(gradients)
    one, same, other = (gradients.gradients(parameters, texts, step=step)[0] for step in (4, 4, 5))
    assert one == same != other
    assert gradients.loss(parameters, texts) == gradients.loss(parameters, texts) != one


def test_only_the_adapter_is_trained(base: Path) -> None:
    model = load(base, dtype="float32")
    MlxGradients(RECIPE, model)
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert trained and all(name.endswith(("lora_a", "lora_b")) for name in trained)
    assert not any("switch_mlp" in name or ".gate." in name for name in trained)


def test_a_row_counts_the_assistant_s_tokens_alone(base: Path, rows: Path) -> None:
    encoder = Encoder.from_directory(base)
    (text,) = texts_of(base, rows, 1)
    assert encoder.tokenizer.decode(text.ids[text.counted].tolist()).startswith("red red")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (("mlp.switch_mlp.gate_proj",), "routed experts"),
        (("mlp.gate",), "routers"),
        (("self_attn.w_proj",), "no layer that is trained has such a module"),
        (("self_attn.embed_q",), "no layer that is trained has such a module"),
    ],
)
def test_modules_that_stay_as_they_are_are_refused_by_name(base: Path, keys: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        LoraRecipe(keys=keys).modules(Checkpoint(base).config)


def test_the_last_layers_are_trained_and_no_others(base: Path) -> None:
    config = Checkpoint(base).config
    assert {spec.layer for spec in LoraRecipe(num_layers=1).modules(config)} == {1}
    assert {spec.layer for spec in LoraRecipe().modules(config)} == {0, 1}
    with pytest.raises(UsageError, match="no such number of layers"):
        LoraRecipe(num_layers=3).modules(config)


def test_kimi_linear_learns_too(tmp_path: Path, rows: Path) -> None:
    directory = make_tiny(tmp_path / "linear", layout="bf16", dtype="F32", family="linear", shards=1)
    texts = texts_of(directory, rows, 1)
    gradients = MlxGradients(
        replace(RECIPE, keys=("self_attn.q_proj", "self_attn.o_proj")), load(directory, dtype="float32")
    )
    parameters = gradients.first_values()
    loss, found = gradients.gradients(parameters, texts, step=0)
    assert all(np.isfinite(value).all() for value in found.values())
    stepped = {name: value - np.float32(0.01) * found[name] for name, value in parameters.items()}
    assert gradients.loss(stepped, texts) < loss
    mx.clear_cache()
