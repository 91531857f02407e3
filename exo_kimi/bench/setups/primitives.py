"""The MLX primitives of a lazy graph, counted before it is evaluated: as it is, or as on a GPU."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.models import ops

VIEWS = frozenset(
    {"AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"}
    | {"StopGradient", "Transpose", "Unflatten", "View"}
)
"""Primitives that usually only describe memory anew: no kernel is launched for them on a GPU."""

_NODE = re.compile(r'\[label ="([^"]+)", shape=rectangle\]')


def primitives(*arrays: mx.array) -> Counter[str]:
    """How many of each primitive stand between these arrays and what is evaluated already."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        return Counter(_NODE.findall(path.read_text(encoding="utf-8")))


def dispatches(*arrays: mx.array) -> int:
    """How many of them are work and no view."""
    return sum(count for name, count in primitives(*arrays).items() if name not in VIEWS)


@contextlib.contextmanager
def one_kernel_each() -> Iterator[None]:
    """Graphs built within have one node for what has a kernel on a GPU, and for each element-wise chain that is compiled there.

    They are for counting: a norm and a rotation are nodes that compute something else.
    """

    def single(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.sin(x)

    with contextlib.ExitStack() as stack:
        for owner, name, value in ((mx.fast, "rms_norm", single), (mx.fast, "rope", single), (ops, "on_cpu", bool)):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
