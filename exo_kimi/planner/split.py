"""Splits of layers over stages: `--split` read and checked, and layers balanced by bytes where no machine is known.

A split is so many layers per stage, in order; ranges are half-open and cover every layer once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from exo_kimi.errors import SplitError
from exo_kimi.planner.search.solver import INFINITE, SplitProblem, solve
from exo_kimi.planner.weights.bytes import ModelBytes

LayerRange = tuple[int, int]
EVENNESS_STEPS = 1 << 29  # of all bytes: their square, which bounds every sum of squares, stays under INFINITE


def parse_split(
    split: str | Sequence[int], layers: int, *, most_stages: int | None = None, stages: str = "stages"
) -> tuple[LayerRange, ...]:
    """Ranges of a split such as `44,17`.

    Args:
        split: layers per stage, as text or as numbers.
        layers: of the model.
        most_stages: how many there can be; None for any number.
        stages: what the stages are called in errors, such as `machines`.

    Raises:
        SplitError: not a list of positive numbers, more stages than there can be, or they do not sum to `layers`.
    """
    text = split if isinstance(split, str) else ",".join(map(str, split))
    counts: list[int] = []
    for part in text.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and int(digits[:9]) > 0 and len(digits) < 9):
            raise SplitError(
                f"a split that these {stages} cannot take",
                expected="layers of each, at least 1, such as 44,17",
                found=repr(text),
                where="--split",
            )
        counts.append(int(digits))
    if most_stages is not None and len(counts) > most_stages:
        raise SplitError(
            f"a split that these {stages} cannot take",
            expected=f"{layers} layers over at most {most_stages} {stages}",
            found=f"{text}: {len(counts)} shares",
            where="--split",
        )
    if sum(counts) != layers:
        raise SplitError(
            f"a split that these {stages} cannot take: {text} sums to {sum(counts)}, the model has {layers} layers",
            expected=f"{layers} layers over {_stages(len(counts))}",
            found=f"{' + '.join(map(str, counts))} = {sum(counts)}",
            where="--split",
            fix=f"change one number by {layers - sum(counts):+d}, or leave --split out",
        )
    return to_ranges(counts)


def to_ranges(counts: Sequence[int]) -> tuple[LayerRange, ...]:
    """Half-open ranges of layer counts."""
    return tuple(pairwise(accumulate(counts, initial=0)))


def balanced_split(model: ModelBytes, stages: int) -> tuple[LayerRange, ...]:
    """The split whose fullest stage holds the fewest bytes; of those, the most even one (least sum of squares).

    Exact, by the planner's solver over equal machines: peak is a stage's bytes, total the sum of their squares, counted in
    2^29ths of the model.

    Args:
        model: its bytes.
        stages: at least 1 and at most the number of layers, since a stage without a layer is no stage.

    Raises:
        SplitError: fewer than 1 stage, or more stages than layers.
    """
    layers = model.layers
    if not 1 <= stages <= layers:
        raise SplitError(
            f"cannot spread {layers} layers over {_stages(stages)}",
            expected=f"1 to {layers} stages: each needs a layer",
            found=stages,
            where="--stages",
        )
    sizes = np.full((layers + 1, layers + 1), INFINITE, np.int64)
    squares = sizes.copy()
    step_bytes = max(1, -(-model.weight_bytes(0, layers) // EVENNESS_STEPS))
    for start in range(layers):
        for end in range(start + 1, layers + 1):
            size_bytes = model.weight_bytes(start, end)
            sizes[start, end], squares[start, end] = size_bytes, (size_bytes // step_bytes) ** 2
    nothing = np.zeros((stages, stages), np.int64)
    problem = SplitProblem(
        total=np.stack([squares] * stages),
        peak=np.stack([sizes] * stages),
        hop_total=nothing,
        hop_peak=nothing,
        kinds=(0,) * stages,
        stages=stages,
    )
    found = solve(problem, lambda total, peak: peak * INFINITE + total)
    if found is None:
        raise AssertionError("every split is allowed")
    return tuple(pairwise(found.cuts))


def _stages(count: int) -> str:
    return f"{count} stage{'' if count == 1 else 's'}"
