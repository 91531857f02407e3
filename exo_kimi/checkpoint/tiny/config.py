"""config.json of a tiny Kimi: the real keys with small numbers.

Source: config.json of moonshotai/Kimi-K2-Instruct, Kimi-K2-Thinking (quantization_config) and Kimi-K2.5 (nesting).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exo_kimi.checkpoint.tiny.tokenizer import BOS, EOS, MEDIA_PAD, PAD, SPECIAL_TOKENS

_DEFAULTS: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 192,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 1024,
}
VISION_CONFIG: dict[str, Any] = {
    "init_pos_emb_height": 8,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 8,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 32,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-05,
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 32,
    "vt_intermediate_size": 48,
    "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 2,
}
_LINEAR_DEFAULTS: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "first_k_dense_replace": 1,
    "head_dim": 24,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    # Counted from 1, as published; the last layer follows no rule there either.
    "linear_attn_config": {
        "full_attn_layers": [4, 7],
        "head_dim": 64,
        "kda_layers": [1, 2, 3, 5, 6],
        "num_heads": 4,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 4,
    "num_expert_group": 1,
    "num_experts": 16,
    "num_experts_per_token": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.2",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 64,
    "vocab_size": 1024,
}
_K3_CHANGES: dict[str, Any] = {
    "architectures": ["KimiK3ForCausalLM"],
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "attn_res_block_size": 3,
    "hidden_act": "situ",
    "latent_moe_use_norm": True,
    "linear_attn_config": {
        **_LINEAR_DEFAULTS["linear_attn_config"],
        "gate_lower_bound": -5.0,
        "num_heads": 3,
        "use_full_rank_gate": True,
    },
    "mla_use_output_gate": True,
    "num_attention_heads": 3,
    "num_shared_experts": 2,
    "q_lora_rank": 96,
    "routed_expert_hidden_size": 128,
    "routed_scaling_factor": 1.0,
}
_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
INT4_CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


MXFP4_CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "group_size": 32,
                "num_bits": 4,
                "strategy": "group",
                "symmetric": True,
                "type": "float",
            },
        }
    },
    "format": "mxfp4-pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*routed_expert_.*", "re:.*_res_proj"],
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def text_config(overrides: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """The text model's keys.

    Args:
        overrides: replaces or adds top-level keys; `model_type` kimi_linear is a family with keys of its own.
            `rope_parameters` (transformers 5) drops rope_theta and rope_scaling.
        dtype: `BF16`, `F16` or `F32`, told as torch_dtype.
    """
    defaults = {
        "kimi_linear": _LINEAR_DEFAULTS,
        "kimi_k3": {**_LINEAR_DEFAULTS, **_K3_CHANGES},
    }.get(overrides.get("model_type", ""), _DEFAULTS)
    config = {**defaults, "torch_dtype": _TORCH_DTYPES[dtype], **overrides}
    if "rope_parameters" in overrides:
        del config["rope_theta"], config["rope_scaling"]
    config["num_key_value_heads"] = overrides.get("num_key_value_heads", config["num_attention_heads"])
    first_special = config["vocab_size"] - SPECIAL_TOKENS
    config.setdefault("bos_token_id", first_special + BOS)
    config.setdefault("eos_token_id", first_special + EOS)
    config.setdefault("pad_token_id", first_special + PAD)
    return config


def nest_k3(config: Mapping[str, Any]) -> dict[str, Any]:
    """The outer config of Kimi K3, with the text model under `text_config`; without a tower."""
    return {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "dtype": config["torch_dtype"],
        "model_type": "kimi_k3",
        "text_config": {**config, "model_type": "kimi_linear"},
        "tie_word_embeddings": False,
    }


def nest(config: Mapping[str, Any]) -> dict[str, Any]:
    """The outer config of K2.5 and later, with the text model under `text_config`.

    MLX conversions keep their `quantization` outside; Moonshot's `quantization_config` goes inside.
    """
    outer_keys = ("quantization", "quantization_config") if "quantization" in config else ()
    text = {key: value for key, value in config.items() if key not in outer_keys}
    text["model_type"] = "kimi_k2"
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": config["bos_token_id"],
        "dtype": config["torch_dtype"],
        "eos_token_id": config["eos_token_id"],
        "ignore_index": -100,
        "media_placeholder_token_id": config["bos_token_id"] + MEDIA_PAD,
        "model_type": "kimi_k25",
        "pad_token_id": config["pad_token_id"],
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": {**VISION_CONFIG, "text_hidden_size": config["hidden_size"]},
        **{key: config[key] for key in outer_keys},
    }
