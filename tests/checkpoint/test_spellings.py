"""Spellings of other programs are read as what they mean: same bytes, same values, and a wrong one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.report import inspect
from exo_kimi.checkpoint.hints import read_hints
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.safetensors_io import StoredTensor, read_header, write_file
from exo_kimi.errors import CheckpointError, ConfigError, ForeignFormatError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load

Make = Callable[..., Path]
Tensors = dict[str, StoredTensor]
KINDS: dict[str, Any] = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16, "U32": np.uint32, "I32": np.int32}
KINDS |= {"U8": np.uint8, "F8_E4M3": np.uint8}


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write the one weight file again with other tensors."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    tensors = {
        entry.name: StoredTensor(
            entry.dtype, np.frombuffer(data[entry.start : entry.end], KINDS[entry.dtype]).reshape(entry.shape)
        )
        for entry in read_header(path)[1]
    }
    write_file(path, change(tensors))


def same_weights(one: Path, other: Path) -> None:
    """Both load as the same model, through our loader and through mlx-lm's way in."""
    models = [dict(tree_flatten(load(path).parameters())) for path in (one, other)]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        assert mx.array_equal(value, models[1][name]), name


def through_sanitize(directory: Path) -> dict[str, mx.array]:
    config = resolve(open_index(directory)).config
    weights = {k: v for file in directory.glob("*.safetensors") for k, v in mx.load(str(file)).items()}
    return Model(config).sanitize(weights)


