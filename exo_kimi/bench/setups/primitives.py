"""The MLX primitives of a lazy graph, counted before it is evaluated; it knows nothing of models."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path

import mlx.core as mx

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
