"""A damaged config.json is refused by name; it is never a crash, a hang or another model."""

from __future__ import annotations

from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.tiny.config import nest, text_config
from exo_kimi.errors import ConfigError, UnsupportedModelError

YARN = text_config({}, dtype="BF16")["rope_scaling"]


def config(**overrides: Any) -> dict[str, Any]:
    raw = text_config({}, dtype="BF16")
    raw.update(overrides)
    return raw


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts"])
@pytest.mark.parametrize("size", [10**9, 10**400])
def test_sizes_that_nobody_can_walk_over_are_refused(key: str, size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        KimiConfig.from_dict(config(**{key: size}))
    assert key in str(caught.value)


@pytest.mark.parametrize("key", ["routed_scaling_factor", "rms_norm_eps", "rope_theta"])
def test_factors_are_positive(key: str) -> None:
    with pytest.raises(ConfigError, match="positive"):
        KimiConfig.from_dict(config(**{key: -1}))


def test_a_foreign_text_model_is_refused() -> None:
    raw = nest(config())
    raw["text_config"]["model_type"] = "qwen3_moe"
    with pytest.raises(UnsupportedModelError, match="qwen3_moe"):
        KimiConfig.from_dict(raw)
    raw["text_config"]["model_type"] = "deepseek_v3"
    assert KimiConfig.from_dict(raw).model_type == "deepseek_v3"


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["yarn", [1], 7])
def test_rope_sections_that_are_no_objects_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} has the wrong type"):
        KimiConfig.from_dict(config(**{key: value}))


def test_yarn_numbers_without_a_type_are_not_taken_for_plain_rope() -> None:
    scaling = {key: value for key, value in YARN.items() if key != "type"}
    with pytest.raises(ConfigError, match="rope_scaling cannot be read"):
        KimiConfig.from_dict(config(rope_scaling=scaling))


@pytest.mark.parametrize("key", ["factor", "beta_fast", "beta_slow", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1.0])
def test_yarn_numbers_are_positive(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} {value}"):
        KimiConfig.from_dict(config(rope_scaling={**YARN, key: value}))


def test_both_spellings_of_rope_may_stand_together_while_they_agree() -> None:
    both = config(rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 50000.0})
    assert KimiConfig.from_dict(both) == KimiConfig.from_dict(config())


@pytest.mark.parametrize(
    "change", [{"rope_theta": 10000.0}, {"factor": 64.0}, {"rope_type": "default"}, {"beta_fast": 32.0}]
)
def test_two_spellings_of_rope_that_differ_are_refused(change: dict[str, Any]) -> None:
    merged = {**YARN, "rope_type": "yarn", "rope_theta": 50000.0, **change}
    with pytest.raises(ConfigError, match="contradicts"):
        KimiConfig.from_dict(config(rope_parameters=merged))
