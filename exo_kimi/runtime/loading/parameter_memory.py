"""Memory of the parameters to be: given to all at once, filled in place part by part, and then taken as arrays.

Where nothing else uses MLX, the memory is left unwritten, so that what is read into it is the first to touch it. MLX has no
function for that: its `empty` fills with zeros, which takes longer than reading from the page cache. But `mx.load` hands fresh
memory to the file that it loads from, and a file that writes nothing leaves it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

from exo_kimi.errors import MissingTensorError

RAW = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
NAMES = {mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32"}

SMALL_BYTES = 64 * 1024
"""Below it, filling with zeros is sooner done than asking for memory that is not."""

Form = tuple[tuple[int, ...], mx.Dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A parameter that is filled in `parts` equal parts."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    parts: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class DerivedParameter:
    """A parameter that is made from another once that is filled."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    derive: Callable[[mx.array], mx.array]
    source: Target


def can_share(parameters: Sequence[Target | DerivedParameter]) -> bool:
    """Whether rows of these parameters fit in one array."""
    forms = {
        (each.derive if isinstance(each, DerivedParameter) else None, each.dtype, *each.shape[:-2], each.shape[-1])
        for each in parameters
    }
    return len(forms) == 1 and all(len(each.shape) > 1 for each in parameters)


class ParameterMemory:
    """The memory of many targets.

    Args:
        groups: the rows of one group's targets lie in one array, one target after the other in each matrix.
        alone: no other thread of this process uses MLX, see `unfilled`. Where pages come into being when they are first
            written, none is resident yet.
    """

    def __init__(self, groups: Sequence[Sequence[Target]], *, alone: bool = False) -> None:
        shapes = [_joined_shape(group) for group in groups]
        dtypes = [group[0].dtype for group in groups]
        # Raw words: numpy and memoryview have no bfloat16.
        forms = [(shape, RAW[dtype.size]) for shape, dtype in zip(shapes, dtypes, strict=True)]
        large = {i for i, (shape, dtype) in enumerate(forms) if prod(shape) * dtype.size >= SMALL_BYTES}
        arrays: dict[int, mx.array] = {}
        for numbers, make in ((large, unfilled if alone else zeros), (set(range(len(forms))) - large, zeros)):
            wanted = sorted(numbers)
            arrays |= dict(zip(wanted, make([forms[i] for i in wanted]), strict=True))
        self._places: dict[Target, tuple[_Block, int]] = {}
        for i, group in enumerate(groups):
            block, first_row = _Block(arrays[i], dtypes[i]), 0
            for target in group:
                self._places[target] = block, first_row
                first_row += target.shape[-2] if len(group) > 1 else 0

    def pieces(self, target: Target, part: int) -> list[memoryview]:
        """Writable bytes of one part, in order, asked for once; more than one where rows of other targets lie between."""
        block, first_row = self._places[target]
        if block.raw.shape == target.shape:
            size = prod(target.shape) * target.dtype.size // target.parts
            return [block.piece(part * size, (part + 1) * size)]
        matrices, rows = prod(target.shape[:-2]), block.raw.shape[-2]
        row_bytes = target.shape[-1] * target.dtype.size
        each = matrices // target.parts
        starts = [(matrix * rows + first_row) * row_bytes for matrix in range(part * each, (part + 1) * each)]
        return [block.piece(start, start + target.shape[-2] * row_bytes) for start in starts]

    def take(self, parameter: Target | DerivedParameter) -> mx.array:
        """The filled array of a parameter, or of the group that it lies in; not evaluated.

        Raises:
            MissingTensorError: not all of it was filled.
        """
        if isinstance(parameter, DerivedParameter):
            return parameter.derive(self.take(parameter.source))
        return self._places[parameter][0].array()


def _joined_shape(group: Sequence[Target]) -> tuple[int, ...]:
    shape = group[0].shape
    return shape if len(group) == 1 else (*shape[:-2], sum(target.shape[-2] for target in group), shape[-1])


class _Block:
    """One array's memory, and how much of it was asked for."""

    def __init__(self, raw: mx.array, dtype: mx.Dtype) -> None:
        self.raw = raw
        self._dtype = dtype
        self._bytes: memoryview | None = None
        self._asked_bytes = 0

    def piece(self, start: int, end: int) -> memoryview:
        """Some of the bytes, to be filled: each is asked for once."""
        if self._bytes is None:
            self._bytes = memoryview(self.raw).cast("B")  # type: ignore[arg-type]  # it has the buffer protocol
        self._asked_bytes += end - start
        return self._bytes[start:end]

    def array(self) -> mx.array:
        """The array itself, not evaluated; its memory is the one that was filled."""
        if self._asked_bytes != self.raw.nbytes:
            raise MissingTensorError(
                "a parameter was taken before all of it was filled",
                expected=f"{self.raw.nbytes:,} bytes",
                found=f"{self._asked_bytes:,} bytes",
            )
        self._bytes = None
        return self.raw.view(self._dtype)


def unfilled(forms: Sequence[Form]) -> list[mx.array]:
    """Evaluated arrays whose bytes are whatever was there; on most systems their pages come into being when written.

    Only for a process in which no other thread uses MLX meanwhile, as of a stage. MLX's own thread asks this file for bytes
    and so needs Python's lock, and another that evaluates or clears the cache can hold that lock while it waits for MLX's
    thread: both hang.

    Args:
        forms: shape and dtype (uint8, uint16 or uint32) of each.
    """
    try:
        # Its annotation wants a whole file of Python.
        loaded: Any = mx.load(_Unread(forms), format="safetensors")  # type: ignore[arg-type]
        arrays: list[mx.array] = [loaded[str(number)] for number in range(len(forms))]
        mx.eval(arrays)
    except (RuntimeError, TypeError, ValueError):
        # An MLX that loads from no object of Python; or no memory is left, and this raises as well.
        arrays = zeros(forms)
    return arrays


def zeros(forms: Sequence[Form]) -> list[mx.array]:
    """The same, filled: sooner done where an array is small."""
    arrays = [mx.zeros(shape, dtype) for shape, dtype in forms]
    mx.eval(arrays)
    return arrays


@dataclass(slots=True)
class _Unread:
    """As much of a file as `mx.load` asks for: a safetensors header, and then bytes that are left unwritten.

    The header is asked for first and in order; the arrays after it from several threads at once.
    """

    forms: Sequence[Form]
    closed: bool = False
    position: int = 0
    size: int = 0
    head: bytes = b""

    def __post_init__(self) -> None:
        tensors, start = {}, 0
        for number, (shape, dtype) in enumerate(self.forms):
            end = start + prod(shape) * dtype.size
            tensors[str(number)] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
            start = end
        header = json.dumps(tensors).encode()
        self.head = len(header).to_bytes(8, "little") + header
        self.size = len(self.head) + start

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        self.position = (0, self.position, self.size)[whence] + offset
        return self.position

    def tell(self) -> int:
        """As of a file."""
        return self.position

    def readinto(self, destination: memoryview) -> int:
        """What is left of the header; then nothing, as if it were everything."""
        piece, self.head = self.head[: len(destination)], self.head[len(destination) :]
        destination[: len(piece)] = piece
        return len(destination)
