"""A parameter to be: MLX memory that is filled in place and then taken as an array; it knows nothing of files or models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx

from exo_kimi.runtime.loading.uninitialised import unfilled, zeros

RAW = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

SMALL_BYTES = 64 * 1024
"""Below it, filling with zeros is sooner done than asking for memory that is not."""


class Storage:
    """Memory of one array, allocated when first asked for, or with others by `allocate`.

    Args:
        shape: of the array.
        dtype: of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._raw: mx.array | None = None
        self._bytes: memoryview | None = None
        self._asked_bytes = 0

    def bytes(self) -> memoryview:
        """All of it, writable."""
        if self._bytes is None:
            allocate([self])
            self._bytes = memoryview(self._raw).cast("B")  # type: ignore[arg-type]
        return self._bytes

    def piece(self, start: int, end: int) -> memoryview:
        """Some of the bytes, to be filled: each is asked for once."""
        self._asked_bytes += end - start
        return self.bytes()[start:end]

    def array(self) -> mx.array:
        """The array itself, not evaluated; its memory is the one that was filled."""
        assert self._raw is not None and self._asked_bytes == self._raw.nbytes, "taken after all of it was filled"
        self._bytes = None
        return self._raw.view(self.dtype)


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

    def storage(self) -> Storage | None:
        """The memory that it is filled in; None where it is derived from another."""
        if self._storage is None and self.derive is None:
            self._storage = Storage(self.shape, self.dtype)
        return self._storage

    def pieces(self, part: int) -> list[memoryview]:
        """Writable bytes of one part, in order, asked for once; more than one where rows of other targets lie between."""
        storage = self.storage()
        assert storage is not None, "what is derived is not filled"
        if storage.shape == self.shape:
            size = prod(self.shape) * self.dtype.size // self.parts
            return [storage.piece(part * size, (part + 1) * size)]
        matrices, rows = prod(self.shape[:-2]), storage.shape[-2]
        row_bytes = self.shape[-1] * self.dtype.size
        each = matrices // self.parts
        starts = [(matrix * rows + self._first_row) * row_bytes for matrix in range(part * each, (part + 1) * each)]
        return [storage.piece(start, start + self.shape[-2] * row_bytes) for start in starts]

    def take(self) -> mx.array:
        """The filled array, not evaluated."""
        if self.derive is not None and self.source is not None:
            return self.derive(self.source.take())
        assert self._storage is not None, "a target is taken after its parts were filled"
        return self._storage.array()


def allocate(storages: Iterable[Storage], *, alone: bool = False) -> None:
    """Give memory to several at once, which costs less than one by one. With `alone` (see `unfilled`) and where pages come
    into being when they are first written, none is resident yet."""
    by_size: dict[bool, list[Storage]] = {False: [], True: []}
    for storage in dict.fromkeys(storages):
        if storage._raw is None:
            by_size[prod(storage.shape) * storage.dtype.size < SMALL_BYTES].append(storage)
    for small, several in by_size.items():
        # Raw words: numpy and memoryview know no bfloat16.
        forms = [(storage.shape, RAW[storage.dtype.size]) for storage in several]
        for storage, raw in zip(several, (unfilled if alone and not small else zeros)(forms), strict=True):
            storage._raw = raw


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