def fused(tensors: Tensors) -> Tensors:
    """Experts as transformers 5 saves them: one gate_up_proj and one down_proj a layer."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    layers = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        count = sum(name.startswith(f"{layer}.experts.") and "down_proj" in name for name in tensors)

        def stack(name: str, layer: str = layer, count: int = count) -> Any:
            return np.stack([tensors[f"{layer}.experts.{e}.{name}.weight"].data for e in range(count)])

        kept[f"{layer}.experts.gate_up_proj"] = StoredTensor(
            "BF16", np.concatenate([stack("gate_proj"), stack("up_proj")], axis=1)
        )
        kept[f"{layer}.experts.down_proj"] = StoredTensor("BF16", stack("down_proj"))
    return kept


def test_fused_experts_are_the_same_model(make: Make) -> None:
    plain, other = make(layout="bf16", shards=1), make(layout="bf16", shards=1)
    rewrite(other, fused)
    assert any(name.endswith("experts.gate_up_proj") for name in open_index(other).tensors)
    assert not doctor(other, deep=True).findings
    same_weights(plain, other)
    one, two = through_sanitize(plain), through_sanitize(other)
    assert one.keys() == two.keys()
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_a_fused_tensor_of_another_number_of_experts_is_refused(make: Make) -> None:
    directory = make(layout="bf16", shards=1)

    def shorter(tensors: Tensors) -> Tensors:
        return {
            name: StoredTensor(tensor.dtype, tensor.data[:-1]) if name.endswith("gate_up_proj") else tensor
            for name, tensor in fused(tensors).items()
        }

    rewrite(directory, shorter)
    with pytest.raises(CheckpointError, match="gate_up_proj: no module consumes it"):
        resolve(open_index(directory))


def test_packed_experts_whose_gate_and_up_are_one_are_the_same_model(make: Make) -> None:
    plain, other = make(shards=1), make(shards=1)

    def join(tensors: Tensors) -> Tensors:
        kept = dict(tensors)
        for name in tensors:
            base, found, part = name.partition(".switch_mlp.gate_proj.")
            up = f"{base}.switch_mlp.up_proj.{part}"
            if found and tensors[name].data.shape == tensors[up].data.shape:
                both = [kept.pop(each).data for each in (name, up)]
                kept[f"{base}.switch_mlp.gate_up_proj.{part}"] = StoredTensor(
                    tensors[name].dtype, np.concatenate(both, axis=1)
                )
        return kept

    rewrite(other, join)
    assert any("gate_up_proj.scales" in name for name in open_index(other).tensors)
    same_weights(plain, other)


def test_a_correction_bias_beside_the_router_is_the_router_s(make: Make) -> None:
    plain, other = make(layout="bf16", shards=1), make(layout="bf16", shards=1)
    rewrite(
        other, lambda tensors: {name.replace(".mlp.gate.e_score", ".mlp.e_score"): t for name, t in tensors.items()}
    )
    assert any(name.endswith(".mlp.e_score_correction_bias") for name in open_index(other).tensors)
    assert doctor(other).healthy
    same_weights(plain, other)
    assert through_sanitize(plain).keys() == through_sanitize(other).keys()


LAYERS = ["dense", "sparse", "sparse"]


@pytest.mark.parametrize(
    "change",
    [
        {"mlp_layer_types": LAYERS},
        {"mlp_layer_types": LAYERS, "layer_types": ["full_attention"] * 3},
        {"mlp_layer_types": LAYERS, "first_k_dense_replace": None},
        {"n_group": None, "topk_group": None},
        {"n_group": None},
        {"layer_types": None, "mlp_layer_types": None},
    ],
)
def test_what_transformers_5_writes_in_other_words_is_the_same_config(
    make: Make, edit_config: Any, change: dict[str, Any]
) -> None:
    directory = make()
    before = resolve(open_index(directory)).config
    edit_config(directory, lambda raw: raw.update(change))
    assert resolve(open_index(directory)).config == before
    assert doctor(directory).healthy


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
        ({"mlp_layer_types": "sparse"}, "mlp_layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"first_k_dense_replace": None, "mlp_layer_types": ["odd"]}, "first_k_dense_replace is missing"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
    ],
)
def test_a_list_of_layers_that_is_another_model_is_refused(
    make: Make, edit_config: Any, change: dict[str, Any], word: str
) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(change))
    raw = json.loads((directory / "config.json").read_text())
    with pytest.raises(ConfigError, match=word):
        KimiConfig.from_dict(raw)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_in_the_directory_is_said_not_to_be_applied(make: Make, name: str) -> None:
    directory = make()
    assert not any("LoRA" in note for note in doctor(directory).notes)
    if name.endswith(".json"):
        (directory / name).write_text("{}")
    else:
        write_file(directory / name, {"model.layers.0.self_attn.o_proj.lora_a": StoredTensor("F32", np.ones((2, 2)))})
    for notes in (doctor(directory).notes, inspect(directory).notes):
        assert any("LoRA adapter, which is not applied" in note and name in note for note in notes)


def test_fp8_blocks_whose_factor_is_called_weight_scale_are_the_same_model(make: Make) -> None:
    plain, other = make(layout="fp8", shards=1), make(layout="fp8", shards=1)
    rewrite(other, lambda tensors: {name.replace("weight_scale_inv", "weight_scale"): t for name, t in tensors.items()})
    assert any(name.endswith(".weight_scale") for name in open_index(other).tensors)
    assert not doctor(other, deep=True).errors
    same_weights(plain, other)
    one, two = through_sanitize(plain), through_sanitize(other)
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_fp8_with_a_factor_for_each_row_is_named(make: Make, edit_config: Any) -> None:
    directory = make(layout="fp8", shards=1)

    def by_row(tensors: Tensors) -> Tensors:
        kept: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith("_inv"):
                rows = tensors[name.removesuffix("_scale_inv")].data.shape[0]
                tensor = StoredTensor("F32", np.ones((rows, 1), np.float32))
            kept[name.removesuffix("_inv")] = tensor
        return kept

    rewrite(directory, by_row)
    section = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    edit_config(directory, lambda raw: raw.update(quantization_config=section))
    (finding,) = doctor(directory).errors
    assert isinstance(finding.error, ForeignFormatError)
    assert "for each channel" in finding.error.what


def test_int4_without_its_shapes_is_the_same_model(make: Make) -> None:
    plain, other = make(layout="int4", shards=1), make(layout="int4", shards=1)
    rewrite(other, lambda tensors: {name: t for name, t in tensors.items() if not name.endswith("weight_shape")})
    assert not doctor(other, deep=True).findings
    same_weights(plain, other)
    one, two = through_sanitize(plain), through_sanitize(other)
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_one_shape_that_is_missing_among_others_is_missing(make: Make) -> None:
    directory = make(layout="int4", shards=1)
    name = "model.layers.1.mlp.experts.2.up_proj.weight_shape"
    rewrite(directory, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match="weight_shape is missing"):
        resolve(open_index(directory))


def packed_integers(weight: Any, bits: int, group: int) -> tuple[Any, Any, Any]:
    """compressed-tensors' pack-quantized (out, in): words, scales as bf16 bits, and the values that they mean."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, group)
    most = 2 ** (bits - 1) - 1
    raw = (np.abs(grouped).max(-1) / most).astype(np.float32).view(np.uint32) >> 16
    scales = (raw << 16).view(np.float32)
    codes = np.clip(np.rint(grouped / scales[..., None]), -most - 1, most).astype(np.int64)
    unsigned = (codes + 2 ** (bits - 1)).reshape(rows, columns)
    words = np.zeros((rows, columns * bits // 32), np.uint32)
    for place in range(32 // bits):
        words |= unsigned[:, place :: 32 // bits].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32), raw.astype(np.uint16), (codes * scales[..., None]).reshape(rows, columns)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (8, 32), (8, 64)])
def test_integers_of_two_four_and_eight_bits_are_read_exactly(
    make: Make, edit_config: Any, bits: int, group: int
) -> None:
    directory = make(layout="bf16", shards=1)
    meant: dict[str, Any] = {}

    def pack(tensors: Tensors) -> Tensors:
        kept: Tensors = {}
        for name, tensor in tensors.items():
            if ".experts." not in name and ".shared_experts." not in name:
                kept[name] = tensor
                continue
            base = name.removesuffix(".weight")
            weight = (tensor.data.astype(np.uint32) << 16).view(np.float32)
            words, scales, meant[base] = packed_integers(weight, bits, group)
            kept[f"{base}.weight_packed"] = StoredTensor("I32", words)
            kept[f"{base}.weight_scale"] = StoredTensor("BF16", scales)
            kept[f"{base}.weight_shape"] = StoredTensor("I32", np.array(weight.shape, np.int32))
        return kept

    rewrite(directory, pack)
    weights = {"num_bits": bits, "group_size": group, "type": "int", "symmetric": True}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
    }
    edit_config(directory, lambda raw: raw.update(quantization_config=section))
    assert not doctor(directory, deep=True).errors
    model = load(directory, dtype="float32")
    for layer in (1, 2):
        mlp = model.layers[layer].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            base = f"model.layers.{layer}.mlp"
            experts = np.stack([meant[f"{base}.experts.{e}.{name}"] for e in range(4)])
            pairs = (
                (mlp.shared_experts[name], meant[f"{base}.shared_experts.{name}"]),
                (mlp.switch_mlp[name], experts),
            )
            for module, wanted in pairs:
                found = mx.dequantize(module.weight, module.scales, module.biases, group_size=group, bits=bits)
                assert np.array_equal(np.array(found), wanted.astype(np.float32)), name
    sanitized = through_sanitize(directory)["model.layers.1.mlp.switch_mlp.up_proj.biases"].astype(mx.float32)
    assert mx.array_equal(sanitized, model.layers[1].mlp.switch_mlp.up_proj.biases)


def test_several_groups_of_bits_in_one_config_are_told_apart(make: Make, edit_config: Any) -> None:
    experts = {"targets": [r"re:.*mlp\.experts\..*"], "weights": {"num_bits": 4, "group_size": 32}}
    shared = {"targets": ["re:.*shared_experts.*"], "weights": {"num_bits": 8, "group_size": 64}}
    rest = {"targets": ["Linear"], "weights": {"num_bits": 2, "group_size": 32}}
    groups = {"experts": experts, "shared": shared, "rest": rest}
    hints = read_hints({"quantization_config": {"config_groups": groups, "ignore": ["lm_head"]}})
    asked = {
        "model.layers.1.mlp.switch_mlp.up_proj": (4, 32),
        "model.layers.1.mlp.shared_experts.up_proj": (8, 64),
        "model.layers.0.mlp.up_proj": (2, 32),
        "lm_head": (0, None),
    }
    for path, (bits, group) in asked.items():
        hint, _ = hints.for_path(path)
        assert (hint.bits, hint.group_size) == (bits, group), path
    directory = make(layout="int4", shards=1)
    section = {"quant_method": "compressed-tensors", "config_groups": {"a": experts, "b": shared}}
    edit_config(directory, lambda raw: raw.update(quantization_config=section))
    assert not doctor(directory).findings


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.mark.parametrize("scale_dtype", ["U8", "F8_E8M0"])
def test_mxfp4_of_compressed_tensors_is_read_where_it_lies(make: Make, edit_config: Any, scale_dtype: str) -> None:
    """Two codes a byte, the lower nibble first; an exponent for each 32."""
    directory = make(layout="bf16", shards=1)
    random = np.random.default_rng(0)
    meant: dict[str, Any] = {}

    def pack(tensors: Tensors) -> Tensors:
        kept: Tensors = {}
        for name, tensor in tensors.items():
            if ".experts." not in name:
                kept[name] = tensor
                continue
            rows, columns = tensor.data.shape
            codes = random.integers(0, 16, (rows, columns), np.uint8)
            exponents = random.integers(118, 124, (rows, columns // 32), np.uint8)
            base = name.removesuffix(".weight")
            kept[f"{base}.weight_packed"] = StoredTensor("U8", codes[:, ::2] | codes[:, 1::2] << 4)
            kept[f"{base}.weight_scale"] = StoredTensor("U8", exponents)
            meant[base] = FP4[codes] * np.exp2(exponents.astype(np.float32) - 127).repeat(32, axis=1)
        return kept

    rewrite(directory, pack)
    if scale_dtype != "U8":  # safetensors' name of the same byte
        path = directory / "model.safetensors"
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        for name, fields in header.items():
            if name.endswith("weight_scale"):
                fields["dtype"] = scale_dtype
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    section = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    edit_config(directory, lambda raw: raw.update(quantization_config=section))
    assert not doctor(directory, deep=True).errors
    model = load(directory, dtype="float32")
    stacked = model.layers[1].mlp.switch_mlp.up_proj
    found = mx.dequantize(stacked.weight, stacked.scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    wanted = np.stack([meant[f"model.layers.1.mlp.experts.{e}.up_proj"] for e in range(4)])
    assert np.array_equal(np.array(found), wanted)
    logits = model(mx.array([[1, 2, 3]]))
    assert bool(mx.isfinite(logits).all())
    if scale_dtype == "U8":
        assert "model.layers.1.mlp.switch_mlp.up_proj.biases" not in through_sanitize(directory)
