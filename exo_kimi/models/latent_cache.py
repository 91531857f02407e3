"""A sequence's cached latents and rotary keys as attention in latent space sees them, plain or in 8 bits; and the 8-bit cache.

Both forms answer the same two products. That of 8 bits, in groups of 64 (32 where 64 does not divide a width), multiplies with
the codes as they lie in the cache and unpacks nothing; its oracle is the plain form over what `LatentCache8.update_and_fetch`
unpacks.

The 8-bit cache keeps mlx-lm's contract of a cache as far as this model and the runtime use it. Bytes of one token and layer of
K2: 512 + 64 codes and 9 scales and biases of 2 bytes each, 612 in all against 1,152 in bf16.

Error: of a value in a group with range r = max - min at most 1.01 r / 255, one step: half of one for rounding, and as much at
the far end of the range, for MLX stretches the steps until the end that is larger in magnitude lies on one. On top, 3 eps times
the group's largest magnitude for scale and bias in the cache's dtype (eps 2^-8 for bf16), and 1e-6 for MLX's least step.

Axes: B batch, L new tokens, T cached tokens, M rows (heads times new tokens), R kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from exo_kimi.arch.geometry import kv_group
from exo_kimi.errors import UsageError
from exo_kimi.models import ops

__all__ = ["LatentCache8", "Latents", "PackedLatents", "PlainLatents", "extend"]

BITS = 8
STEP = 256
Parts = tuple[mx.array, mx.array, mx.array]


class LatentCache8:
    """Grows by STEP tokens, to a multiple of it. `keys` and `values` are packed codes, scales and biases."""

    step = STEP
    bits = BITS

    def __init__(self) -> None:
        self.keys: Parts | None = None
        self.values: Parts | None = None
        self.offset = 0

    def append(self, latent: mx.array, k_pe: mx.array) -> tuple[Parts, Parts]:
        """Add (B, 1, L, R) latents and (B, 1, L, rope) keys; what is held then, of which `offset` tokens mean something."""
        end = self.offset + latent.shape[2]
        self.keys = self._written(self.keys, latent, end)
        self.values = self._written(self.values, k_pe, end)
        self.offset = end
        return self.keys, self.values

    def update_and_fetch(self, latent: mx.array, k_pe: mx.array) -> tuple[mx.array, mx.array]:
        """The same; all of them as they come back from 8 bits, in the same dtype: a copy of the whole cache."""
        keys, values = self.append(latent, k_pe)
        return _unpacked(keys, self.offset), _unpacked(values, self.offset)

    @property
    def state(self) -> tuple[Parts | None, Parts | None]:
        """What is held, for evaluation and for mlx-lm's `save_prompt_cache`."""
        return _first(self.keys, self.offset), _first(self.values, self.offset)

    @state.setter
    def state(self, held: Sequence[Sequence[mx.array] | None]) -> None:
        self.keys, self.values = (
            None if side is None or len(side) != 3 else (side[0], side[1], side[2]) for side in held
        )
        self.offset = 0 if self.keys is None else self.keys[0].shape[2]

    @property
    def meta_state(self) -> str:
        """Nothing beside it: mlx-lm 0.31 asks."""
        return ""

    @classmethod
    def from_state(cls, state: Sequence[Any], meta_state: str = "") -> Self:
        """The cache that `save_prompt_cache` wrote."""
        cache = cls()
        cache.state = state
        return cache

    @classmethod
    def merge(cls, caches: Sequence[LatentCache8]) -> Any:
        """The caches of several sequences as mlx-lm's BatchGenerator takes them: 8 bits too, see `latent_batch`."""
        from exo_kimi.models.latent_batch import BatchLatents8

        return BatchLatents8.of(caches)

    def empty(self) -> bool:
        """Whether nothing was ever added."""
        return self.keys is None

    def size(self) -> int:
        """How many tokens it has."""
        return self.offset

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for side in (self.keys, self.values) if side is not None for part in side)

    def is_trimmable(self) -> bool:
        """Always."""
        return True

    def trim(self, count: int) -> int:
        """Forget the last tokens; returns how many."""
        count = min(self.offset, count)
        self.offset -= count
        return count

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """As mlx-lm's KVCache: what L new tokens may see."""
        if length == 1:
            return None
        if return_array or window_size is not None:
            raise UsageError("an 8-bit cache has causal masks only")
        return "causal"

    def _written(self, held: Parts | None, new: mx.array, end: int) -> Parts:
        parts: Parts = mx.quantize(new, kv_group(new.shape[-1]), BITS)
        room = -(-end // STEP) * STEP
        grown = []
        for index, part in enumerate(parts):
            whole = held[index] if held is not None else mx.zeros((*part.shape[:2], 0, part.shape[3]), part.dtype)
            if whole.shape[2] < end:
                empty = mx.zeros((*part.shape[:2], room - whole.shape[2], part.shape[3]), part.dtype)
                whole = mx.concatenate([whole, empty], axis=2)
            whole[..., self.offset : end, :] = part
            grown.append(whole)
        return grown[0], grown[1], grown[2]


@dataclass(frozen=True, slots=True)
class PlainLatents:
    """latent (B, 1, T, R) and k_pe (B, 1, T, rope)."""

    latent: mx.array
    k_pe: mx.array

    @property
    def keys(self) -> int:
        """T."""
        return self.latent.shape[2]

    def first(self, count: int) -> PlainLatents:
        """The first tokens."""
        return PlainLatents(self.latent[:, :, :count], self.k_pe[:, :, :count])

    def scores(self, q: mx.array, q_pe: mx.array, *, scale: float = 1.0, mask: mx.array | None = None) -> mx.array:
        """(B, 1, M, T) of queries (B, 1, M, R) and (B, 1, M, rope), plus a mask (M, T)."""
        turned = self.k_pe.swapaxes(-1, -2)
        rotary = q_pe @ turned if mask is None else mx.addmm(mask, q_pe, turned, beta=1 / scale)
        return mx.addmm(rotary, q, ops.turned(self.latent, rows=q.shape[2]), alpha=scale, beta=scale)

    def mixed(self, weights: mx.array) -> mx.array:
        """(B, 1, M, R) latents of weights (B, 1, M, T)."""
        return weights @ self.latent

    def whole(self) -> PlainLatents:
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class PackedLatents:
    """The same as an 8-bit cache holds them: codes, scales and biases with room behind their first `keys` tokens."""

    latent: Parts
    k_pe: Parts
    keys: int

    def first(self, count: int) -> PackedLatents:
        """The first tokens."""
        return PackedLatents(self.latent, self.k_pe, count)

    def scores(self, q: mx.array, q_pe: mx.array, *, scale: float = 1.0, mask: mx.array | None = None) -> mx.array:
        """As of `PlainLatents`."""
        if scale != 1.0:
            q, q_pe = q * scale, q_pe * scale
        rotary = self._product(q_pe, self.k_pe, transpose=True)
        found = rotary + self._product(q, self.latent, transpose=True)
        return found if mask is None else found + mask

    def mixed(self, weights: mx.array) -> mx.array:
        """As of `PlainLatents`."""
        return self._product(weights, self.latent, transpose=False)

    def whole(self) -> PlainLatents:
        """Unpacked: one copy of all."""
        return PlainLatents(_unpacked(self.latent, self.keys), _unpacked(self.k_pe, self.keys))

    def _product(self, x: mx.array, parts: Parts, *, transpose: bool) -> mx.array:
        codes, scales, biases = (part[..., : self.keys, :] for part in parts)
        return mx.quantized_matmul(
            x, codes, scales, biases, transpose=transpose, group_size=_group_of(parts), bits=BITS
        )


Latents = PlainLatents | PackedLatents


def extend(cache: Any, latent: mx.array, k_pe: mx.array) -> Latents:
    """Add (B, 1, L, R) latents and (B, 1, L, rope) keys to a cache; all that it holds then."""
    if isinstance(cache, LatentCache8):
        return PackedLatents(*cache.append(latent, k_pe), cache.offset)
    return PlainLatents(*ops.append_to_cache(cache, latent, k_pe))


def _first(parts: Parts | None, count: int) -> Parts | None:
    """The first tokens: views, where there is room behind them."""
    if parts is None or parts[0].shape[2] == count:
        return parts
    codes, scales, biases = (part[..., :count, :] for part in parts)
    return codes, scales, biases


def _group_of(parts: Parts) -> int:
    """Elements of a group."""
    return 4 * parts[0].shape[-1] // parts[1].shape[-1]


def _unpacked(parts: Parts, count: int) -> mx.array:
    """The first tokens as arrays in the dtype of scales."""
    codes, scales, biases = (part[..., :count, :] for part in parts)
    return mx.dequantize(codes, scales, biases, _group_of(parts), BITS)
