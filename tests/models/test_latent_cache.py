"""The 8-bit cache: every value within the stated bound, attention as over the dequantized values, whatever the chunks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import check_quantizable
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.latent_cache import GROUP, LatentCache8
from exo_kimi.models.mla import Span
from exo_kimi.models.ops import KVCache

EPS = {mx.float32: 2.0**-23, mx.bfloat16: 2.0**-8}


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1.0, 300.0]), st.sampled_from([mx.float32, mx.bfloat16]))
def test_every_value_comes_back_within_the_bound(seed: int, size: float, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(seed)
    latent = mx.array(size * (rng.normal(size=(1, 1, 5, 128)) + rng.normal())).astype(dtype)
    k_pe = mx.array(size * rng.normal(size=(1, 1, 5, 64))).astype(dtype)
    for given_values, found in zip((latent, k_pe), LatentCache8().update_and_fetch(latent, k_pe), strict=True):
        assert found.dtype == dtype
        values = np.array(given_values.astype(mx.float32)).reshape(-1, GROUP)
        reach = values.max(1) - values.min(1)
        bound = 1.01 * reach / 255 + 3 * EPS[dtype] * np.abs(values).max(1) + 1e-6
        assert (np.abs(np.array(found.astype(mx.float32)).reshape(-1, GROUP) - values).max(1) <= bound).all()


def wide(raw_config: dict[str, Any]) -> Model:
    mx.random.seed(1)
    model = Model(KimiConfig.from_dict({**raw_config, "qk_rope_head_dim": 64}))
    mx.eval(model.parameters())
    return model


def test_attention_over_it_is_attention_over_its_dequantized_values(raw_config: dict[str, Any]) -> None:
    """The oracle: a plain cache with what an 8-bit one gives back, layer by layer."""
    attention = wide(raw_config).layers[0].self_attn

    class Rounded(KVCache):
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            rounded = [mx.dequantize(*mx.quantize(part, GROUP, 8), GROUP, 8) for part in (keys, values)]
            return super().update_and_fetch(*rounded)

    x = mx.random.normal((300, 64))
    caches = LatentCache8(), Rounded()
    at = 0
    for length in (260, 1, 3, 36):
        span = Span(1, length, None if length == 1 else "causal")
        found, expected = (
            np.array(attention(x[at : at + length], mx.arange(at, at + length), [span], [cache])) for cache in caches
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)
        at += length
    assert caches[0].offset == 300
    assert caches[0].trim(50) == 50 and caches[0].offset == 250


def test_ragged_chunks_and_stages_give_the_same_tokens_as_one_pass(raw_config: dict[str, Any]) -> None:
    model = wide(raw_config)
    model.set_kv_bits(8)
    tokens = mx.arange(40, dtype=mx.int32)
    whole = model.make_cache()
    assert all(isinstance(cache, LatentCache8) for cache in whole)
    expected = np.array(model.forward_ragged(tokens, [(40, whole)]))
    first, second = model.make_cache(), model.make_cache()
    model.forward_ragged(tokens[:10], [(10, first)])
    mixed = mx.concatenate([tokens[10:39], tokens[:40]])
    found = model.forward_ragged(mixed, [(29, first), (40, second)])
    np.testing.assert_allclose(np.array(found[29:]), expected, atol=1e-5)
    last = model.forward_ragged(tokens[39:], [(1, first)])
    np.testing.assert_allclose(np.array(last), expected[39:], atol=1e-5)


def test_it_is_at_least_1_85_times_smaller_than_bf16_at_k2s_widths() -> None:
    caches = LatentCache8(), KVCache()
    for cache in caches:
        cache.update_and_fetch(mx.zeros((1, 1, 300, 512), mx.bfloat16), mx.zeros((1, 1, 300, 64), mx.bfloat16))
    assert caches[1].nbytes / caches[0].nbytes >= 1.85
    assert caches[0].nbytes == 512 * 612


def test_widths_that_groups_do_not_divide_are_refused(config: KimiConfig) -> None:
    with pytest.raises(UsageError, match="groups of 64"):
        check_quantizable(config)
    with pytest.raises(UsageError, match="groups of 64"):
        Model(config).set_kv_bits(8)
