"""What decoding makes once: row numbers and rotations for all layers of a step, and views of weights for all steps.

The `decode` methods stand beside the calls that are their oracle, in `mla`, `moe` and `kimi_k2`. They read modules as
`self["name"]`, as MLX's own layers read arrays: an attribute takes ten times as long, and a step of 61 layers reads a thousand.

Axes: N tokens, one of each sequence, as (N, 1, 1, D); K experts of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from exo_kimi.models import ops
from exo_kimi.models.rope import Rope

T = TypeVar("T")


class DecodeStep:
    """What all layers of a step share.

    Args:
        rope: the model's.
        offsets: each sequence's tokens before this one.
        dtype: of the activations.
        chosen: K.
    """

    def __init__(self, rope: Rope, offsets: list[int], dtype: mx.Dtype, *, chosen: int) -> None:
        tokens = len(offsets)
        self.rows = mx.array(np.repeat(np.arange(tokens, dtype=np.uint32), chosen).reshape(tokens, 1, 1, chosen))
        self.choices = mx.array(np.arange(tokens * chosen, dtype=np.uint32).reshape(tokens, 1, 1, chosen))
        self._rope = rope
        self._positions = mx.array(offsets, dtype=mx.int32)
        self._matrix: mx.array | None = None
        if ops.on_cpu() and dtype == mx.float32:
            # Where MLX has no kernel for it, a rotation is a matrix product like any other.
            self._matrix = mx.array(rope.matrices(np.array(offsets))[:, None])

    def turned(self, x: mx.array) -> mx.array:
        """(N, 1, heads, rope) at the positions of its tokens."""
        if self._matrix is not None:
            return x @ self._matrix
        tokens, _, heads, dims = x.shape
        return self._rope.turn(x.reshape(tokens, heads, 1, dims), self._positions).reshape(tokens, 1, heads, dims)


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


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__(dims, eps)
        self._operands = Derived(partial(_operands, eps))

    def decode(self, x: mx.array) -> mx.array:
        """The same of single tokens (N, 1, 1, D).

        The CPU backend has no kernel for it and takes seven operations, of which handing each over costs more than it computes.
        In float32 the mean is a product of each row with itself there, which saves three; shapes that need no broadcast for one
        token save as many nodes.
        """
        weight = self["weight"]
        if not (ops.on_cpu() and x.dtype == weight.dtype == mx.float32):
            return mx.fast.rms_norm(x, weight, self.eps)
        row, least = self._operands(weight)
        mean = mx.addmm(least, x, x.swapaxes(-1, -2), alpha=1 / x.shape[-1])
        return x * mx.rsqrt(mean) * row


def _operands(eps: float, weight: mx.array) -> tuple[mx.array, mx.array]:
    row, least = weight[None, None, None], mx.full((1, 1, 1, 1), eps)
    mx.eval(row, least)
    return row, least
