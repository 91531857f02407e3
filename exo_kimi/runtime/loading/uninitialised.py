"""Memory of MLX that nothing has written yet, so that what is read into it is the first to touch it; it knows nothing of files.

MLX has no function for it: its `empty` fills with zeros, which takes longer than reading from the page cache. But `mx.load`
hands fresh memory to the file that it loads from, and a file that writes nothing leaves it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

NAMES = {mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32"}

Form = tuple[tuple[int, ...], mx.Dtype]


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
