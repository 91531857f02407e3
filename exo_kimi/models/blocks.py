"""How attention is cut so that what it holds at a time stays under a budget.

Axes: B batch, L new tokens, T cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx

from exo_kimi.arch.scratch import AttentionShape
from exo_kimi.models import ops
from exo_kimi.models.latent_cache import Latents

Caches = TypeVar("Caches")

CAUSAL_ROWS = 256
"""Most query rows of a block under a causal mask: each block sees only the keys up to its own last row."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of the flat token list that attend together: B sequences of L new tokens each, in one cache.

    `mask` None lets every query see every key, "causal" aligns the last query with the last key, an array is boolean and
    broadcasts to (B, H, L, T). All layers of a pass are given the same span.
    """

    batch: int
    length: int
    mask: mx.array | str | None
    _whole: dict[int, mx.array] = field(default_factory=dict, init=False, repr=False, compare=False)

    def causal(self, rows: int, keys: int) -> mx.array:
        """The mask of some rows, the last of which sees all keys. That of all rows is made once for all layers: where they are
        one block, it is small beside the scores; other blocks' masks would add up."""
        if rows < self.length:
            return ops.causal_mask(rows, keys)
        if keys not in self._whole:
            self._whole[keys] = ops.causal_mask(rows, keys)
        return self._whole[keys]


@dataclass(frozen=True, slots=True)
class Work:
    """One span with what it attends to; `block_bytes` is what its blocks may take, `element_bytes` an activation takes."""

    span: Span
    rows: slice
    seen: Latents
    absorbed: bool
    block_bytes: int
    element_bytes: int

    @property
    def keys(self) -> int:
        """T."""
        return self.seen.keys

    @property
    def key_bytes(self) -> int:
        """Bytes of one element of every key position: B * T elements."""
        return self.span.batch * self.keys * self.element_bytes


def head_groups(work: Work, shape: AttentionShape) -> Iterator[slice]:
    """Heads whose expanded keys and values take at most half of the budget, at least one."""
    head_bytes = work.span.batch * shape.head_elements(work.keys) * work.element_bytes
    step = min(max(1, work.block_bytes // 2 // head_bytes), shape.heads)
    for start in range(0, shape.heads, step):
        yield slice(start, min(start + step, shape.heads))


def query_blocks(work: Work, heads: int, *, spent_bytes: int = 0) -> list[tuple[slice, int, mx.array | str | None]]:
    """Query rows, keys that any of them sees, and mask, such that one block's scores fit what is left of the budget."""
    span, keys = work.span, work.keys
    row_bytes = span.batch * heads * AttentionShape.row_elements(keys) * work.element_bytes
    step = max(1, (work.block_bytes - spent_bytes) // row_bytes)
    if isinstance(span.mask, str):
        step = min(step, CAUSAL_ROWS)
    blocks: list[tuple[slice, int, mx.array | str | None]] = []
    for start in range(0, span.length, step):
        stop = min(start + step, span.length)
        mask, seen = span.mask, keys
        if isinstance(mask, str):
            seen = keys - span.length + stop
        elif mask is not None:
            mask = mask[..., start:stop, :]
        blocks.append((slice(start, stop), seen, mask))
    return blocks


def pieces_of(
    segments: Sequence[tuple[int, Caches]], asked: Sequence[int], most: int
) -> Iterator[tuple[slice, list[tuple[int, Caches]], list[int]]]:
    """The rows of a ragged pass in runs of at most `most` tokens, each with the segments (tokens, caches) that lie in it, and
    how many tokens at the end of each are asked for; `asked` says so of whole segments."""
    start, room, pieces, ends = 0, most, [], []
    for (length, caches), wanted in zip(segments, asked, strict=True):
        left = length
        while left:
            taken = min(left, room)
            left, room = left - taken, room - taken
            pieces.append((taken, caches))
            ends.append(min(taken, max(0, wanted - left)))
            if not room:
                yield slice(start, start + most), pieces, ends
                start, room, pieces, ends = start + most, most, [], []
    if pieces:
        yield slice(start, start + most - room), pieces, ends


def finish(blocks: list[mx.array], block: mx.array) -> None:
    """Add a block of work; from the second on, compute the one before first: MLX runs ahead and would hold them all."""
    if blocks:
        mx.eval(blocks[-1])
    blocks.append(block)


def joined(parts: Sequence[mx.array], axis: int = 0) -> mx.array:
    """The parts end to end; a single one is itself."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)
