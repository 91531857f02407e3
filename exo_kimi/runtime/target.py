"""A parameter to be: MLX memory that is filled in place and then taken as an array; it knows nothing of files or models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx

RAW = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


class Storage:
    """Memory of one array, allocated when first asked for.

    Args:
        shape: of the array.
        dtype: of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._raw: mx.array | None = None

    def bytes(self) -> memoryview:
        """All of it, writable."""
        if self._raw is None:
            # Raw words: numpy and memoryview know no bfloat16.
            self._raw = mx.zeros(self.shape, RAW[self.dtype.size])
            mx.eval(self._raw)
        return memoryview(self._raw).cast("B")  # type: ignore[arg-type]

    def array(self) -> mx.array:
        """The array itself; its memory is the one that was filled."""
        assert self._raw is not None, "taken after it was filled"
        array = self._raw.view(self.dtype)
        mx.eval(array)
        return array


@dataclass(slots=True)
class Target:
    """One parameter, alone in its memory or among others.

    Args:
        shape: of the parameter.
        dtype: of the parameter.
        parts: it is filled in so many equal parts.
        derive: makes the array from that of `source` instead.
        source: another target.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    parts: int = 1
    derive: Callable[[mx.array], mx.array] | None = None
    source: Target | None = None
    _storage: Storage | None = field(default=None, repr=False)
    _first_row: int = field(default=0, repr=False)

    def pieces(self, part: int) -> list[memoryview]:
        """Writable bytes of one part, in order; more than one where rows of other targets lie between."""
        if self._storage is None:
            self._storage = Storage(self.shape, self.dtype)
        data = self._storage.bytes()
        if self._storage.shape == self.shape:
            size = len(data) // self.parts
            return [data[part * size : (part + 1) * size]]
        matrices, rows = prod(self.shape[:-2]), self._storage.shape[-2]
        row_bytes = len(data) // (matrices * rows)
        each = matrices // self.parts
        starts = [(matrix * rows + self._first_row) * row_bytes for matrix in range(part * each, (part + 1) * each)]
        return [data[start : start + self.shape[-2] * row_bytes] for start in starts]

    def take(self) -> mx.array:
        """The filled array."""
        if self.derive is not None and self.source is not None:
            array = self.derive(self.source.take())
        else:
            assert self._storage is not None, "a target is taken after its parts were filled"
            array = self._storage.array()
        mx.eval(array)
        return array


def can_share(targets: Sequence[Target]) -> bool:
    """Whether rows of these targets fit in one array."""
    forms = {(target.dtype, target.derive, *target.shape[:-2], target.shape[-1]) for target in targets}
    return len(forms) == 1 and all(len(target.shape) > 1 for target in targets)


def share(targets: Sequence[Target]) -> Storage:
    """Lay the rows of several targets that can share into one array; it is taken from the storage, not from them."""
    shape = targets[0].shape
    storage = Storage((*shape[:-2], sum(target.shape[-2] for target in targets), shape[-1]), targets[0].dtype)
    first = 0
    for target in targets:
        target._storage, target._first_row = storage, first
        first += target.shape[-2]
    return storage
