"""Caches cut, put together and copied hold what they held, in both formats."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from exo_kimi.models.latent_cache import LatentCache8
from exo_kimi.models.ops import KVCache
from exo_kimi.runtime.stage.caches import append, copy_prefix, cut, trim
from exo_kimi.runtime.stage.prefix_disk import _to_mlx, _to_numpy


def grown(kind: type[Any], length: int, dtype: mx.Dtype) -> list[Any]:
    """Caches of two layers, fed in two parts."""
    caches = [kind(), kind()]
    for layer, cache in enumerate(caches):
        for start, end in ((0, 300), (300, length)):
            latent = mx.random.normal((1, 1, end - start, 64), key=mx.random.key(10 * layer + start)).astype(dtype)
            cache.update_and_fetch(latent, latent[..., :64] * 2)
    return caches


def contents(caches: list[Any]) -> list[mx.array]:
    """All that further tokens would see."""
    new = mx.ones((1, 1, 1, 64), mx.float32)
    return [
        array for cache in caches for array in cache.update_and_fetch(new.astype(mx.float16), new.astype(mx.float16))
    ]


@pytest.mark.parametrize("kind", [KVCache, LatentCache8])
@pytest.mark.parametrize("length", [512, 600])
def test_what_is_cut_stored_and_appended_is_what_was_held(kind: type[Any], length: int) -> None:
    caches, again = grown(kind, length, mx.float16), [kind(), kind()]
    for start in (0, 256):
        stored = {name: _to_numpy(leaf) for name, leaf in cut(caches, start, start + 256).items()}
        append(again, {name: _to_mlx(one) for name, one in stored.items()}, capacity=768 if length > 512 else 256)
    copied = [kind(), kind()]
    copy_prefix(caches, copied, length=512, capacity=768)
    trim(caches, 512)
    expected = contents(caches)
    for other in (again, copied):
        assert all(mx.array_equal(one, two) for one, two in zip(contents(other), expected, strict=True))


def test_a_copy_and_its_source_grow_apart() -> None:
    source, copied = grown(KVCache, 400, mx.float32), [KVCache(), KVCache()]
    copy_prefix(source, copied, length=350, capacity=512)
    before = [cache.keys[..., :400, :].tolist() for cache in source]
    contents(copied)
    assert [cache.keys[..., :400, :].tolist() for cache in source] == before
    assert [cache.offset for cache in source] == [400, 400]
    assert [cache.offset for cache in copied] == [351, 351]
