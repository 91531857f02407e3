"""What decoding makes once: row numbers and rotations for all layers of a step, and views of weights for all steps.

The `decode` methods stand beside the calls that are their oracle, in `mla`, `moe` and `kimi_k2`. They read modules as
`self["name"]`, as MLX's own layers read arrays: an attribute takes ten times as long, and a step of 61 layers reads a thousand.

Axes: N tokens, one of each sequence or a few (guesses that are verified), as (N, 1, 1, D); K experts of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from exo_kimi.models import ops
from exo_kimi.models.rope import Rope

T = TypeVar("T")
LOWEST = -3e4
"""Added to a score that is not to count: exp of it is 0 in every dtype, and float16 holds it."""
LONGEST_RUN = 9
"""New tokens of a sequence up to which a step goes through `decode`: the newest and eight guesses."""
MOST_MASK_BYTES = 1 << 24
"""Of the masks of a step's runs together; above, attention in blocks makes them piece by piece."""


def mask_bytes(offsets: Sequence[int], lengths: Sequence[int], *, heads: int, element_bytes: int) -> int:
    """What the masks of a step take: a row for each head of each token of a run.

    Args:
        offsets, lengths: of each sequence, tokens before the step and in it.
        heads: of attention.
        element_bytes: of an activation.
    """
    keys = sum(length * (offset + length) for offset, length in zip(offsets, lengths, strict=True) if length > 1)
    return keys * heads * element_bytes


class DecodeStep:
    """What all layers of a step share.

    Args:
        rope: the model's; None where it has no rotary positions.
        offsets: each sequence's tokens before this step.
        dtype: of the activations.
        chosen: K.
        lengths: each sequence's tokens in this step; None for one of each.

    Attributes:
        tokens: N.
        lengths: of each sequence.
        positions: (N,) int32, of the tokens.
        rows, choices: which token each expert's input is of, and which choice; (N, 1, 1, K) uint32.
        by_products: whether norms and rotations are matrix products like any other, where MLX has no kernels for them: in float32
            on a CPU.
    """

    def __init__(
        self,
        rope: Rope | None,
        offsets: list[int],
        dtype: mx.Dtype,
        *,
        chosen: int,
        lengths: list[int] | None = None,
    ) -> None:
        self.lengths = lengths or [1] * len(offsets)
        places = [at + n for at, length in zip(offsets, self.lengths, strict=True) for n in range(length)]
        tokens = self.tokens = len(places)
        self._dtype = dtype
        self._masks: dict[tuple[int, int, int], mx.array] = {}
        self.rows = mx.array(np.repeat(np.arange(tokens, dtype=np.uint32), chosen).reshape(tokens, 1, 1, chosen))
        self.choices = mx.array(np.arange(tokens * chosen, dtype=np.uint32).reshape(tokens, 1, 1, chosen))
        self.by_products = ops.on_cpu() and dtype == mx.float32
        self._rope = rope
        self.positions = mx.array(places, dtype=mx.int32)
        self._matrix = None
        if rope is not None and self.by_products:
            self._matrix = mx.array(rope.matrices(np.array(places))[:, None])

    def mask(self, length: int, keys: int, heads: int) -> mx.array | None:
        """(length * heads, keys) to add to the scores of a run, whose last token sees all keys; None for a single token. Rows are
        those of the first token's heads, then the second's; made once for all layers."""
        if length == 1:
            return None
        kind = length, keys, heads
        if kind not in self._masks:
            seen = np.arange(keys)[None] <= np.arange(keys - length, keys)[:, None]
            rows = mx.array(np.where(seen, 0.0, LOWEST).astype(np.float32)).astype(self._dtype)
            self._masks[kind] = mx.repeat(rows, heads, axis=0)
        return self._masks[kind]

    def turned(self, x: mx.array) -> mx.array:
        """(N, 1, heads, rope) at the positions of its tokens."""
        if self._matrix is not None:
            return x @ self._matrix
        if self._rope is None:
            return x
        tokens, _, heads, dims = x.shape
        return self._rope.turn(x.reshape(tokens, heads, 1, dims), self.positions).reshape(tokens, 1, heads, dims)


class Derived(Generic[T]):
    """What is made of a module's parameters, kept until one of them is another array; no parameter itself.

    An array that is written into in place stays the same one, so what was made of it before is kept.

    Args:
        make: called with the parameters.
    """

    __slots__ = ("_make", "_sources", "_value")

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._sources: tuple[object, ...] = (object(),)
        self._value: T

    def __call__(self, *sources: object) -> T:
        """What was made of these, the same number each time."""
        if not all(map(is_, sources, self._sources)):
            self._value = self._make(*sources)
            self._sources = sources
        return self._value


class NormOperands:
    """What a norm's `decode` takes of its weight (D,): it as (1, 1, 1, D), eps as (1, 1, 1, 1) and 1 / D.

    No `Derived`, whose call costs as much as an operation: four norms in each layer would feel it.
    """

    __slots__ = ("eps", "is_float32", "row", "share", "weight")

    def __init__(self, weight: mx.array, eps: float) -> None:
        self.weight, self.is_float32, self.share = weight, weight.dtype == mx.float32, 1 / weight.size
        self.row, self.eps = weight[None, None, None], mx.full((1, 1, 1, 1), eps)
        mx.eval(self.row, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__(dims, eps)
        self._operands: NormOperands | None = None

    def decode(self, x: mx.array, step: DecodeStep) -> mx.array:
        """The same of single tokens (N, 1, 1, D).

        The CPU backend has no kernel for it and takes seven operations, of which handing each over costs more than it computes.
        In float32 the mean is a product of each row with itself there, which saves three; shapes that need no broadcast for one
        token save as many nodes.
        """
        operands = self._operands
        if operands is None or operands.weight is not self["weight"]:
            operands = self._operands = NormOperands(self["weight"], self.eps)
        if not (step.by_products and operands.is_float32):
            return mx.fast.rms_norm(x, operands.weight, self.eps)
        mean = mx.addmm(operands.eps, x, x.swapaxes(-1, -2), alpha=operands.share)
        return x * mx.rsqrt(mean) * operands.row
