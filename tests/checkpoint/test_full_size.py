"""A Kimi K2 at its real size, as headers over sparse files: speed and exact bytes without half a terabyte."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.repair import repair
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.config import text_config
from exo_kimi.checkpoint.tiny.weights import resolve_recipe, with_absorbed
from exo_kimi.errors import QuantizationError

BYTES = {"U32": 4, "BF16": 2, "F32": 4, "I32": 4}
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def mlx_shapes(spec: ModuleSpec, choose: Callable[[ModuleSpec], tuple[int, int] | None]) -> Shapes:
    chosen = choose(spec)
    if chosen is None:
        shapes: Shapes = {"weight": ("BF16", spec.shape)}
    else:
        *rows, into = spec.shape
        bits, group = chosen
        scales = (*rows, into // group)
        shapes = {
            "weight": ("U32", (*rows, into * bits // 32)),
            "scales": ("BF16", scales),
            "biases": ("BF16", scales),
        }
    if spec.kind == "router":
        shapes["e_score_correction_bias"] = ("F32", spec.shape[:1])
    return {f"{spec.path}.{part}": value for part, value in shapes.items()}


def int4_shapes(spec: ModuleSpec) -> Shapes:
    if spec.kind != "experts":
        return mlx_shapes(spec, lambda _: None)
    experts, out, into = spec.shape
    shapes: Shapes = {}
    for expert in range(experts):
        path = spec.path.replace("switch_mlp", f"experts.{expert}")
        shapes[f"{path}.weight_packed"] = ("I32", (out, into // 8))
        shapes[f"{path}.weight_scale"] = ("BF16", (out, into // 32))
        shapes[f"{path}.weight_shape"] = ("I32", (2,))
    return shapes


def write_hollow(root: Path, raw: dict[str, Any], tensors: Shapes, files: int) -> int:
    """Headers with sparse data behind them; returns the bytes of all tensors."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(raw))
    weight_map, total = {}, 0
    names = list(tensors)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header, offset = {}, 0
        for name in names[number * len(names) // files : (number + 1) * len(names) // files]:
            dtype, shape = tensors[name]
            size = BYTES[dtype]
            for dim in shape:
                size *= dim
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (root / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
        total += offset
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


@pytest.fixture
def k2_config(k2_dims: dict[str, Any]) -> dict[str, Any]:
    return text_config(k2_dims, dtype="BF16")


def specs_of(raw: dict[str, Any]) -> tuple[ModuleSpec, ...]:
    config = KimiConfig.from_dict(raw)
    return stage_modules(config, 0, config.num_hidden_layers)


@pytest.mark.parametrize(
    ("recipe", "absorbed", "total_gb"),
    [("mixed346", False, 495.9), ("uniform4", False, 577.6), ("uniform3", False, 449.3), ("dq3", True, 470.6)],
)
def test_bytes_of_each_recipe_are_those_of_the_published_checkpoints(
    tmp_path: Path, k2_config: dict[str, Any], recipe: str, absorbed: bool, total_gb: float
) -> None:
    specs = specs_of(k2_config)
    if absorbed:
        specs = with_absorbed(KimiConfig.from_dict(k2_config), specs)
    choose = resolve_recipe(recipe, 64)
    tensors = {name: value for spec in specs for name, value in mlx_shapes(spec, choose).items()}
    total = write_hollow(tmp_path / "k2", k2_config, tensors, 96)
    manifest = resolve(open_index(tmp_path / "k2"))
    assert manifest.disk_bytes == manifest.resident_bytes == total
    assert total / 1e9 == pytest.approx(total_gb, abs=0.06)
    if recipe == "dq3":
        assert total == 470_628_683_776


def test_a_full_size_mlx_checkpoint_is_read_in_well_under_a_second(tmp_path: Path, k2_config: dict[str, Any]) -> None:
    choose = resolve_recipe("mixed346", 64)
    tensors = {name: value for spec in specs_of(k2_config) for name, value in mlx_shapes(spec, choose).items()}
    write_hollow(tmp_path / "k2", k2_config, tensors, 96)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        index = open_index(tmp_path / "k2")
        resolve(index)
        best = min(best, time.process_time() - start)
    assert len(index.tensors) > 2000
    assert best < 0.5


def test_the_official_int4_is_held_at_5_bits_an_expert_weight(tmp_path: Path, k2_config: dict[str, Any]) -> None:
    tensors = {name: value for spec in specs_of(k2_config) for name, value in int4_shapes(spec).items()}
    write_hollow(tmp_path / "k2", k2_config, tensors, 62)
    manifest = resolve(open_index(tmp_path / "k2"))
    assert manifest.resident_bytes / 1e9 == pytest.approx(657.6, abs=0.06)
    experts = [source for source in manifest.sources if source.spec.kind == "experts"]
    assert {source.resident_bytes * 8 / source.spec.parameters for source in experts} == {5.0}


def test_896_against_672_is_explained(tmp_path: Path, k2_config: dict[str, Any]) -> None:
    choose = resolve_recipe("uniform3", 64)
    tensors = {name: value for spec in specs_of(k2_config) for name, value in mlx_shapes(spec, choose).items()}
    write_hollow(tmp_path / "k2", {**k2_config, "quantization": {"bits": 4, "group_size": 64}}, tensors, 2)
    report = inspect(tmp_path / "k2")
    assert report.ok
    note = next(note for note in report.notes if "672" in note)
    assert (
        "config.json says 4-bit, group 64; the shapes say 3-bit, group 64: "
        "672 columns = 7168 * 3 / 32, where 4-bit would be 896 = 7168 * 4 / 32" in note
    )


def test_a_full_size_directory_is_examined_in_a_second_and_its_bits_repaired(
    tmp_path: Path, k2_config: dict[str, Any]
) -> None:
    choose = resolve_recipe("mixed346", 64)
    tensors = {name: value for spec in specs_of(k2_config) for name, value in mlx_shapes(spec, choose).items()}
    write_hollow(tmp_path / "k2", {**k2_config, "quantization": {"bits": 4, "group_size": 64}}, tensors, 96)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        diagnosis = doctor(tmp_path / "k2")
        best = min(best, time.process_time() - start)
    assert best < 1.0
    wrong = [finding for finding in diagnosis.findings if isinstance(finding.error, QuantizationError)]
    assert len(wrong) > 1
    assert all(finding.fixable for finding in wrong)
    repair(tmp_path / "k2")
    section = json.loads((tmp_path / "k2" / "config.json").read_text())["quantization"]
    assert section["model.layers.60.mlp.switch_mlp.gate_proj"]["bits"] == 3
    assert resolve(open_index(tmp_path / "k2")).corrections == {}
