"""Relative error of each module's weights between two checkpoints of one architecture, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.compress.ranges import RangeReader

BLOCK_WEIGHTS = 2**22
"""Weights of a block: 16 MiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """One module in two checkpoints.

    Args:
        path: of the module, in the reference.
        error: |theirs - ours| / |ours|, over all its weights.
        reference, subject: how each is stored, such as `4-bit, group 32` or `BF16`.
    """

    path: str
    error: float
    reference: str
    subject: str


def weight_errors(reference: Checkpoint, subject: Checkpoint, plan: PrunePlan | None = None) -> Iterator[WeightError]:
    """Every module that both have in one shape; with a plan, those of the experts and layers that stayed.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    ours = {source.spec.path: source for source in reference.manifest().sources}
    layers = plan.kept_layers() if plan is not None else tuple(range(reference.config.num_hidden_layers))
    with RangeReader(reference.directory) as here, RangeReader(subject.directory) as there:
        for source in subject.manifest().sources:
            layer = source.spec.layer
            if layer is not None and layer >= len(layers):
                continue
            number = None if layer is None else layers[layer]
            path = source.spec.path if layer is None else source.spec.path.replace(f".{layer}.", f".{number}.", 1)
            original = ours.get(path)
            kept = None if plan is None or number is None else plan.kept.get(number)
            if original is None or original.spec.shape[-1:] != source.spec.shape[-1:]:
                continue
            pairs = _matrices(original, source, kept)
            if pairs:
                yield WeightError(
                    path=path,
                    error=_error(SourceRows(here, original), SourceRows(there, source), pairs, source),
                    reference=_stored(original),
                    subject=_stored(source),
                )


def _matrices(ours: ModuleSource, theirs: ModuleSource, kept: Sequence[int] | None) -> list[tuple[int, int]]:
    """Matrices of both that are the same one; empty where they cannot be laid beside each other."""
    kind = theirs.spec.kind
    if kind in ("experts", "heads"):
        if ours.spec.shape[0] == theirs.spec.shape[0]:
            return [(matrix, matrix) for matrix in range(theirs.spec.shape[0])]
        if kind == "experts" and kept is not None and len(kept) == theirs.spec.shape[0]:
            return [(expert, place) for place, expert in enumerate(kept)]
        return []
    return [(0, 0)] if ours.spec.shape == theirs.spec.shape and kind != "norm" else []


def _error(ours: SourceRows, theirs: SourceRows, pairs: Sequence[tuple[int, int]], source: ModuleSource) -> float:
    rows, columns = source.spec.shape[-2:]
    step = max(1, BLOCK_WEIGHTS // columns)
    difference = length = 0.0
    for mine, other in pairs:
        for first in range(0, rows, step):
            end = min(first + step, rows)
            a, b = ours.floats(mine, first, end), theirs.floats(other, first, end)
            difference += float(((a - b) ** 2).sum(dtype="float64"))
            length += float((a**2).sum(dtype="float64"))
    return math.sqrt(difference / length) if length else 0.0


def _stored(source: ModuleSource) -> str:
    if source.quant is not None:
        return source.quant.describe()
    return "FP8" if source.layout == "fp8" else source.dtype
