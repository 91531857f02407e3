"""Kimi Linear's config.json: what it says of layers, in both spellings, and the sizes that follow for the published model."""

from __future__ import annotations

from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import active_parameters, kv_bytes_per_token, state_bytes_per_sequence, total_parameters
from exo_kimi.arch.modules import layer_modules, stage_modules
from exo_kimi.errors import CheckpointProblems, ConfigError

FULL = [4, 8, 12, 16, 20, 24, 27]
KDA = [layer for layer in range(1, 28) if layer not in FULL]
# Source: config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct, without what bears on generation alone.
PUBLISHED: dict[str, Any] = {
    "model_type": "kimi_linear",
    "architectures": ["KimiLinearForCausalLM"],
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL,
        "head_dim": 128,
        "kda_layers": KDA,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def flat() -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    renamed = {"num_experts": "num_local_experts", "num_experts_per_token": "num_experts_per_tok"}
    changed = {renamed.get(key, key): value for key, value in PUBLISHED.items() if key != "linear_attn_config"}
    kinds = ["full_attention" if layer + 1 in FULL else "linear_attention" for layer in range(27)]
    numbers = {"linear_num_heads": 32, "linear_head_dim": 128, "linear_conv_kernel_dim": 4}
    return {**changed, **numbers, "layer_types": kinds, "mlp_layer_types": ["dense"] + ["sparse"] * 26}


def test_layers_are_those_that_are_listed_and_count_from_one() -> None:
    config = KimiConfig.from_dict(PUBLISHED)
    assert [layer for layer in range(27) if not config.is_linear(layer)] == [3, 7, 11, 15, 19, 23, 26]
    assert config.rope_theta is None and config.max_position_embeddings == 1_048_576
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (256, 8, 1)


def test_the_spelling_of_transformers_is_the_same_model() -> None:
    assert KimiConfig.from_dict(flat()) == KimiConfig.from_dict(PUBLISHED)


def test_sizes_are_those_of_the_published_weights() -> None:
    config = KimiConfig.from_dict(PUBLISHED)
    assert total_parameters(config) == 49_122_681_728
    assert round(active_parameters(config) / 1e9, 1) == 3.1
    assert kv_bytes_per_token(config, 0, 27) == 8_064
    assert state_bytes_per_sequence(config, 0, 27) == 20 * (2_097_152 + 73_728)
    assert kv_bytes_per_token(config, 0, 3) == 0 == state_bytes_per_sequence(config, 3, 4)


def test_a_layer_has_the_modules_of_its_kind() -> None:
    config = KimiConfig.from_dict(PUBLISHED)
    names = [
        {spec.path.removeprefix(f"model.layers.{layer}.") for spec in layer_modules(config, layer)} for layer in (1, 3)
    ]
    assert {"self_attn", "self_attn.q_conv.conv", "self_attn.f_a_proj", "self_attn.b_proj"} <= names[0] - names[1]
    assert {"self_attn.kv_b_proj", "self_attn.kv_a_layernorm"} <= names[1] - names[0]
    packed = {spec.kind for spec in stage_modules(config, 0, 27) if spec.quantizable}
    assert packed == {"embedding", "linear", "experts", "router"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_attn_config": None}, "linear_attn_config is missing"),
        ({"linear_attn_config": [1]}, "wrong type"),
        ({"linear_attn_config": {**PUBLISHED["linear_attn_config"], "kda_layers": [0, *KDA[1:]]}}, "no partition"),
        ({"linear_attn_config": {**PUBLISHED["linear_attn_config"], "full_attn_layers": FULL[:-1]}}, "no partition"),
        ({"linear_attn_config": {**PUBLISHED["linear_attn_config"], "head_dim": 0}}, "head_dim of the KDA layers"),
        ({"layer_types": ["linear_attention"] * 27}, "another model"),
        ({"mla_use_nope": False}, "mla_use_nope is not implemented"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func is not implemented"),
        ({"model_max_length": None}, "model_max_length is missing"),
        ({"num_local_experts": 8}, "contradicts another spelling"),
        ({"gate_lower_bound": -5.0}, "unknown key gate_lower_bound may change the maths"),
    ],
)
def test_what_is_another_model_is_refused_by_the_published_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, CheckpointProblems), match=words):
        KimiConfig.from_dict({**PUBLISHED, **changes})
