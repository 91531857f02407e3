"""Which kernels a piece of work asks MLX for: primitives with their arguments, dtypes and classes of shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

Kernel = tuple[Any, ...]
FEW, SOME = 8, 31
"""Rows up to which Metal takes its vector kernels, and those for narrow products."""
_MOVES = frozenset(
    "Broadcast Concatenate Copy ExpandDims Flatten Reshape Slice SliceUpdate Split Squeeze Transpose Unflatten View".split()
)


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[set[Kernel]]:
    """Collects the kernels of everything that is evaluated by `mx.eval` or `mx.async_eval` meanwhile."""
    found: set[Kernel] = set()
    evaluate, enqueue = mx.eval, mx.async_eval

    def note(*given: Any) -> None:
        arrays = [value for _, value in tree_flatten(list(given)) if isinstance(value, mx.array)]
        if arrays:
            mx.export_function(lambda event: found.update(_kernels(event)), lambda: arrays)

    def contiguous(x: mx.array) -> mx.array:
        found.add(("Contiguous", _classes(x.shape), str(x.dtype)))
        return x  # the primitive cannot be exported

    with patch.context() as inner, without_compiling():
        inner.setattr(mx, "contiguous", contiguous)
        inner.setattr(mx, "eval", lambda *given: (note(*given), evaluate(*given))[1])
        inner.setattr(mx, "async_eval", lambda *given: (note(*given), enqueue(*given))[1])
        yield found


@contextmanager
def without_compiling() -> Iterator[None]:
    """What mlx.nn compiles would be one primitive that cannot be exported."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _kernels(event: dict[str, Any]) -> Iterator[Kernel]:
    if event["type"] != "primitive":
        return
    name, dtype = event["name"], str(event["outputs"][0][2])
    if name in _MOVES:
        # At most a copy, which is the same for any number of parts and any place.
        yield "copy", dtype, len(event["outputs"][0][1])
    else:
        shapes = [(_classes(shape), str(dtype)) for _, shape, dtype in (*event["inputs"], *event["outputs"])]
        yield name, *shapes


def _classes(shape: tuple[int, ...]) -> tuple[str, ...]:
    return tuple("1" if n == 1 else "few" if n <= FEW else "some" if n <= SOME else "many" for n in shape)
