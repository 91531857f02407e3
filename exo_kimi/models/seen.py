"""What attention in latent space sees of a sequence: its cached latents and rotary keys, plain or in 8 bits.

Both forms answer the same two products. That of 8 bits multiplies with the codes as they lie in the cache and unpacks nothing;
its oracle is the plain form over what `LatentCache8.update_and_fetch` unpacks. It knows nothing of queries nor of heads.

Axes: B batch, T cached tokens, M rows (heads times new tokens), R kv_lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from exo_kimi.models import ops
from exo_kimi.models.latent_cache import BITS, LatentCache8, Parts, group_of, unpacked


@dataclass(frozen=True, slots=True)
class Plain:
    """latent (B, 1, T, R) and k_pe (B, 1, T, rope)."""

    latent: mx.array
    k_pe: mx.array

    @property
    def keys(self) -> int:
        """T."""
        return self.latent.shape[2]

    def first(self, count: int) -> Plain:
        """The first tokens."""
        return Plain(self.latent[:, :, :count], self.k_pe[:, :, :count])

    def scores(self, q: mx.array, q_pe: mx.array, *, scale: float = 1.0) -> mx.array:
        """(B, 1, M, T) of queries (B, 1, M, R) and (B, 1, M, rope)."""
        rotary = q_pe @ self.k_pe.swapaxes(-1, -2)
        return mx.addmm(rotary, q, ops.turned(self.latent, rows=q.shape[2]), alpha=scale, beta=scale)

    def mixed(self, weights: mx.array) -> mx.array:
        """(B, 1, M, R) latents of weights (B, 1, M, T)."""
        return weights @ self.latent

    def whole(self) -> Plain:
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class Packed:
    """The same as an 8-bit cache holds them: codes, scales and biases with room behind their first `keys` tokens."""

    latent: Parts
    k_pe: Parts
    keys: int

    def first(self, count: int) -> Packed:
        """The first tokens."""
        return Packed(self.latent, self.k_pe, count)

    def scores(self, q: mx.array, q_pe: mx.array, *, scale: float = 1.0) -> mx.array:
        """As of `Plain`."""
        if scale != 1.0:
            q, q_pe = q * scale, q_pe * scale
        return self._product(q_pe, self.k_pe, transpose=True) + self._product(q, self.latent, transpose=True)

    def mixed(self, weights: mx.array) -> mx.array:
        """As of `Plain`."""
        return self._product(weights, self.latent, transpose=False)

    def whole(self) -> Plain:
        """Unpacked: one copy of all."""
        return Plain(unpacked(self.latent, self.keys), unpacked(self.k_pe, self.keys))

    def _product(self, x: mx.array, parts: Parts, *, transpose: bool) -> mx.array:
        codes, scales, biases = (part[..., : self.keys, :] for part in parts)
        return mx.quantized_matmul(x, codes, scales, biases, transpose=transpose, group_size=group_of(parts), bits=BITS)


Seen = Plain | Packed


def extend(cache: Any, latent: mx.array, k_pe: mx.array) -> Seen:
    """Add (B, 1, L, R) latents and (B, 1, L, rope) keys to a cache; all that it holds then."""
    if isinstance(cache, LatentCache8):
        return Packed(*cache.append(latent, k_pe), cache.offset)
    return Plain(*ops.append_to_cache(cache, latent, k_pe))
