"""The 8-bit cache: every value within the stated bound, attention as over the dequantized values, whatever the chunks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import check_quantizable, kv_bytes_per_token
from exo_kimi.errors import UsageError
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.latent_cache import LatentCache8
from exo_kimi.models.mla import Span
from exo_kimi.models.ops import KVCache

GROUP = 64
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


def wide(raw_config: dict[str, Any], rope: int = 64) -> Model:
    mx.random.seed(1)
    model = Model(KimiConfig.from_dict({**raw_config, "qk_rope_head_dim": rope}))
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


class Unpacked:
    """The oracle of decoding: every value is unpacked at every step."""

    def __init__(self) -> None:
        self.packed = LatentCache8()

    @property
    def offset(self) -> int:
        return self.packed.offset

    def update_and_fetch(self, latent: mx.array, k_pe: mx.array) -> tuple[mx.array, mx.array]:
        return self.packed.update_and_fetch(latent, k_pe)


@pytest.mark.parametrize("rope", [64, 32])
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "decoder"])
def test_decoding_multiplies_with_the_codes_as_with_what_they_unpack_to(
    raw_config: dict[str, Any], fused: bool, rope: int
) -> None:
    model = wide(raw_config, rope=rope)
    expected, found = ([[kind() for _ in model.layers] for _ in range(3)] for kind in (Unpacked, LatentCache8))
    for pair in zip(expected, found, strict=True):
        for caches in pair:
            mx.eval(model.forward_ragged(mx.arange(30, dtype=mx.int32), [(30, caches)]))
    steps = [mx.array([1, 2, 3]), mx.array([4, 5, 6])]
    slow = [model.forward_ragged(tokens, [(1, caches) for caches in expected]) for tokens in steps]
    if fused:
        model.fuse_projections()
        assert model.takes_decode([(1, caches) for caches in found])
    for tokens, hidden in zip(steps, slow, strict=True):
        fast = model.forward_ragged(tokens, [(1, caches) for caches in found])
        np.testing.assert_allclose(np.array(fast), np.array(hidden), atol=1e-5)
    one = [model.forward_ragged(mx.array([7]), [(1, caches[0])]) for caches in (expected, found)]
    np.testing.assert_allclose(np.array(one[1]), np.array(one[0]), atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["layers", "decoder"])
def test_decoding_never_unpacks_the_whole_cache(raw_config: dict[str, Any], fused: bool) -> None:
    model = wide({**raw_config, "num_hidden_layers": 2})
    model.set_kv_bits(8)
    if fused:
        model.fuse_projections()
    tokens = 10_000
    sequences = [model.make_cache() for _ in range(2)]
    for cache in [cache for caches in sequences for cache in caches]:
        cache.append(*(mx.random.normal((1, 1, tokens, width)) for width in (model.args.kv_lora_rank, 64)))
        mx.eval(cache.state)
    mx.eval(model.forward_ragged(mx.array([1, 2]), [(1, caches) for caches in sequences]))
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.forward_ragged(mx.array([3, 4]), [(1, caches) for caches in sequences]))
    whole_bytes = tokens * (model.args.kv_lora_rank + 64) * 4
    assert mx.get_peak_memory() - held < whole_bytes / 2


def test_it_is_at_least_1_85_times_smaller_than_bf16_at_k2s_widths() -> None:
    caches = LatentCache8(), KVCache()
    for cache in caches:
        cache.update_and_fetch(mx.zeros((1, 1, 300, 512), mx.bfloat16), mx.zeros((1, 1, 300, 64), mx.bfloat16))
    assert caches[1].nbytes / caches[0].nbytes >= 1.85
    assert caches[0].nbytes == 512 * 612


@pytest.mark.parametrize("rope", [64, 32])
def test_its_bytes_are_those_that_plans_count(raw_config: dict[str, Any], rope: int) -> None:
    model = wide(raw_config, rope=rope)
    model.set_kv_bits(8)
    caches = model.make_cache()
    mx.eval(model.forward_ragged(mx.array([1]), [(1, caches)]))
    counted = kv_bytes_per_token(model.args, 0, len(caches), bytes_per_element=4, kv_bits=8)
    assert model.cache_nbytes(caches) == counted * LatentCache8.step


def test_widths_that_groups_do_not_divide_are_refused(config: KimiConfig) -> None:
    with pytest.raises(UsageError, match="groups of 64 or 32"):
        check_quantizable(config)
    with pytest.raises(UsageError, match="groups of 64 or 32"):
        Model(config).set_kv_bits(8)
