"""Several sequences' 8-bit caches as one, for mlx-lm's BatchGenerator.

mlx-lm's own batch cache pads, rolls, filters and extends whatever it holds along the tokens. So it is given each token's codes,
scales and biases as one row of bytes, and what this module adds is the way in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from exo_kimi.arch.geometry import kv_group
from exo_kimi.models.latent_cache import BITS, LatentCache8, Parts
from exo_kimi.models.ops import BatchKVCache, KVCache


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """How a token's vector of `width` lies in bytes: codes, then scales, then biases, the last two in `dtype`."""

    width: int
    dtype: mx.Dtype

    def __deepcopy__(self, memo: object) -> Self:
        return self  # mlx-lm copies caches, and a dtype cannot be copied

    @property
    def group(self) -> int:
        """Elements that share a scale."""
        return kv_group(self.width)

    def packed(self, parts: Parts) -> mx.array:
        """(B, 1, T, bytes) of codes, scales and biases."""
        return mx.concatenate([part.view(mx.uint8) for part in parts], axis=-1)

    def parts(self, rows: mx.array) -> Parts:
        """Codes, scales and biases of bytes."""
        scale_bytes = self.width // self.group * self.dtype.size
        codes, scales, biases = mx.split(rows, [self.width, self.width + scale_bytes], axis=-1)
        return (
            mx.contiguous(codes).view(mx.uint32),
            mx.contiguous(scales).view(self.dtype),
            mx.contiguous(biases).view(self.dtype),
        )

    def quantized(self, x: mx.array) -> mx.array:
        """Bytes of vectors (B, 1, L, width)."""
        codes, scales, biases = mx.quantize(x, self.group, BITS)
        return self.packed((codes, scales, biases))

    def unpacked(self, rows: mx.array) -> mx.array:
        """The vectors as they come back from 8 bits: a copy."""
        return mx.dequantize(*self.parts(rows), self.group, BITS)


class BatchLatents8(BatchKVCache):
    """mlx-lm's batch cache of rows of bytes. `latent` and `k_pe` are None until the first tokens."""

    latent: TokenBytes | None = None
    k_pe: TokenBytes | None = None

    @classmethod
    def of(cls, caches: Sequence[LatentCache8]) -> Self:
        """One cache of several sequences', padded on the left as mlx-lm does."""
        rows = []
        latent: TokenBytes | None = None
        k_pe: TokenBytes | None = None
        for cache in caches:
            row = KVCache()
            if cache.keys is not None and cache.values is not None:
                latent, k_pe = (TokenBytes(4 * side[0].shape[-1], side[1].dtype) for side in (cache.keys, cache.values))
                row.keys, row.values, row.offset = latent.packed(cache.keys), k_pe.packed(cache.values), cache.offset
            rows.append(row)
        merged = BatchKVCache.merge(rows)
        batch = cls([0])
        batch.__dict__.update(merged.__dict__)
        batch.latent, batch.k_pe = latent, k_pe
        return batch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add (B, 1, L, R) latents and (B, 1, L, rope) keys; all of them as they come back from 8 bits."""
        if self.latent is None or self.k_pe is None:
            self.latent, self.k_pe = (TokenBytes(side.shape[-1], side.dtype) for side in (keys, values))
        rows = super().update_and_fetch(self.latent.quantized(keys), self.k_pe.quantized(values))
        return self.latent.unpacked(rows[0]), self.k_pe.unpacked(rows[1])

    def extend(self, other: BatchLatents8) -> None:
        """Take in other sequences."""
        super().extend(other)
        self.latent, self.k_pe = self.latent or other.latent, self.k_pe or other.k_pe

    def extract(self, idx: int) -> LatentCache8:
        """One sequence's own cache again."""
        row, cache = super().extract(idx), LatentCache8()
        if row.keys is not None and self.latent is not None and self.k_pe is not None:
            cache.state = self.latent.parts(row.keys), self.k_pe.parts(row.values)
        return cache
