"""Where prefixes are cached: in the stages' memory (PrefixIndex) and on their disks (DiskBlockIndex).

Bookkeeping alone; `prefix_cache` decides what is done with it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exo_kimi.runtime.pipeline import DiskBlocks
from exo_kimi.runtime.prefix_key import is_snapshot, snapshot_key
from exo_kimi.runtime.steps import Blocks

WINDOW_BLOCKS = 16  # on their way at a time: fewer than a stage queues, so that none is refused
Tokens = npt.NDArray[np.int64]
"""Ids, those of pictures as `prefix_key.mark_pictures` writes them."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """Caches that every stage holds under `seq_id`: exactly `tokens`."""

    seq_id: int
    tokens: Tokens


def as_tokens(tokens: Sequence[int]) -> Tokens:
    """Ids as an array that compares fast."""
    return np.array(tokens, np.int64)


def common_tokens(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


class PrefixIndex:
    """Caches that ended sequences left on the stages, the one that was not used for longest first.

    None is held by another entirely. They are also kept in the order of their tokens' bytes, in which what shares a beginning
    stands together: looking among thousands of long ones takes as many comparisons as among a few.
    """

    def __init__(self) -> None:
        self._kept: dict[int, CachedPrefix] = {}
        self._sorted: list[CachedPrefix] = []
        self._used: dict[int, int] = {}
        self._uses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[CachedPrefix]:
        return iter(tuple(self._kept.values()))

    def add(self, kept: CachedPrefix) -> list[CachedPrefix]:
        """Note caches; returns those, noted before or these themselves, that others hold entirely, and forgets them."""
        holding = self._beginning_with(kept.tokens)
        if holding:
            self.touch(min(holding, key=self._last_use))
            return [kept]
        at = self._place(kept.tokens)
        before = self._sorted[at - 1 : at]  # all that it may hold: others between would hold that one, too
        covered = [other for other in before if common_tokens(kept.tokens, other.tokens) == len(other.tokens)]
        for other in covered:
            self.remove(other)
        self._sorted.insert(at - len(covered), kept)
        self._kept[kept.seq_id] = kept
        self.touch(kept)
        return covered

    def remove(self, kept: CachedPrefix) -> None:
        """Forget caches."""
        del self._kept[kept.seq_id]
        del self._used[kept.seq_id]
        del self._sorted[self._place(kept.tokens)]

    def touch(self, kept: CachedPrefix) -> None:
        """These caches were used now."""
        self._kept[kept.seq_id] = self._kept.pop(kept.seq_id)
        self._uses += 1
        self._used[kept.seq_id] = self._uses

    def best(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        """The caches that share the most first tokens, and how many; the shortest of equal ones, which loses least."""
        at = self._place(tokens)
        beside = self._sorted[max(0, at - 1) : at + 1]
        if not beside:
            return None
        count = max(common_tokens(kept.tokens, tokens) for kept in beside)
        found = self._beginning_with(tokens[:count])
        return min(found, key=lambda kept: (len(kept.tokens), self._last_use(kept))), count

    def whole(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        """The caches that these tokens begin with entirely, and their length: what holds of states that cannot be cut. There is
        one at most, and it stands right before where these tokens would."""
        at = self._place(tokens)
        for kept in self._sorted[max(0, at - 1) : at + 1]:
            if common_tokens(kept.tokens, tokens) == len(kept.tokens):
                return kept, len(kept.tokens)
        return None

    def _place(self, tokens: Tokens) -> int:
        """Where such tokens are or would be."""
        return bisect_left(self._sorted, tokens.tobytes(), key=lambda kept: kept.tokens.tobytes())

    def _beginning_with(self, tokens: Tokens) -> list[CachedPrefix]:
        """Those that begin with all of these tokens."""
        first = self._place(tokens)
        start, length = tokens.tobytes(), len(tokens)
        end = bisect_right(self._sorted, start, lo=first, key=lambda kept: kept.tokens[:length].tobytes())
        return self._sorted[first:end]

    def _last_use(self, kept: CachedPrefix) -> int:
        return self._used[kept.seq_id]


class DiskBlockIndex:
    """Blocks and snapshots on the stages' disks: which every stage has, which to write, which to delete. One counts once every
    stage has told that it has it.

    Args:
        block_tokens: tokens of one.
        capacity_blocks: for how many the disk of every stage has room.
        snapshot_blocks: so many of them a snapshot takes.
        stages: for each, the keys of what is there, the one that was not used for longest first.
    """

    def __init__(
        self,
        *,
        block_tokens: int = 1,
        capacity_blocks: int = 0,
        snapshot_blocks: int = 1,
        stages: Sequence[Sequence[str]] = (),
    ) -> None:
        self.block_tokens = block_tokens
        self.capacity_blocks = capacity_blocks
        self._snapshot_blocks = snapshot_blocks
        everywhere = set.intersection(*map(set, stages)) if stages else set()
        self._complete = dict.fromkeys(key for key in (stages[0] if stages else ()) if key in everywhere)
        self._stages = len(stages)
        self._complete_blocks = sum(map(self._size, self._complete))
        self._answering_blocks = 0
        self._drops = sorted({key for keys in stages for key in keys} - everywhere)
        self._queue: deque[tuple[int, int, str]] = deque()
        self._queued: set[str] = set()
        self._answers: dict[str, set[int]] = {}
        self._refused: set[str] = set()

    def __len__(self) -> int:
        return len(self._complete)

    def count_complete(self, keys: Sequence[str]) -> int:
        """How many of a prefix's first blocks every stage has."""
        for count, key in enumerate(keys):
            if key not in self._complete:
                return count
        return len(keys)

    def count_to_snapshot(self, keys: Sequence[str]) -> int:
        """How many of a prefix's first blocks lead to a snapshot, where every stage has it and them."""
        known = self.count_complete(keys)
        return next((count for count in range(known, 0, -1) if snapshot_key(keys[count - 1]) in self._complete), 0)

    def touch(self, keys: Sequence[str]) -> None:
        """These blocks were used now: the first last, since without it the others are of no use."""
        for key in reversed(keys):
            if key in self._complete:
                self._complete[key] = self._complete.pop(key)

    def request_stores(self, seq_id: int, keys: Sequence[str], snapshots: Sequence[tuple[int, str]] = ()) -> None:
        """Have a sequence's first blocks written, as far as they are not and there is room for so many, and then its snapshots,
        each at a position and under the key of the block before it."""
        after = [(position, snapshot_key(key)) for position, key in snapshots]
        self.touch([*keys, *(key for _, key in after)])
        wanted = [(index * self.block_tokens, key) for index, key in enumerate(keys[: self.capacity_blocks])]
        for offset, key in (*wanted, *after):
            if key not in self._complete and key not in self._queued and key not in self._answers:
                self._queue.append((seq_id, offset, key))
                self._queued.add(key)

    def cancel_stores(self, seq_id: int, *, snapshot: str | None = None) -> None:
        """The sequence's caches are gone, or about to change: what was not ordered yet is not to be. With `snapshot`, only the
        one after that block."""
        only = None if snapshot is None else snapshot_key(snapshot)
        gone = {item for item in self._queue if item[0] == seq_id and only in (None, item[2])}
        if gone:
            self._queue = deque(item for item in self._queue if item not in gone)
            self._queued.difference_update(key for _, _, key in gone)

    @property
    def has_orders(self) -> bool:
        """Whether `take_stores` or `take_drops` would give something."""
        return bool(self._drops) or (
            bool(self._queue) and self._answering_blocks < min(WINDOW_BLOCKS, self.capacity_blocks)
        )

    def take_stores(self, most: int) -> tuple[Blocks, ...]:
        """The next blocks to write; what has to go for them is among the next drops."""
        orders: list[Blocks] = []
        while self._queue and len(orders) < most and self._answering_blocks < WINDOW_BLOCKS:
            seq_id, offset, key = self._queue[0]
            if not self._make_room(self._size(key)):
                break
            self._queue.popleft()
            self._queued.discard(key)
            self._answers[key] = set()
            self._answering_blocks += self._size(key)
            keys, snapshot = ((), key) if is_snapshot(key) else ((key,), None)
            orders.append(
                Blocks(seq_id=seq_id, offset=offset, block_tokens=self.block_tokens, keys=keys, snapshot=snapshot)
            )
        return tuple(orders)

    def take_drops(self) -> tuple[str, ...]:
        """Blocks to delete."""
        drops, self._drops = tuple(self._drops), []
        return drops

    def on_disk_blocks(self, event: DiskBlocks) -> None:
        """One stage wrote, refused or lost blocks."""
        for key in event.gone:
            if key in self._complete:
                self._delete(key)  # the others may still have it
            elif key in self._answers:
                self._refused.add(key)
        self._answered([key for key in (*event.added, *event.gone) if key in self._answers], event.stage)

    def _answered(self, keys: Iterable[str], stage: int) -> None:
        for key in keys:
            self._answers[key].add(stage)
            if len(self._answers[key]) < self._stages:
                continue
            del self._answers[key]
            self._answering_blocks -= self._size(key)
            if key in self._refused:
                self._refused.discard(key)
                self._drops.append(key)
            else:
                self._complete[key] = None
                self._complete_blocks += self._size(key)

    def _make_room(self, blocks: int) -> bool:
        room = self.capacity_blocks - self._answering_blocks - blocks
        while self._complete and 0 <= room < self._complete_blocks:
            self._delete(next(iter(self._complete)))
        return room >= 0

    def _delete(self, key: str) -> None:
        del self._complete[key]
        self._complete_blocks -= self._size(key)
        self._drops.append(key)

    def _size(self, key: str) -> int:
        return self._snapshot_blocks if is_snapshot(key) else 1
