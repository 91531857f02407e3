"""Commands that measure and train, on a tiny Kimi Linear whose routers are packed: each works, or refuses it by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.calibrate.inputs import write_inputs
from exo_kimi.errors import UnsupportedModelError
from exo_kimi.train.draft.command import train_draft
from exo_kimi.train.draft.recipe import DraftRecipe
from exo_kimi.train.export import requantize
from exo_kimi.train.rl.command import train_grpo
from exo_kimi.train.rl.recipe import GrpoRecipe

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_hidden_layers": 2,
    "linear_attn_config": {
        "head_dim": 64,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
        "full_attn_layers": [2],
        "kda_layers": [1],
    },
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "tiny"
    return make_tiny(directory, family="linear", layout="mlx", recipe="uniform4", config=SMALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The river is long, and the sea is wide. " * 4)
    return file


def test_inputs_are_measured_of_all_modules_but_routers(packed: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "inputs.safetensors"
    write_inputs(packed, [text], output, most_tokens=24, dtype="float32", say=lambda _: None)
    found = set(load_file(output))
    assert {"model.layers.0.self_attn.f_b_proj", "model.layers.1.self_attn.kv_b_proj"} <= found
    assert not any(path.endswith("mlp.gate") for path in found)


def test_experts_are_weighed_behind_a_packed_router(packed: Path, text: Path, tmp_path: Path) -> None:
    from exo_kimi.cli import main

    output = tmp_path / "scores.json"
    arguments = ["calibrate", str(packed), "--text", str(text), "-o", str(output), "--tokens", "24"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    assert json.loads(output.read_text())


TRAINERS: dict[str, Callable[[Path, Path], object]] = {
    "draft": lambda directory, output: train_draft(directory, output, DraftRecipe()),
    "grpo": lambda directory, output: train_grpo(directory, output, GrpoRecipe()),
    "requantize": lambda directory, output: requantize(directory, output, recipe="uniform-4"),
}


@pytest.mark.parametrize("command", TRAINERS)
def test_training_refuses_it_by_name(packed: Path, tmp_path: Path, command: str) -> None:
    with pytest.raises(UnsupportedModelError, match="a Kimi K2 alone is trained here") as caught:
        TRAINERS[command](packed, tmp_path / "out")
    assert caught.value.found == "model_type kimi_linear"
