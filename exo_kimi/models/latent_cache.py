"""A cache of latents and rotary keys in 8 bits, in groups of 64 (32 where 64 does not divide a width); it knows no layers.

mlx-lm's contract of a cache as far as this model and the runtime use it. Bytes of one token and layer of K2: 512 + 64 codes and
9 scales and biases of 2 bytes each, 612 in all against 1,152 in bf16.

Error: of a value in a group with range r = max - min at most 1.01 r / 255, one step: half of one for rounding, and as much at
the far end of the range, for MLX stretches the steps until the end that is larger in magnitude lies on one. On top, 3 eps times
the group's largest magnitude for scale and bias in the cache's dtype (eps 2^-8 for bf16), and 1e-6 for MLX's least step.
"""

from __future__ import annotations

import mlx.core as mx

from exo_kimi.arch.geometry import kv_group
from exo_kimi.errors import UsageError

__all__ = ["BITS", "STEP", "LatentCache8", "Parts", "group_of", "unpacked"]

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
        return unpacked(keys, self.offset), unpacked(values, self.offset)

    @property
    def state(self) -> tuple[Parts | None, Parts | None]:
        """What is held, for evaluation."""
        return self.keys, self.values

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


def group_of(parts: Parts) -> int:
    """Elements of a group."""
    return 4 * parts[0].shape[-1] // parts[1].shape[-1]


def unpacked(parts: Parts, count: int) -> mx.array:
    """The first tokens as arrays in the dtype of scales."""
    codes, scales, biases = (part[..., :count, :] for part in parts)
    return mx.dequantize(codes, scales, biases, group_of(parts), BITS)
