"""A Kimi K2 at its real size: headers over sparse files, planned over eight machines in under a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exo_kimi.arch.modules import stage_modules
from exo_kimi.checkpoint.tiny.config import text_config
from exo_kimi.planner.command import model_bytes, plan_answer
from exo_kimi.planner.weights.bytes import bytes_of_recipe
from exo_kimi.planner.weights.catalog import published_model
from exo_kimi.planner.weights.recipes import load_recipe
from tests.work import calls_of

FILES = 96
EIGHT = "m3-ultra-256, m2-ultra-192, m4-max-128, m5-max-128, m1-ultra-128, m3-max-128, m2-max-96, m1-max-64"


@pytest.fixture(scope="module")
def k2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DQ3_K_M-q8 as mlx-community stores it, without its data."""
    root = tmp_path_factory.mktemp("k2") / "k2"
    root.mkdir()
    config = published_model("kimi-k2.6").config
    keys = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "n_routed_experts num_experts_per_tok kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
    ).split()
    raw = text_config({key: getattr(config, key) for key in keys}, dtype="BF16")
    (root / "config.json").write_text(json.dumps(raw))
    recipe = load_recipe("dq3_k_m-q8")
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for spec in stage_modules(config, 0, 61):
        quant, shape = recipe.quant(spec), list(spec.shape)
        if quant is None:
            tensors[f"{spec.path}.weight"] = ("BF16", shape, 2)
        else:
            bits, group = quant
            scales = [*shape[:-1], shape[-1] // group]
            tensors[f"{spec.path}.weight"] = ("U32", [*shape[:-1], shape[-1] * bits // 32], 4)
            tensors[f"{spec.path}.scales"] = ("BF16", scales, 2)
            tensors[f"{spec.path}.biases"] = ("BF16", scales, 2)
        if spec.kind == "router":
            tensors[f"{spec.path}.e_score_correction_bias"] = ("F32", shape[:1], 4)
    names = list(tensors)
    weight_map = {}
    for number in range(FILES):
        header, offset = {}, 0
        for name in names[number * len(names) // FILES : (number + 1) * len(names) // FILES]:
            dtype, shape, size = tensors[name]
            for dim in shape:
                size *= dim
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        text = json.dumps(header).encode()
        with (root / f"model-{number + 1:05d}-of-{FILES:05d}.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def test_headers_of_the_real_size_give_the_recipe_to_the_byte(k2_directory: Path) -> None:
    headers = model_bytes(directory=k2_directory)
    assert headers.total_bytes == 470_628_683_776
    derived = bytes_of_recipe(headers.config, load_recipe("dq3_k_m-q8"), name="k2")
    assert headers.layer_bytes == derived.layer_bytes


def test_headers_inference_and_a_plan_over_eight_machines_are_little_work(k2_directory: Path) -> None:
    answer, calls = calls_of(lambda: plan_answer(directory=k2_directory, cluster=EIGHT))
    plan = answer.plan
    assert plan.model.from_headers
    assert sum(stage.layers for stage in plan.stages) == 61
    assert calls < 600_000  # 294,000
