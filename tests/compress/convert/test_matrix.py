"""Every layout into every recipe: strict loading, the planner's bytes, the recipe's bits, and mlx-lm's own word."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.packing import store
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import CheckpointProblems, UsageError
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.recipes import Recipe, load_recipe, parse_recipe
from exo_kimi.runtime.loading.loader import load

Convert = Callable[..., Checkpoint]

SOURCES = (
    "bf16",
    "stacked floats",
    "fp16",
    "fp32",
    "fp8",
    "int4",
    "mlx 3, 4, 6",
    "mlx 8",
    "mlx 5, absorbed",
    "k2.5 int4 with a tower",
    "k2.5 mlx",
)
MIXED = {
    "name": "everything",
    "rest": {"bits": 8, "group_size": 32},
    "rule": [
        {"mode": "mxfp4", "kinds": ["experts"], "layers": ["1"]},
        {"bits": 2, "group_size": 128, "kinds": ["experts"], "names": ["up_proj"]},
        {"bits": 16, "names": ["lm_head"]},
        {"bits": 5, "group_size": 64, "paths": ["model.layers.*.self_attn.kv_b_proj"]},
    ],
}
RECIPES = (
    "bf16",
    "int4",
    "int4+q8",
    "q34+q6",
    "founding",
    "dq3_k_m-q8",
    "uniform-2",
    "uniform-5",
    "mxfp4",
    "nvfp4",
    "mxfp8",
    "everything",
)
# Relative error of a weight of these bits, with room: 8-bit .006, 6 .025, 5 .05, 4 .1, 3 .2, 2 .4 of normal weights.
WORST = {8: 0.008, 6: 0.03, 5: 0.06, 4: 0.13, 3: 0.25, 2: 0.5}
TOKENS = [5, 9, 100, 33, 7, 250, 12]


# All of them with EXO_KIMI_FULL_MATRIX=1; else every source and every recipe, in company.
_SOME = (("everything", "bf16"), ("int4",))
PAIRS = [
    (name, recipe)
    for name in SOURCES
    for recipe in RECIPES
    if os.environ.get("EXO_KIMI_FULL_MATRIX") or recipe in _SOME[0] or name in _SOME[1]
]


def recipe_of(name: str) -> Recipe:
    return parse_recipe(MIXED, where="test") if name == "everything" else load_recipe(name)


@pytest.mark.parametrize(("name", "recipe_name"), PAIRS)
def test_every_layout_into_every_recipe(
    name: str, recipe_name: str, source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    recipe, source = recipe_of(recipe_name), Checkpoint(source_of(name))
    output = converted(source.directory, tmp_path / "out", recipe)
    manifest = output.manifest()
    assert manifest.notes == () or (manifest.notes and all("vision" in note for note in manifest.notes))
    assert manifest.disk_bytes == manifest.resident_bytes
    assert manifest.resident_bytes == bytes_of_recipe(source.config, recipe, name=name).total_bytes
    assert {s.spec.path: s.quant for s in manifest.sources} == {
        s.spec.path: recipe.packing(s.spec) for s in manifest.sources
    }
    assert not inspect(output.directory).problems
    assert not doctor(output.directory).findings
    assert_near(source, output)
    own = np.array(load(output.directory, dtype="float32")(mx.array([TOKENS])).astype(mx.float32))
    assert np.isfinite(own).all()
    if "fp16" not in name:  # mlx-lm on a CPU: some products of half precision are not there
        theirs, _ = load_model(output.directory)
        theirs.set_dtype(mx.float32)
        logits = np.array(theirs(mx.array([TOKENS])).astype(mx.float32))
        assert np.abs(logits - own).max() < 1e-4 * own.std()


def assert_near(source: Checkpoint, output: Checkpoint) -> None:
    """Every weight is the source's, within the error of its bits and of the source's own that are multiplied out before."""
    before = {each.spec.path: each for each in source.manifest().sources}
    with RangeReader(source.directory) as old, RangeReader(output.directory) as new:
        for each in output.manifest().sources:
            if each.spec.path not in before:  # halves of a kv_b_proj: their logits are compared
                continue
            rows, other = SourceRows(new, each), SourceRows(old, before[each.spec.path])
            for matrix in range(rows.matrices):
                wanted, found = other.floats(matrix, 0, rows.out), rows.floats(matrix, 0, rows.out)
                error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
                worst = 0.004 if each.quant is None else WORST[each.quant.bits]
                worst = 0.04 if each.quant is not None and each.quant.mode == "mxfp8" else worst
                assert error < worst, f"{each.spec.path}: {error}"


def test_the_tower_is_carried_byte_for_byte_and_only_by_the_first_stage(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    source = Checkpoint(source_of("k2.5 int4 with a tower"))
    output = converted(source.directory, tmp_path / "all", "q34+q6")
    towers = [name for name in source.index.tensors if "vision_tower" in name or "mm_projector" in name]
    assert len(towers) > 10
    with RangeReader(source.directory) as old, RangeReader(output.directory) as new:
        for name in towers:
            one, other = source.index.tensors[name], output.index.tensors[name]
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert old.read(one).tobytes() == new.read(other).tobytes()
    last = converted(source.directory, tmp_path / "last", "q34+q6", layers=(1, 2))
    assert not [name for name in last.index.tensors if "vision_tower" in name]


def test_a_share_holds_its_layers_and_loads(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    source = source_of("int4")
    whole = converted(source, tmp_path / "whole", "founding")
    for start, end in ((0, 1), (1, 2)):
        share = converted(source, tmp_path / f"share{start}", "founding", layers=(start, end))
        assert share.manifest(start, end).disk_bytes == share.index.disk_bytes
        assert share.manifest(start, end).disk_bytes == whole.manifest(start, end).disk_bytes
        load(share.directory, start, end)


def test_tensors_of_no_known_name_stop_it_by_name(
    small_config: dict[str, int], converted: Convert, tmp_path: Path
) -> None:

    extra = {"model.layers.1.mlp.adapter.weight": store(np.ones((2, 2), np.float32), "BF16")}
    source = make_tiny(tmp_path / "odd", layout="bf16", config=small_config, extra_tensors=extra)
    with pytest.raises(CheckpointProblems, match=r"mlp\.adapter\.weight"):
        converted(source, tmp_path / "out", "uniform-4")
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_said(small_config: dict[str, int], tmp_path: Path) -> None:

    extra = {
        "model.layers.2.eh_proj.weight": store(np.ones((2, 2), np.float32), "BF16"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": store(np.ones(4, np.float32), "F32"),
    }
    source = make_tiny(tmp_path / "odd", layout="bf16", config=small_config, extra_tensors=extra)
    conversion = make_conversion(Checkpoint(source), tmp_path / "out", load_recipe("uniform-4"))
    told = " ".join(conversion.notes())
    assert "1 tensors are left out: multi-token prediction layer" in told
    assert "rope frequencies" in told


def test_a_recipe_whose_groups_do_not_divide_is_refused(
    small_config: dict[str, int], converted: Convert, tmp_path: Path
) -> None:

    config = {**small_config, "moe_intermediate_size": 96}
    source = make_tiny(tmp_path / "narrow", layout="bf16", config=config)
    with pytest.raises(UsageError, match="groups do not divide"):
        converted(source, tmp_path / "out", "uniform-4")


def test_config_json_says_every_module_in_mlx_words(
    source_of: Callable[[str], Path], converted: Convert, tmp_path: Path
) -> None:
    output = converted(source_of("int4"), tmp_path / "out", recipe_of("everything"))
    config = json.loads((output.directory / "config.json").read_text())
    section = config["quantization"]
    assert section == config["quantization_config"]
    assert section["model.layers.1.mlp.switch_mlp.down_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert section["lm_head"] is False
    assert section["model.layers.1.self_attn.embed_q"] == {"group_size": 64, "bits": 5, "mode": "affine"}
