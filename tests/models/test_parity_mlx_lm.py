"""The model against mlx-lm's DeepSeek-V3 (which serves Kimi K2 upstream), in float32 on the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models import kimi_k2
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.loading.loader import load

SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
}
BAR = 1e-3
RECIPES: dict[str, Any] = {
    "3-bit": "uniform3",
    "4-bit": "uniform4",
    "6-bit": "uniform6",
    "8-bit": "uniform8",
    "3 up, 4 down, 6 rest": "mixed346",
    "DQ3_K_M-q8": "dq3",
    "plain": "plain",
}


def make(directory: Path, recipe: Any, **options: Any) -> Path:
    return make_tiny(directory, recipe=recipe, dtype="F32", seed=5, config=SMALL, **options)


def theirs(directory: Path) -> nn.Module:
    model, _ = load_model(directory)
    assert type(model).__module__.endswith("deepseek_v3")
    return model


def through_mlx_lm(directory: Path) -> Model:
    """Our model class in mlx-lm's own loader, as exo uses it."""
    model, _ = load_model(directory, get_model_classes=lambda config: (kimi_k2.Model, kimi_k2.ModelArgs))
    assert type(model) is Model
    return model


def logits(model: nn.Module, length: int) -> np.ndarray[Any, Any]:
    ids = np.random.default_rng(length).integers(0, 1024, length)
    return np.array(model(mx.array(ids)[None])[0])


def gap(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest difference in standard deviations of the logits."""
    return float(np.abs(found - expected).max() / expected.std())


def dequantized(model: Model) -> Model:
    """The same weights unpacked: what every quantized product should equal."""
    plain = Model(model.args)
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if "scales" in module:
            weight = mx.dequantize(
                module.weight, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
            )
            weights = {name: value for name, value in weights.items() if name.rpartition(".")[0] != path}
            weights[f"{path}.weight"] = weight
    plain.update(tree_unflatten(list(weights.items())))
    return plain


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_logits_are_those_of_mlx_lm_where_it_does_not_requantize(tmp_path: Path, recipe: Any) -> None:
    directory = make(tmp_path, recipe, absorbed=True)
    ours, upstream = load(directory), theirs(directory)
    for length in (1, 33, 300):
        assert gap(logits(ours, length), logits(upstream, length)) <= BAR


def test_greedy_tokens_are_those_of_mlx_lm(tmp_path: Path) -> None:
    directory = make(tmp_path, "mixed346", absorbed=True)
    chosen = []
    for model in (load(directory), theirs(directory)):
        cache = [KVCache() for _ in model.layers]
        step, ids = mx.arange(40)[None], []
        for _ in range(32):
            step = mx.argmax(model(step, cache)[:, -1], axis=-1)[None]
            ids.append(step.item())
        chosen.append(ids)
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_a_quantized_kv_b_proj_is_nearer_to_the_dequantized_weights_than_in_mlx_lm(tmp_path: Path, bits: int) -> None:
    directory = make(tmp_path, f"uniform{bits}")
    ours, upstream = load(directory), theirs(directory)
    oracle = dequantized(ours)
    for length in (1, 33, 300):
        expected = logits(oracle, length)
        assert gap(logits(ours, length), expected) <= BAR
        assert gap(logits(ours, length), expected) < gap(logits(upstream, length), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "mixed346"},
        {"recipe": "mixed346", "absorbed": True},
        {"recipe": "plain", "layout": "bf16"},
        {"recipe": "plain", "prefix": True, "vision": True},
        {"recipe": None, "layout": "fp8"},
        {"recipe": None, "layout": "int4"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_mlx_lms_loader_fills_this_model_with_what_ours_does(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = make(tmp_path, **options)
    if options.get("layout") in ("fp8", "int4"):
        # Its loader reads e4m3 as uint8 and INT4 by this config, as `load_model` does for kimi_k2 itself.
        assert "quantization_config" in json.loads((directory / "config.json").read_text())
    found = dict(tree_flatten(through_mlx_lm(directory).parameters()))
    expected = dict(tree_flatten(load(directory).parameters()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert mx.array_equal(found[name], value), name
