"""Batches of encoded conversations of nearly equal lengths, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import numpy as np

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


def make_batch(items: Sequence[Encoded]) -> Batch:
    """Lay sequences end to end, the longest first, in spans padded to the longest of each."""
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    spans: list[tuple[int, int]] = []
    inputs: list[Ids] = []
    rows, targets, padding, offset = [], [], [], 0
    for item in ordered:
        length = len(item.ids) - 1  # the last token is only ever a target
        if not spans or length < spans[-1][1] * (1 - _PADDED_SHARE):
            spans.append((0, length))
        count, width = spans[-1]
        spans[-1] = (count + 1, width)
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
