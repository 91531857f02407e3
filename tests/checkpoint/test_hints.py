"""Hints of config.json in the spellings seen in the wild."""

from __future__ import annotations

from typing import Any

import pytest

from exo_kimi.checkpoint.hints import PLAIN, Hint, read_hints
from exo_kimi.checkpoint.tiny.config import FP8_CONFIG, INT4_CONFIG

EXPERT = "model.layers.1.mlp.switch_mlp.up_proj"
GATE = "model.layers.1.mlp.gate"


@pytest.mark.parametrize("section", ["quantization", "quantization_config"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bits", ["bits", "q_bits", "w_bits", "num_bits"])
@pytest.mark.parametrize("group", ["group_size", "q_group_size", "w_group_size"])
def test_synonyms_mean_the_same(section: str, nested: bool, bits: str, group: str) -> None:
    raw: dict[str, Any] = {section: {bits: 3, group: 32}}
    hints = read_hints({"text_config": raw} if nested else raw)
    assert hints.for_path(EXPERT) == (Hint(3, 32), False)


def test_an_entry_of_a_path_wins_over_the_default() -> None:
    entries = {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        "language_model." + EXPERT: {"q_bits": 3, "q_group_size": 128},
        "lm_head": {"bits": 6},
        GATE: False,
        "model.layers.2.mlp.gate": True,
    }
    hints = read_hints({"quantization": entries})
    assert hints.for_path(EXPERT) == (Hint(3, 128), True)
    assert hints.for_path("lm_head") == (Hint(6), True)
    assert hints.for_path(GATE) == (PLAIN, True)
    assert hints.for_path("model.layers.2.mlp.gate") == (Hint(4, 64, "affine"), False)


@pytest.mark.parametrize(
    "key", ["modules_to_not_convert", "ignore", "ignored_layers", "skip", "skip_modules", "exclude", "exclude_modules"]
)
@pytest.mark.parametrize(
    "pattern", ["mlp.gate", GATE, f"language_model.{GATE}", "*.mlp.gate", r"re:.*mlp\.gate$", "gate"]
)
def test_skip_lists_take_names_globs_and_expressions(key: str, pattern: str) -> None:
    hints = read_hints({"quantization_config": {"bits": 4, key: [pattern]}})
    assert hints.for_path(GATE) == (PLAIN, True)
    assert hints.for_path(EXPERT) == (Hint(4), False)


def test_the_official_int4_ignores_everything_but_routed_experts() -> None:
    hints = read_hints({"text_config": {"quantization_config": INT4_CONFIG}})
    assert hints.for_path(EXPERT) == (Hint(4, 32), False)
    for path in ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"):
        assert hints.for_path(path) == (PLAIN, True)


def test_fp8_and_silence_claim_nothing() -> None:
    for raw in ({}, {"quantization": None}, {"quantization_config": FP8_CONFIG}):
        assert read_hints(raw).for_path(EXPERT) == (Hint(), False)


def test_sections_that_differ_and_broken_patterns_are_noted() -> None:
    hints = read_hints({"quantization": {"bits": 4, "ignore": ["re:("]}, "quantization_config": {"bits": 3}})
    assert hints.default == Hint(4)
    assert any("differ" in note for note in hints.notes)
    assert any("re:(" in note for note in hints.notes)


@pytest.mark.parametrize(
    "value", [4, "4-bit", [1], {"bits": "four"}, {"bits": True}, {"config_groups": {"a": 1}}, {"ignore": 3}]
)
def test_nonsense_is_no_hint(value: Any) -> None:
    assert read_hints({"quantization": value}).for_path(EXPERT) == (Hint(), False)
