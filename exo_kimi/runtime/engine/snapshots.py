"""Snapshots of recurrent states: where a prompt takes them, and which sequence holds which.

A state cannot be cut at a token, so of a cached prefix only what lies before a snapshot is of use to who shares its beginning.
Snapshots are taken at ends of blocks, in a pass that ends there, and cost no copy: a few at ends of messages, where prompts
part, one every `SPACING_TOKENS`, and one where another prompt is seen to part from this one.

Source: "Marconi: Prefix Caching for the Era of Hybrid LLMs", arXiv 2411.19379, takes them where prompts are seen to part, too.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from exo_kimi.runtime.engine.prefix_index import Tokens

MOST_SNAPSHOTS = 8
"""Of one sequence: each takes as much as the cache of some 5,400 tokens of Kimi Linear."""
SPACING_TOKENS = 4096
FIRST_MESSAGES = 2
"""Tools and system prompt, which conversations share."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The states of a sequence on every stage after `position` of its tokens."""

    seq_id: int
    position: int


def positions_of(tokens: Tokens, message_ends: Collection[int], block_tokens: int) -> list[int]:
    """Where a prompt takes snapshots, ascending.

    Args:
        tokens: of the prompt.
        message_ends: ids that end a message.
        block_tokens: of a block: each position is the end of one, and before the last token.
    """
    ends = np.flatnonzero(np.isin(tokens, list(message_ends))) + 1
    chosen = {int(end) // block_tokens * block_tokens for end in (*ends[:FIRST_MESSAGES], *ends[-1:])}
    spacing = -(-SPACING_TOKENS // block_tokens) * block_tokens
    chosen |= set(range(spacing, len(tokens), spacing))
    return sorted(position for position in chosen if 0 < position < len(tokens))


def thinned(positions: Sequence[int], *, kept: Container[int] = ()) -> list[int]:
    """At most `MOST_SNAPSHOTS` of some positions: those go first that are the least way behind the one before, for so much is
    computed again without them.

    Args:
        positions: ascending.
        kept: of them, whatever else goes.
    """
    left = list(positions)
    while len(left) > MOST_SNAPSHOTS:
        losses = [end - start for start, end in zip([0, *left[:-1]], left, strict=True)]
        free = [index for index, position in enumerate(left) if position not in kept] or range(len(left))
        del left[min(free, key=losses.__getitem__)]
    return left


class SnapshotTable:
    """Which sequences hold snapshots, running ones and such that ended; by the key of the block that each follows, which binds
    all tokens before it."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, str]] = {}
        self._holders: dict[str, dict[int, int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def __iter__(self) -> Iterator[Snapshot]:
        return (Snapshot(seq_id, position) for seq_id, held in self._held.items() for position in held)

    def positions(self, seq_id: int) -> list[int]:
        """Of one sequence, ascending."""
        return sorted(self._held.get(seq_id, ()))

    def keys(self, seq_id: int) -> list[tuple[int, str]]:
        """Positions of one sequence and the keys of the blocks that they follow, ascending."""
        return sorted(self._held.get(seq_id, {}).items())

    def add(self, snapshot: Snapshot, key: str) -> None:
        """A sequence takes one, or shares it."""
        self._held.setdefault(snapshot.seq_id, {})[snapshot.position] = key
        self._holders.setdefault(key, {})[snapshot.seq_id] = snapshot.position

    def drop(self, snapshot: Snapshot) -> None:
        """A sequence lets go of one."""
        held = self._held[snapshot.seq_id]
        key = held.pop(snapshot.position)
        if not held:
            del self._held[snapshot.seq_id]
        holders = self._holders[key]
        del holders[snapshot.seq_id]
        if not holders:
            del self._holders[key]

    def drop_all(self, seq_id: int) -> None:
        """A sequence is gone."""
        for position in self.positions(seq_id):
            self.drop(Snapshot(seq_id, position))

    def best(self, keys: Sequence[str], *, among: Container[int] | None = None) -> Snapshot | None:
        """The one after the most of some blocks; the one that was taken first of equal ones.

        Args:
            keys: of a prompt's blocks.
            among: the sequences that count; None counts all.
        """
        for key in reversed(keys):
            for seq_id, position in self._holders.get(key, {}).items():
                if among is None or seq_id in among:
                    return Snapshot(seq_id, position)
        return None
