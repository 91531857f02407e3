"""8-bit latents beside recurrent states: exactly attention over what 8 bits give back, and no state among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kda.recurrent_cache import RecurrentCache
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.latent_cache import LatentCache8
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.loading.loader import load

LENGTH = 200
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_hidden_layers": 4,
    "linear_attn_config": {
        "head_dim": 32,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
    },
}


class Rounded(KVCache):
    """The oracle: a plain cache of latents and unrotated keys as they come back from 8 bits."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        rounded = []
        for part in (keys, values):
            group = 64 if part.shape[-1] % 64 == 0 else 32
            rounded.append(mx.dequantize(*mx.quantize(part, group, 8), group, 8))
        return super().update_and_fetch(*rounded)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = make_tiny(tmp_path_factory.mktemp("kv8") / "tiny", family="linear", layout="bf16", seed=3, config=SMALL)
    return load(directory, dtype="float32", fuse=True)


@pytest.fixture
def eight_bits(model: Model) -> Iterator[Model]:
    model.set_kv_bits(8)
    yield model
    model.set_kv_bits(None)


def prompt(seed: int, length: int = LENGTH) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 300, length).astype(np.int32))


def fed(model: Model, caches: list[Any], ids: mx.array, sizes: list[int]) -> np.ndarray[Any, Any]:
    """Logits after each token."""
    found, start = [], 0
    for size in sizes:
        chunk = ids[start : start + size]
        found.append(np.array(model.logits(model.forward_ragged(chunk, [(size, caches)]))))
        start += size
    return np.concatenate(found)


def as_rounded(caches: list[Any]) -> list[Any]:
    return [Rounded() if isinstance(cache, LatentCache8) else cache for cache in caches]


def test_only_caches_that_grow_are_in_8_bits(eight_bits: Model) -> None:
    kinds = [type(cache) for cache in eight_bits.make_cache()]
    linear = [eight_bits.args.is_linear(layer) for layer in range(len(kinds))]
    assert kinds == [RecurrentCache if each else LatentCache8 for each in linear]
    assert {*kinds} == {RecurrentCache, LatentCache8}
    caches = eight_bits.make_cache()
    fed(eight_bits, caches, prompt(1, 9), [8, 1])
    states = [cache for cache in caches if isinstance(cache, RecurrentCache)]
    assert {part.dtype for cache in states for part in cache.state if part is not None} == {mx.float32}


@pytest.mark.parametrize(
    "sizes", [[LENGTH], [160, 1, 3, 36], [LENGTH - 20, *[1] * 20]], ids=["whole", "chunks", "decoding"]
)
def test_logits_are_those_over_dequantized_latents(eight_bits: Model, sizes: list[int]) -> None:
    """Of this prompt some tokens' logits are 1.5 deviations from those without 8 bits; none is from those of the oracle."""
    ids = prompt(7)
    found = fed(eight_bits, eight_bits.make_cache(), ids, sizes)
    expected = fed(eight_bits, as_rounded(eight_bits.make_cache()), ids, sizes)
    # Where a step's latents differ in their last digit a code on an edge may fall to its other side.
    assert np.abs(found - expected).max() <= (0 if sizes == [LENGTH] else 5e-4) * expected.std()


def test_what_is_far_from_16_bits_is_a_tie_between_experts(eight_bits: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random routers have experts that rank alike for some tokens: a difference in the fourth digit swaps them. With the experts
    of the unrounded run no logit is further off than a twentieth of a deviation."""
    routers = [layer.mlp.gate for layer in eight_bits.layers if hasattr(layer.mlp, "gate")]
    ids, chosen = prompt(7), []
    for router in routers:
        router.on_choice = chosen.append
    plain = [KVCache() if isinstance(cache, LatentCache8) else cache for cache in eight_bits.make_cache()]
    expected = fed(eight_bits, plain, ids, [LENGTH])
    unrounded = [np.sort(np.array(each)) for each in chosen]
    chosen.clear()
    found = fed(eight_bits, eight_bits.make_cache(), ids, [LENGTH])
    flips = sum(
        int((np.sort(np.array(each)) != held).any(axis=-1).sum()) for each, held in zip(chosen, unrounded, strict=True)
    )
    for router in routers:
        router.on_choice = None
    apart = np.abs(found - expected).max(axis=-1) / expected.std()
    assert 1 <= flips <= 0.02 * LENGTH * len(routers) and apart.max() > 0.5  # the case that was reported
    turn = iter(unrounded)
    for router in routers:
        held, choose = mx.array(next(turn)), router.choose
        monkeypatch.setattr(
            router,
            "choose",
            lambda logits, bias, held=held, choose=choose: choose.weighted(mx.sigmoid(logits), held),
        )
    same = fed(eight_bits, eight_bits.make_cache(), ids, [LENGTH])
    assert np.abs(same - expected).max() <= expected.std() / 20
