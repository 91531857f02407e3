"""A Kimi K2 at its real size as sparse files: a dry run has the planner's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.config import FP8_CONFIG, INT4_CONFIG
from exo_kimi.compress.convert.command import outlook
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.catalog import read_model
from exo_kimi.planner.weights.recipes import load_recipe

BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4}


def published(spec: ModuleSpec, layout: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a module as Moonshot publishes them."""
    if spec.kind == "experts":
        experts, out, into = spec.shape
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for expert in range(experts):
            path = spec.path.replace("switch_mlp", f"experts.{expert}")
            if layout == "int4":
                found[f"{path}.weight_packed"] = ("I32", (out, into // 8))
                found[f"{path}.weight_scale"] = ("BF16", (out, into // 32))
                found[f"{path}.weight_shape"] = ("I32", (2,))
            else:
                found[f"{path}.weight"] = ("F8_E4M3", (out, into))
                found[f"{path}.weight_scale_inv"] = ("F32", (out // 128, into // 128))
        return found
    if layout == "fp8" and spec.kind == "linear" and spec.path != "lm_head":
        out, into = spec.shape
        blocks = (-(-out // 128), -(-into // 128))
        return {f"{spec.path}.weight": ("F8_E4M3", spec.shape), f"{spec.path}.weight_scale_inv": ("F32", blocks)}
    found = {f"{spec.path}.weight": ("BF16", spec.shape)}
    if spec.kind == "router":
        found[f"{spec.path}.e_score_correction_bias"] = ("F32", spec.shape[:1])
    return found


def write_hollow(root: Path, raw: dict[str, Any], layout: str) -> KimiConfig:
    """Headers with sparse data behind them, a file a layer."""
    root.mkdir()
    quantization = {"int4": INT4_CONFIG, "fp8": FP8_CONFIG}[layout]
    (root / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))
    config = KimiConfig.from_dict(raw, where=root)
    files: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for spec in stage_modules(config, 0, config.num_hidden_layers):
        files.setdefault(f"model-{spec.layer}.safetensors", {}).update(published(spec, layout))
    for file, tensors in files.items():
        header, offset = {}, 0
        for name, (dtype, shape) in tensors.items():
            size = BYTES[dtype]
            for dim in shape:
                size *= dim
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        with (root / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    return config


@pytest.mark.parametrize("layout", ["int4"])  # fp8 has the same bytes, and a third fewer tensors
def test_a_dry_run_of_61_layers_has_the_planners_bytes(layout: str, tmp_path: Path, raw_k2: dict[str, Any]) -> None:
    config = write_hollow(tmp_path / "k2", raw_k2, layout)
    recipe = load_recipe("dq3_k_m-q8")
    foreseen = outlook(make_conversion(Checkpoint(tmp_path / "k2"), tmp_path / "out", recipe))
    assert foreseen.text_bytes == 470_628_683_776 == bytes_of_recipe(config, recipe, name="k2").total_bytes
    assert foreseen.files > 90
    assert foreseen.seconds > 0


@pytest.fixture
def raw_k2() -> dict[str, Any]:
    """config.json of a Kimi K2, from the planner's catalogue."""
    from exo_kimi.planner import data

    assert read_model("models", "kimi-k2-thinking")
    return dict(data.load("models", "kimi-k2-thinking")["config"])
