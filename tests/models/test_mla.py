"""Three ways through latent attention, and the oracle that holds them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.models import blocks
from exo_kimi.models.mla import Attention, Span
from exo_kimi.models.ops import KVCache
from exo_kimi.models.rope import Rope

WAYS = ("absorbed", "expanded")
FORMS = ("plain", "3-bit", "4-bit", "6-bit", "8-bit", "mxfp4", "on-disk absorbed", "on-disk absorbed 3-bit")


def build(config: KimiConfig, form: str = "plain", seed: int = 0) -> Attention:
    mx.random.seed(seed)
    attention = Attention(config, Rope.of(config))
    if form.startswith("on-disk"):
        attention.use_absorbed_modules()
    if "-bit" in form:
        bits = int(form.removesuffix("-bit")[-1])
        nn.quantize(attention, group_size=32, bits=bits)
    if form == "mxfp4":
        nn.quantize(attention, group_size=32, bits=4, mode="mxfp4")
    mx.eval(attention.parameters())
    return attention


def attend(attention: Attention, x: mx.array, chunks: list[int], way: str | None = None) -> np.ndarray[Any, Any]:
    """Attention of one sequence fed in chunks; `way` forces a path."""
    if way is not None:
        attention.prefers_absorbed = lambda queries, keys: way == "absorbed"  # type: ignore[method-assign]
    cache, outputs, start = KVCache(), [], 0
    for length in chunks:
        positions = mx.arange(start, start + length)
        span = Span(1, length, None if length == 1 else "causal")
        outputs.append(attention(x[start : start + length], positions, [span], [cache]))
        start += length
    assert start == x.shape[0]
    return np.array(mx.concatenate(outputs))


@pytest.mark.parametrize("form", FORMS)
def test_absorbed_and_expanded_agree_with_the_oracle(
    config: KimiConfig, attention_oracle: Callable[..., Any], form: str
) -> None:
    attention = build(config, form)
    x = mx.random.normal((21, config.hidden_size))
    expected = attention_oracle(attention, x, config)
    for way in WAYS:
        for chunks in ([21], [1] * 21, [13, 1, 7]):
            found = attend(attention, x, chunks, way)
            np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), err_msg=f"{way} {chunks}")


@pytest.mark.parametrize(
    "change",
    [
        {"q_lora_rank": None},
        {"rope_scaling": None},
        {"attention_bias": True},
        {"rope_scaling": {"factor": 64.0, "beta_fast": 32.0}},
        {"rope_scaling": {"mscale": 0.7, "mscale_all_dim": 0.5}},
    ],
    ids=["no q_lora", "no yarn", "bias", "yarn 64/32", "mscales that differ"],
)
def test_every_config_switch_agrees_with_the_oracle(
    raw_config: dict[str, Any], attention_oracle: Callable[..., Any], change: dict[str, Any]
) -> None:
    yarn = change.get("rope_scaling")
    config = KimiConfig.from_dict(
        {**raw_config, **change, "rope_scaling": {**raw_config["rope_scaling"], **(yarn or {})}}
        if "rope_scaling" not in change or yarn
        else {**raw_config, **change}
    )
    attention = build(config)
    if config.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            attention[name].bias = mx.random.normal(attention[name].bias.shape)
    x = mx.random.normal((9, config.hidden_size))
    expected = attention_oracle(attention, x, config)
    for way in WAYS:
        np.testing.assert_allclose(attend(attention, x, [9], way), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["plain", "3-bit", "on-disk absorbed", "on-disk absorbed 3-bit"])
def test_blocks_of_queries_and_heads_change_nothing(config: KimiConfig, way: str, form: str) -> None:
    attention = build(config, form)
    x = mx.random.normal((50, config.hidden_size))
    whole = attend(attention, x, [10, 40], way)
    row_bytes = 2 * config.num_attention_heads * 50 * 4
    two_heads = 2 * 50 * (2 * 32 + 16 + 32) * 4
    for scratch_bytes in (1, row_bytes, 7 * row_bytes, 39 * row_bytes, two_heads, 3 * two_heads // 2):
        attention.scratch_bytes = scratch_bytes
        np.testing.assert_allclose(attend(attention, x, [10, 40], way), whole, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_scratch_budget_bounds_the_score_matrix(
    config: KimiConfig, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CAUSAL_ROWS", 2**30)
    attention = build(config)
    queries = 1024
    x = mx.random.normal((queries, config.hidden_size))
    mx.eval(x)

    def peak_bytes(scratch_bytes: int) -> int:
        attention.scratch_bytes = scratch_bytes
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        attend(attention, x, [queries], way)
        return mx.get_peak_memory() - before

    scores_bytes = config.num_attention_heads * queries**2 * 4
    apart_from_scores = peak_bytes(1024)
    assert peak_bytes(2**30) > scores_bytes + apart_from_scores // 2
    assert peak_bytes(scores_bytes // 4) < apart_from_scores + scores_bytes // 2


def test_spans_of_many_sequences_do_not_see_each_other(config: KimiConfig) -> None:
    attention = build(config)
    lengths = [5, 1, 30, 1, 8]
    inputs = [mx.random.normal((length, config.hidden_size)) for length in lengths]
    alone = [attend(attention, x, [x.shape[0]]) for x in inputs]
    spans = [Span(1, length, None if length == 1 else "causal") for length in lengths]
    positions = mx.concatenate([mx.arange(length) for length in lengths])
    mixed = attention(mx.concatenate(inputs), positions, spans, [KVCache() for _ in lengths])
    np.testing.assert_allclose(np.array(mixed), np.concatenate(alone), atol=1e-6)


def test_the_cheaper_way_is_absorbed_below_about_170_queries_of_a_long_cache(raw_config: dict[str, Any]) -> None:
    k2 = {"num_attention_heads": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    attention = Attention(KimiConfig.from_dict({**raw_config, **k2, "v_head_dim": 128}), None)  # type: ignore[arg-type]
    rank, width, keys = 512, 256, 8192
    crossover = rank * width / (rank * width / keys + 2 * rank - width)
    assert 160 < crossover < 180
    assert attention.prefers_absorbed(int(crossover) - 1, keys)
    assert not attention.prefers_absorbed(int(crossover) + 2, keys)
    assert attention.prefers_absorbed(1, 100)
    assert not attention.prefers_absorbed(32, 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_kv_b_proj_is_split_without_requantizing(config: KimiConfig, bits: int) -> None:
    attention = build(config, f"{bits}-bit")
    kv_b = attention.kv_b_proj
    plain = mx.dequantize(kv_b.weight, kv_b.scales, kv_b.biases, group_size=32, bits=bits)
    plain = plain.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    nope = config.qk_nope_head_dim
    q = mx.random.normal((5, config.num_attention_heads, nope))
    out = mx.random.normal((5, config.num_attention_heads, config.kv_lora_rank))
    absorbed = mx.einsum("nhd,hdr->nhr", q, plain[:, :nope])
    unembedded = mx.einsum("nhr,hvr->nhv", out, plain[:, nope:])
    np.testing.assert_allclose(np.array(attention.absorb(q)), np.array(absorbed), atol=1e-5)
    np.testing.assert_allclose(np.array(attention.unembed(out)), np.array(unembedded), atol=1e-5)
