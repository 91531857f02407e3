"""KimiConfig reads every key that changes the maths and refuses what is not supported."""

from __future__ import annotations

import math
from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.errors import CheckpointProblems, ConfigError, UnsupportedModelError


def test_k2_reads_as_published(k2: dict[str, Any]) -> None:
    config = KimiConfig.from_dict(k2)
    assert (config.num_hidden_layers, config.n_routed_experts, config.qk_head_dim) == (61, 384, 192)
    assert config.routed_scaling_factor == 2.827
    assert not config.is_moe(0) and config.is_moe(1) and config.is_moe(60)
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2)


def test_transformers_5_rope_parameters_read_the_same(k2: dict[str, Any]) -> None:
    resaved = dict(k2)
    scaling = resaved.pop("rope_scaling")
    theta = resaved.pop("rope_theta")
    for fixed in ("scoring_func", "topk_method", "moe_layer_freq"):
        resaved.pop(fixed)
    resaved["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": theta}
    assert KimiConfig.from_dict(resaved) == KimiConfig.from_dict(k2)


def test_nested_text_config_sets_the_key_prefix(k2: dict[str, Any]) -> None:
    nested = {"model_type": "kimi_k25", "text_config": k2, "vision_config": {"hidden_size": 1152}}
    assert KimiConfig.from_dict(nested).key_prefix == "language_model."
    assert KimiConfig.from_dict(k2).key_prefix == ""


def test_no_required_key_has_a_default(k2: dict[str, Any]) -> None:
    required = set(k2) - {
        "scoring_func",
        "topk_method",
        "hidden_act",
        "attention_bias",
        "moe_layer_freq",
        "rope_scaling",
    }
    for key in required:
        without = {name: value for name, value in k2.items() if name != key}
        with pytest.raises((ConfigError, UnsupportedModelError), match=key):
            KimiConfig.from_dict(without)


def test_every_finding_is_raised_at_once(k2: dict[str, Any]) -> None:
    broken = {**k2, "routed_scaling_factor": None, "hidden_act": "gelu", "attn_logit_softcapping": 30.0}
    with pytest.raises(CheckpointProblems) as caught:
        KimiConfig.from_dict(broken)
    text = str(caught.value)
    assert "routed_scaling_factor" in text and "hidden_act" in text and "attn_logit_softcapping" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 32.0}}, "beta_fast"),
        ({"num_experts_per_tok": 400}, "num_experts_per_tok"),
        ({"n_group": 7}, "n_group"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_a_wrong_value_is_named(k2: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KimiConfig.from_dict({**k2, **change})


def test_unknown_keys_that_cannot_matter_are_kept_for_the_report(k2: dict[str, Any]) -> None:
    assert KimiConfig.from_dict({**k2, "made_by": "somebody", "window": None}).ignored_keys == ("made_by",)


def test_not_a_kimi(k2: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="llama"):
        KimiConfig.from_dict({**k2, "model_type": "llama"})
