"""A stage's tensors: every layout resolves, ranges add up, and what does not fit is told in words."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.arch.modules import stage_modules
from exo_kimi.checkpoint.index import CheckpointIndex, open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.checkpoint.tiny.make import LAYOUTS, make_tiny
from exo_kimi.errors import CheckpointProblems, SplitError

EXPERTS = "model.layers.1.mlp.switch_mlp.up_proj"


def problems(index: CheckpointIndex) -> dict[str, str]:
    """Kind -> text; every problem has a place and a fix."""
    with pytest.raises(CheckpointProblems) as caught:
        resolve(index)
    assert all(problem.where and problem.fix for problem in caught.value.problems)
    return {type(problem).__name__: str(problem) for problem in caught.value.problems}


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointIndex]:
    root = tmp_path_factory.mktemp("layouts")
    return {layout: open_index(make_tiny(root / layout, layout=layout)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_every_layout_has_exactly_one_place(indexes: dict[str, CheckpointIndex], layout: str) -> None:
    index = indexes[layout]
    manifest = resolve(index)
    used = [entry.name for source in manifest.sources for entries in source.parts.values() for entry in entries]
    assert sorted(used) == sorted(index.tensors)
    assert [source.spec for source in manifest.sources] == list(stage_modules(index.config, 0, 7))
    assert manifest.notes == ()


@given(layout=st.sampled_from(LAYOUTS), cuts=st.sets(st.integers(1, 6)))
def test_bytes_of_a_split_add_up_to_the_whole(indexes: dict[str, CheckpointIndex], layout: str, cuts: set[int]) -> None:
    index = indexes[layout]
    whole = resolve(index)
    bounds = [0, *sorted(cuts), 7]
    stages = [resolve(index, start, end) for start, end in pairwise(bounds)]
    assert sum(stage.disk_bytes for stage in stages) == whole.disk_bytes == index.disk_bytes
    assert sum(stage.resident_bytes for stage in stages) == whole.resident_bytes
    assert [source for stage in stages for source in stage.sources] == list(whole.sources)
    assert {stage.fingerprint for stage in stages} == {whole.fingerprint}


@pytest.mark.parametrize("bounds", [(0, 0), (3, 2), (-1, 2), (0, 8), (7, None)])
def test_a_range_outside_the_model_is_refused(indexes: dict[str, CheckpointIndex], bounds: tuple[int, int]) -> None:
    with pytest.raises(SplitError):
        resolve(indexes["mlx"], *bounds)


def test_resident_bytes_follow_the_layout(indexes: dict[str, CheckpointIndex]) -> None:
    for layout, index in indexes.items():
        for source in resolve(index).sources:
            if source.layout == "int4":
                weights = source.spec.parameters
                assert source.quant == QuantSpec(4, 32)
                assert source.resident_bytes == weights // 2 + weights // 32 * 2 * 2
                assert source.disk_bytes == weights // 2 + weights // 32 * 2 + 16 * 2 * 4
            elif source.layout == "fp8":
                assert source.resident_bytes == 2 * source.spec.parameters
            else:
                assert source.resident_bytes == source.disk_bytes, layout


def test_single_experts_come_in_the_order_of_the_experts(indexes: dict[str, CheckpointIndex]) -> None:
    for layout, part in (("bf16", "weight"), ("int4", "weight_packed"), ("fp8", "weight_scale_inv")):
        source = next(source for source in resolve(indexes[layout]).sources if source.spec.path == EXPERTS)
        names = [entry.name for entry in source.parts[part]]
        assert names == [f"model.layers.1.mlp.experts.{n}.up_proj.{part}" for n in range(16)]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("recipe", ["mixed346", "plain"])
def test_absorbed_projections_replace_kv_b_proj(make, prefix: bool, recipe: str) -> None:
    manifest = resolve(open_index(make(absorbed=True, prefix=prefix, recipe=recipe)))
    paths = {source.spec.path: source for source in manifest.sources}
    assert not any(path.endswith("kv_b_proj") for path in paths)
    assert paths["model.layers.0.self_attn.embed_q"].spec.shape == (2, 128, 64)
    assert paths["model.layers.0.self_attn.unembed_out"].spec.shape == (2, 64, 128)
    assert manifest.notes == ()


def test_both_forms_of_kv_b_are_one_too_many(make) -> None:
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    extra = StoredTensor("BF16", np.zeros((256, 128), np.uint16))
    both = make(absorbed=True, recipe="plain", extra_tensors={name: extra})
    with pytest.raises(CheckpointProblems) as caught:
        resolve(open_index(both))
    assert {problem.what.split(":")[0] for problem in caught.value.problems} == {
        f"model.layers.0.self_attn.{half}.weight" for half in ("embed_q", "unembed_out")
    }


@pytest.mark.parametrize(
    "config",
    [
        {"q_lora_rank": None},
        {"n_group": 2, "topk_group": 1},
        {"rope_scaling": None},
        {"attention_bias": True},
        {"n_shared_experts": 2},
        {"n_shared_experts": 0},
        {"first_k_dense_replace": 0},
        {"model_type": "deepseek_v3"},
        {"model_type": "kimi_k25"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        {"n_routed_experts": 1, "num_experts_per_tok": 1},
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_architecture_resolves_in_every_layout(make, config: dict[str, Any], layout: str) -> None:
    index = open_index(make(layout=layout, config=config))
    assert resolve(index).disk_bytes == index.disk_bytes


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_float_dtype_resolves(make, layout: str, dtype: str) -> None:
    assert resolve(open_index(make(layout=layout, dtype=dtype))).notes == ()


def test_a_mix_of_bits_and_groups_is_read_from_the_shapes(make) -> None:
    plan = {"*": (6, 32), "lm_head": (8, 128), EXPERTS: (5, 128), "model.layers.0.self_attn.o_proj": 2}
    sources = resolve(open_index(make(recipe=plan, config={"quantization": {}}))).sources
    quants = {source.spec.path: source.quant for source in sources}
    assert quants["lm_head"] == QuantSpec(8, 128)
    assert quants[EXPERTS] == QuantSpec(5, 128)
    assert quants["model.layers.0.self_attn.o_proj"] == QuantSpec(2, 64)
    assert quants["model.embed_tokens"] == QuantSpec(6, 32)


def test_a_plain_module_with_a_hint_of_its_own_is_noted(make, edit_config) -> None:
    directory = make(recipe={"*": 4, "lm_head": None})
    assert resolve(open_index(directory)).notes == ()
    edit_config(directory, lambda raw: raw["quantization"].update(lm_head={"bits": 6}))
    edit_config(directory, lambda raw: raw.pop("quantization_config"))
    (note,) = resolve(open_index(directory)).notes
    assert note.startswith("lm_head: config.json says 6-bit; the tensor is plain BF16")


def test_experts_of_one_layer_must_agree(make, edit_header) -> None:
    directory = make(layout="int4", shards=1)
    name = "model.layers.1.mlp.experts.2.up_proj.weight_packed"
    edit_header(directory / "model.safetensors", lambda header: header[name].update(shape=[32, 32]))
    text = problems(open_index(directory))["QuantizationError"]
    assert name in text
    assert "(64, 16) I32, as 3 of 4 experts have it" in text
    assert "(32, 32) I32 (1 of 4 experts differ)" in text


def test_missing_experts_are_told_by_name(make, edit_header) -> None:
    directory = make(layout="bf16", shards=1)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    edit_header(directory / "model.safetensors", lambda header: header.update({"vision_tower.x": header.pop(name)}))
    text = problems(open_index(directory))["MissingTensorError"]
    assert text.startswith(f"{name} is missing")
    assert "4 tensors, one per expert" in text


@pytest.mark.parametrize(
    ("layout", "name", "fields", "kind", "words"),
    [
        ("bf16", "model.norm.weight", {"shape": [64, 2]}, "ShapeMismatchError", "(128,) BF16"),
        ("bf16", "model.norm.weight", {"dtype": "I16"}, "DtypeError", "BF16 or F16 or F32"),
        ("bf16", "lm_head.weight", {"shape": [128, 640]}, "ShapeMismatchError", "(640, 128)"),
        ("mlx", "lm_head.weight", {"dtype": "F32"}, "DtypeError", "U32"),
        (
            "mlx",
            "lm_head.weight",
            {"shape": [320, 48]},
            "ShapeMismatchError",
            "(640, columns) U32, packed from in=128",
        ),
        ("mlx", "lm_head.biases", {"dtype": "F16"}, "DtypeError", "BF16"),
        ("mlx", "lm_head.biases", {"shape": [1280]}, "ShapeMismatchError", "(640, 2)"),
        ("mlx", f"{EXPERTS}.scales", {"shape": [2, 64, 4]}, "ShapeMismatchError", "(4, 64, columns) BF16"),
        ("fp8", "model.layers.0.self_attn.o_proj.weight_scale_inv", {"dtype": "U32"}, "DtypeError", "F32"),
        (
            "int4",
            "model.layers.1.mlp.experts.0.up_proj.weight_shape",
            {"dtype": "F32"},
            "QuantizationError",
            "disagree",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_words(
    make, edit_header, layout: str, name: str, fields: dict[str, Any], kind: str, words: str
) -> None:
    directory = make(layout=layout, shards=1)
    edit_header(directory / "model.safetensors", lambda header: header[name].update(fields))
    found = problems(open_index(directory))
    assert list(found) == [kind]
    assert name in found[kind]
    assert words in found[kind]
    assert "model.safetensors" in found[kind]


def test_columns_that_are_no_packing_are_explained(make, edit_config) -> None:
    directory = make(recipe="uniform4")
    edit_config(directory, lambda raw: raw.update(moe_intermediate_size=96))
    with pytest.raises(CheckpointProblems) as caught:
        resolve(open_index(directory))
    texts = [str(problem) for problem in caught.value.problems]
    downs = [text for text in texts if "switch_mlp.down_proj" in text]
    assert len(downs) == 2
    assert "in=96 (moe_intermediate_size)" in downs[0]
    assert "4-bit if moe_intermediate_size were 64" in downs[0]


def test_packed_weights_without_scales_are_missing_them_and_not_plain(make, edit_header) -> None:
    directory = make(shards=1)

    def drop(header: dict[str, Any]) -> None:
        for number, part in enumerate(("scales", "biases")):
            header[f"vision_tower.{number}"] = header.pop(f"lm_head.{part}")

    edit_header(directory / "model.safetensors", drop)
    assert "lm_head.scales is missing" in problems(open_index(directory))["MissingTensorError"]


def test_asymmetric_int4_is_not_read_as_symmetric(make) -> None:
    zero_points = {
        f"model.layers.1.mlp.experts.{n}.up_proj.weight_zero_point": StoredTensor("I32", np.zeros((8, 4), np.int32))
        for n in range(4)
    }
    index = open_index(make(layout="int4", extra_tensors=zero_points))
    assert "compressed-tensors with zero points" in problems(index)["ForeignFormatError"]


def test_tensors_of_another_architecture_are_unexpected(make, edit_config) -> None:
    directory = make(layout="bf16")
    edit_config(directory, lambda raw: raw.update(q_lora_rank=None))
    found = problems(open_index(directory))
    assert "config.json describes no such module" in found["UnexpectedTensorError"]
    assert "q_proj.weight is missing" in found["MissingTensorError"]


def test_a_bias_that_the_config_does_not_know_is_unexpected(make) -> None:
    bias = {"model.layers.0.self_attn.o_proj.bias": StoredTensor("BF16", np.zeros(128, np.uint16))}
    assert (
        "o_proj.bias: no module consumes it" in problems(open_index(make(extra_tensors=bias)))["UnexpectedTensorError"]
    )


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_float_modes_are_known_by_their_uint8_scales(make, mode: str, bits: int, group_size: int) -> None:
    tensors = {
        "lm_head.weight": StoredTensor("U32", np.zeros((640, 128 * bits // 32), np.uint32)),
        "lm_head.scales": StoredTensor("U8", np.zeros((640, 128 // group_size), np.uint8)),
    }
    directory = make(recipe={"*": 4, "lm_head": None}, config={"quantization": {}}, extra_tensors=tensors)
    head = resolve(open_index(directory)).sources[-1]
    assert head.quant == QuantSpec(bits, group_size, mode)
    assert set(head.parts) == {"weight", "scales"}
    tensors["lm_head.biases"] = StoredTensor("BF16", np.zeros((640, 128 // group_size), np.uint16))
    directory = make(recipe={"*": 4, "lm_head": None}, extra_tensors=tensors)
    assert "lm_head.biases: no module consumes it" in problems(open_index(directory))["UnexpectedTensorError"]
