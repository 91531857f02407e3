"""Rotary positions, caches and experts against plain arithmetic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.models import ops
from exo_kimi.models.moe import ExpertGLU
from exo_kimi.models.ops import CACHE_STEP, KVCache
from exo_kimi.models.rope import Rope


def test_rope_turns_every_token_by_its_own_position(config: KimiConfig, rotate: Callable[..., Any]) -> None:
    positions = np.array([0, 7, 3, 4095, 4096, 100_000, 5])
    x = np.random.default_rng(0).standard_normal((7, 3, config.qk_rope_head_dim)).astype(np.float32)
    found = Rope.of(config)(mx.array(x), mx.array(positions.astype(np.int32)))
    np.testing.assert_allclose(np.array(found), rotate(x, positions, config), atol=2e-2)
    near = positions < 5000
    np.testing.assert_allclose(np.array(found)[near], rotate(x, positions, config)[near], atol=1e-3)


@pytest.mark.parametrize(
    "yarn",
    [
        {"factor": 32.0},
        {"factor": 64.0},
        {"factor": 64.0, "beta_fast": 32.0},
        {"factor": 40.0, "beta_fast": 32.0, "mscale": 0.7, "mscale_all_dim": 0.5},
        {"factor": 1.0},
        None,
    ],
)
def test_rope_frequencies_are_those_of_transformers(raw_config: dict[str, Any], yarn: dict[str, float] | None) -> None:
    pytest.importorskip("torch", reason="the oracle runs on torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    scaling = None if yarn is None else {**raw_config["rope_scaling"], **yarn}
    rope = Rope.of(KimiConfig.from_dict({**raw_config, "rope_scaling": scaling, "qk_rope_head_dim": 64}))
    theirs = DeepseekV3RotaryEmbedding(
        transformers.DeepseekV3Config(
            rope_theta=raw_config["rope_theta"],
            rope_scaling=scaling and dict(scaling),
            qk_rope_head_dim=64,
            max_position_embeddings=131072,
        )
    )
    np.testing.assert_allclose(1 / np.array(rope.wavelengths), theirs.inv_freq.numpy(), rtol=1e-5)
    assert rope.amplitude == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("chunks", [[1], [255, 1, 1], [300, 300], [256, 256], [700], [1] * 3 + [600]])
def test_a_cache_takes_its_length_rounded_up_to_the_step(chunks: list[int]) -> None:
    cache, written = KVCache(), []
    for length in chunks:
        latent, k_pe = mx.random.normal((1, 1, length, 8)), mx.random.normal((1, 1, length, 4))
        written.append(latent)
        latents, keys = ops.append_to_cache(cache, latent, k_pe)
        assert latents.shape[2] == keys.shape[2] == cache.offset
    total = sum(chunks)
    assert mx.array_equal(latents, mx.concatenate(written, axis=2))
    assert cache.nbytes == -(-total // CACHE_STEP) * CACHE_STEP * (8 + 4) * 4


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_experts_compute_what_each_expert_alone_would(tokens: int, dtype: mx.Dtype) -> None:
    experts = ExpertGLU(32, 16, 6)
    experts.set_dtype(dtype)
    x = mx.random.normal((tokens, 32)).astype(dtype)
    indices = mx.random.randint(0, 6, (tokens, 3)).astype(mx.uint32)
    found = experts(x, indices)
    assert found.dtype == dtype and found.shape == (tokens, 3, 32)
    for token in range(tokens):
        for slot, expert in enumerate(indices[token].tolist()):
            row = x[token].astype(mx.float32)
            gate, up, down = (
                experts[name].weight[expert].astype(mx.float32) for name in ("gate_proj", "up_proj", "down_proj")
            )
            hidden = gate @ row
            expected = down @ (hidden * mx.sigmoid(hidden) * (up @ row))
            np.testing.assert_allclose(
                np.array(found[token, slot].astype(mx.float32)),
                np.array(expected),
                atol=1e-5 if dtype == mx.float32 else 0.02,
            )


def test_nothing_compiles_on_the_cpu_so_that_no_compiler_is_needed() -> None:
    code = (
        "import mlx.core as mx; mx.set_default_device(mx.cpu)\n"
        "from exo_kimi.models.ops import swiglu\n"
        "print(swiglu(mx.ones(3), mx.ones(3)).tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code], env={"PATH": "/nonexistent"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("[0.731")
