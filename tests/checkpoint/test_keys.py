"""One table parses every name of every layout."""

from __future__ import annotations

import pytest

from exo_kimi.checkpoint.keys import SkippedKey, TensorKey, canonical_path, parse_key
from exo_kimi.checkpoint.safetensors_io import read_header
from exo_kimi.checkpoint.tiny.make import LAYOUTS
from tests.work import calls_of

LAYER = "model.layers.3"


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.embed_tokens.weight", TensorKey("model.embed_tokens", "weight", None, None)),
        ("lm_head.scales", TensorKey("lm_head", "scales", None, None)),
        ("model.norm.weight", TensorKey("model.norm", "weight", None, None)),
        (f"{LAYER}.self_attn.embed_q.biases", TensorKey(f"{LAYER}.self_attn.embed_q", "biases", 3, None)),
        (f"{LAYER}.self_attn.q_a_proj.bias", TensorKey(f"{LAYER}.self_attn.q_a_proj", "bias", 3, None)),
        (
            f"{LAYER}.mlp.gate.e_score_correction_bias",
            TensorKey(f"{LAYER}.mlp.gate", "e_score_correction_bias", 3, None),
        ),
        (f"{LAYER}.mlp.switch_mlp.up_proj.weight", TensorKey(f"{LAYER}.mlp.switch_mlp.up_proj", "weight", 3, None)),
        (
            f"{LAYER}.mlp.experts.17.up_proj.weight_packed",
            TensorKey(f"{LAYER}.mlp.switch_mlp.up_proj", "weight_packed", 3, 17),
        ),
        (f"{LAYER}.mlp.down_proj.weight_scale_inv", TensorKey(f"{LAYER}.mlp.down_proj", "weight_scale_inv", 3, None)),
    ],
)
def test_names_become_module_part_layer_and_expert(prefix: str, name: str, key: TensorKey) -> None:
    assert parse_key(prefix + name) == key


def test_the_nesting_of_transformers_5_is_understood() -> None:
    key = parse_key("model.language_model.layers.3.mlp.gate.weight")
    assert key == TensorKey("model.layers.3.mlp.gate", "weight", 3, None)


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.blocks.0.wqkv.weight",
        "model.vision_tower.patch_embed.proj.bias",
        "mm_projector.linear_1.weight",
        f"{LAYER}.self_attn.rotary_emb.inv_freq",
        f"language_model.{LAYER}.self_attn.rotary_emb.inv_freq",
    ],
)
def test_what_a_text_model_does_not_need_is_skipped_with_a_reason(name: str) -> None:
    key = parse_key(name)
    assert isinstance(key, SkippedKey)
    assert key.reason


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        f"{LAYER}.self_attn.k_up_proj.weight",
        f"{LAYER}.mlp.experts.x.up_proj.weight",
        "model.norm",
        f"{LAYER}.weight",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert parse_key(name) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_of_every_layout_is_parsed(make, layout: str) -> None:
    directory = make(layout=layout, prefix=layout == "int4", shards=1)
    _, entries, _ = read_header(directory / "model.safetensors")
    assert entries
    assert all(isinstance(parse_key(entry.name), TensorKey) for entry in entries)


def test_config_paths_are_brought_to_one_form() -> None:
    expected = "model.layers.1.mlp.switch_mlp.up_proj"
    for name in (
        expected,
        f"language_model.{expected}",
        f"{expected}.weight",
        "model.layers.1.mlp.experts.up_proj",
        "model.layers.1.mlp.experts.3.up_proj",
    ):
        assert canonical_path(name) == expected


def test_the_names_of_many_experts_are_parsed_by_their_pattern_once() -> None:
    """A K2 has two hundred thousand of them."""
    names = [f"model.layers.7.mlp.experts.{number}.up_proj.weight_packed" for number in range(384)]
    parsed, matches = calls_of(lambda: [parse_key(name) for name in names], "fullmatch")
    assert [key.expert for key in parsed if isinstance(key, TensorKey)] == list(range(384))
    assert matches <= 2
