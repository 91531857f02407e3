"""Batches of encoded conversations of nearly equal lengths, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.train.data.conversations import training_conversation
from exo_kimi.train.model.forward import Batch, Ids

_PADDED_SHARE = 0.2
"""A sequence joins a span when this share of its longest would be padding at most."""


def training_groups(
    encoder: Encoder, seed: int, tokens: int, *, start: int = 0, parts_from: Sequence[int] = ()
) -> Iterator[list[Encoded]]:
    """Yield groups of conversations of about `tokens` tokens each, without end.

    Args:
        start: skip as many groups: group n is the same wherever the iteration began.
        parts_from: the first group of each part of the training after the first.
    """
    group = start
    while True:
        rng = Random(f"text {seed} {group}")
        part = sum(group >= first for first in parts_from)
        made: list[Encoded] = []
        while sum(len(item.ids) for item in made) < tokens:
            made.append(encoder.encode(training_conversation(rng, part=part)))
        yield made
        group += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut:
    """Whole sequences laid end to end, the longest first, in spans padded to the longest of each.

    Args:
        inputs: (N,) token ids.
        spans: sequences and padded tokens of each.
        padding: (N,) bool, rows that are no text.
        starts: (N,) of each row, the first row of its sequence.
        ends: (N,) and the row after the last of its text.
        counted_next: (N,) bool, whether the loss counts the token that follows.
    """

    inputs: Ids
    spans: Sequence[tuple[int, int]]
    padding: NDArray[np.bool_]
    starts: NDArray[np.intp]
    ends: NDArray[np.intp]
    counted_next: NDArray[np.bool_]


def lay_out(items: Sequence[Encoded]) -> LaidOut:
    """Lay whole sequences end to end: unlike in `make_batch`, their last tokens are read too."""
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    spans = _spans([len(item.ids) for item in ordered])
    widths = [width for count, width in spans for _ in range(count)]
    inputs, padding, starts, ends, counted, offset = [], [], [], [], [], 0
    for item, width in zip(ordered, widths, strict=True):
        length = len(item.ids)
        inputs.append(np.pad(item.ids, (0, width - length)))
        padding.append(np.arange(width) >= length)
        starts.append(np.full(width, offset))
        ends.append(np.full(width, offset + length))
        counted.append(np.pad(item.counted[1:], (0, width - length + 1)))
        offset += width
    return LaidOut(
        inputs=np.concatenate(inputs),
        spans=spans,
        padding=np.concatenate(padding),
        starts=np.concatenate(starts),
        ends=np.concatenate(ends),
        counted_next=np.concatenate(counted),
    )


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Sequences and padded tokens of each span, of descending lengths."""
    spans: list[tuple[int, int]] = []
    for length in lengths:
        if not spans or length < spans[-1][1] * (1 - _PADDED_SHARE):
            spans.append((0, length))
        count, width = spans[-1]
        spans[-1] = (count + 1, width)
    return spans


def make_batch(items: Sequence[Encoded]) -> Batch:
    """Lay sequences end to end, the longest first, in spans padded to the longest of each."""
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    spans = _spans([len(item.ids) - 1 for item in ordered])
    widths = [width for count, width in spans for _ in range(count)]
    inputs: list[Ids] = []
    rows, targets, padding, offset = [], [], [], 0
    for item, width in zip(ordered, widths, strict=True):
        length = len(item.ids) - 1  # the last token is only ever a target
        inputs.append(np.pad(item.ids[:-1], (0, width - length)))
        padding.append(np.arange(width) >= length)
        places = np.flatnonzero(item.counted[1:])
        rows.append(offset + places)
        targets.append(item.ids[1:][places])
        offset += width
    return Batch(
        inputs=np.concatenate(inputs),
        spans=spans,
        rows=np.concatenate(rows),
        targets=np.concatenate(targets),
        padding=np.concatenate(padding),
    )
