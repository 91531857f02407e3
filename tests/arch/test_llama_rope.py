"""Rotary positions of Llama-like heads against transformers, and what of a config cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exo_kimi.arch.llama_rope import LlamaRope, read_llama_rope
from exo_kimi.errors import CheckpointError

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
}


def read(**raw: Any) -> tuple[LlamaRope, list[CheckpointError]]:
    problems: list[CheckpointError] = []
    return read_llama_rope({"rope_theta": 10_000.0, **raw}, "config.json", problems), problems


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("width", [32, 128])
def test_wavelengths_and_amplitude_are_those_of_transformers(name: str, width: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = KINDS[name]
    length = int(scaling.get("original_max_position_embeddings", 2048) * scaling.get("factor", 1.0))
    found, problems = read(rope_scaling=scaling, max_position_embeddings=length)
    assert not problems
    if not scaling:
        assert found.amplitude == 1.0
        np.testing.assert_allclose(found.wavelengths(width), 10_000.0 ** (np.arange(0, width, 2) / width))
        return
    config = transformers.LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        rope_theta=10_000.0,
        max_position_embeddings=length,
        rope_scaling=dict(scaling),
    )
    inverse, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    np.testing.assert_allclose(1 / np.array(found.wavelengths(width)), inverse.numpy(), rtol=1e-5)
    assert found.amplitude == pytest.approx(amplitude)


def test_the_newer_spelling_is_the_same() -> None:
    for scaling in KINDS.values():
        old, _ = read(rope_scaling=scaling)
        new, problems = read(rope_theta=None, rope_parameters={"rope_theta": 10_000.0, **scaling})
        assert not problems and old == new


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": "x"}, "no base of a rope"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "cannot be read"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "cannot be read"),
        ({"rope_scaling": {"factor": 2.0}}, "cannot be read"),
        ({"rope_scaling": 3}, "wrong type"),
    ],
)
def test_what_cannot_be_read_is_a_problem(raw: dict[str, Any], said: str) -> None:
    _, problems = read(**raw)
    assert len(problems) == 1 and said in str(problems[0])
