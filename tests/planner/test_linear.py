"""Kimi Linear and K3 planned: what states, snapshots and latents take is what is allocated, and splits to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.blocks import Span
from exo_kimi.models.kda.attention import DeltaAttention
from exo_kimi.models.kda.recurrent_cache import RecurrentCache
from exo_kimi.models.latent_cache import extend
from exo_kimi.models.mla import Attention
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_recipe
from exo_kimi.planner.weights.catalog import published_model
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.stage.caches import snapshot_nbytes, take_snapshot

LINEAR = "kimi-linear-48b-a3b-instruct"
TOKENS = 1 << 20


def planned(config: KimiConfig, kv_bits: int | None) -> ModelBytes:
    return replace(bytes_of_recipe(config, load_recipe("bf16"), name="x"), kv_bits=kv_bits)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_plan_counts_the_bytes_that_are_allocated(tmp_path: Path, kv_bits: int | None) -> None:
    """Of two sequences of 300 and 60 tokens, the second with two snapshots."""
    linear = {"head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4, "full_attn_layers": [2, 4]}
    config = {
        "model_type": "kimi_linear",
        "num_hidden_layers": 4,
        "linear_attn_config": {**linear, "kda_layers": [1, 3]},
    }
    model = load(make_tiny(tmp_path / "tiny", layout="bf16", config=config), dtype="bfloat16")
    model.kv_bits = kv_bits
    sequences = [model.make_cache() for _ in range(2)]
    snapshots = []
    for caches, lengths in zip(sequences, ((250, 50), (40, 20)), strict=True):
        for length in lengths:
            mx.eval(model.forward_ragged(mx.arange(length), [(length, caches)]))
            snapshots.append(take_snapshot(caches))
    plan = planned(model.args, kv_bits)
    allocated = sum(part.nbytes for caches in sequences for cache in caches for part in arrays(cache))
    assert allocated == plan.cache_bytes(0, 4, tokens=512 + 256, sequences=2)
    alone = [snapshot_nbytes([], [snapshot]) for snapshot in snapshots]
    assert alone == [sum(map(plan.state_layer_bytes, range(4)))] * 4
    assert snapshot_nbytes(sequences, snapshots) == 0  # the newest two states are those that a sequence holds anyway


@pytest.mark.parametrize(("kv_bits", "token_bytes"), [(None, 8064), (8, 7 * 612)])
def test_a_million_tokens_of_the_published_model_take_what_is_planned(kv_bits: int | None, token_bytes: int) -> None:
    """By the shapes to which the caches themselves grow; nothing is computed, so nothing is allocated."""
    config = published_model(LINEAR).config
    state, latents = caches_of(config, kv_bits)
    active_bytes = mx.get_active_memory()
    for tokens in (TOKENS - 300, 300):
        extend(latents, *(mx.zeros((1, 1, tokens, width), mx.bfloat16) for width in (512, 64)))
    assert latents.offset == TOKENS
    states, full = 20 * nbytes(state), 7 * nbytes(latents)
    assert mx.get_active_memory() - active_bytes < 1 << 20
    plan = planned(config, kv_bits)
    assert full == token_bytes * TOKENS
    assert states + full == plan.cache_bytes(0, 27, tokens=TOKENS, sequences=1)
    assert states == 2 * sum(map(plan.state_layer_bytes, range(27))) == 2 * 20 * 2_170_880


def caches_of(config: KimiConfig, kv_bits: int | None) -> tuple[RecurrentCache, Any]:
    """What a layer of each kind holds of a sequence: a state after two passes of the published width, and no latents yet."""
    assert config.linear_attention is not None
    attention = DeltaAttention(config, config.linear_attention)
    attention.set_dtype(mx.bfloat16)
    state = attention.make_cache(kv_bits)
    for length in (3, 1):
        state.begin_pass()
        x = mx.zeros((length, config.hidden_size), mx.bfloat16)
        attention(x, mx.arange(length), [Span(1, length, None)], [state])
    return state, Attention(config, None).make_cache(kv_bits)


def nbytes(cache: Any) -> int:
    return sum(part.nbytes for part in arrays(cache))


def arrays(cache: Any) -> Sequence[mx.array]:
    """All that a cache holds."""
    if isinstance(cache, RecurrentCache):
        return list(cache.arrays())
    return [part for side in (cache.keys, cache.values) for part in ([side] if isinstance(side, mx.array) else side)]


@pytest.mark.parametrize(
    ("recipe", "cluster", "splits"),
    [
        # Weights, and KV memory: 8,064 bytes for each of 40,960 tokens, and two states of 2,170,880 bytes in each of 20 layers.
        (None, "m3-ultra-512, m2-ultra-192", [("m3-ultra-512", 27, 98_276_212_736, 417_136_640)]),
        ("uniform-4", "m3-max-64", [("m3-max-64", 27, 27_686_134_784, 417_136_640)]),
        (
            "uniform-4",
            "m3-max-36, m3-max-36",
            [("m3-max-36", 14, 13_875_108_480, 189_317_120), ("m3-max-36-2", 13, 13_811_026_304, 227_819_520)],
        ),
    ],
)
def test_kimi_linear_is_split_over_the_clusters_that_were_asked_for(
    recipe: str | None, cluster: str, splits: list[tuple[str, int, int, int]]
) -> None:
    plan = plan_answer(model=LINEAR, recipe=recipe, cluster=cluster).plan
    found = [(stage.machine, stage.layers, stage.weight_bytes, stage.kv_bytes) for stage in plan.stages]
    assert found == splits
    packed_routers = 26 * 256 * 2304 * 34 // 32  # 8 bits, and a scale and a bias for 64
    widened = 26 * 256 * 2304 * (2 if recipe is None else 4) - (0 if recipe is None else packed_routers)
    assert plan.model.total_bytes == (98_245_541_888 if recipe is None else 27_641_086_976)
    assert sum(stage.weight_bytes for stage in plan.stages) == plan.model.total_bytes + widened


def test_k3_is_planned_over_four_m3_ultras_to_the_byte() -> None:
    plan = plan_answer(model="kimi-k3", cluster=", ".join(["m3-ultra-512"] * 4), raise_limits=True).plan
    assert plan.model.total_bytes == 1_560_860_324_864
    assert [stage.layers for stage in plan.stages] == [24, 23, 23, 23]
    widened = 92 * 896 * 7168 * 2  # routers, held in float32
    assert sum(stage.weight_bytes for stage in plan.stages) == plan.model.total_bytes + widened
    states = 2 * 69 * (96 * 128 * 128 * 4 + 3 * 3 * 96 * 128 * 2)
    assert sum(stage.kv_bytes for stage in plan.stages) == 40_960 * 27_648 + states
    assert all(stage.headroom_bytes > 0 for stage in plan.stages)
