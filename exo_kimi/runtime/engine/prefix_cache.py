"""Prefix-cache policy: which cached prefix each sequence reuses, in memory and on disk.

Caches of sequences that ended stay on the stages, within the KV memory's account, until that memory is wanted. The next turn of
the same conversation takes them over as they are; who shares only a beginning gets a copy of it, also from a sequence that
still runs. What neither offers may lie on the disks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from exo_kimi.runtime.engine.admission import KvLedger
from exo_kimi.runtime.engine.prefix_index import (
    CachedPrefix,
    DiskBlockIndex,
    PrefixIndex,
    Tokens,
    common_tokens,
)
from exo_kimi.runtime.engine.sequence import DiskRestore, PrefixSource, Sequence
from exo_kimi.runtime.pipeline import DiskBlocks, Ready
from exo_kimi.runtime.prefix_key import block_keys
from exo_kimi.runtime.steps import Blocks

RESTORE_BLOCKS = 8  # read within one step, so that what decodes beside waits for no more
STORE_BLOCKS, IDLE_STORE_BLOCKS = 2, 8  # copied within one step that has other work, or none
FEW_BLOCKS = 16  # a prefix shorter than a sixteenth of a block is not worth a decision


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """What the prefix cache may take.

    Args:
        memory_bytes: KV memory of each stage that prefixes may take while nobody uses them; None: all that is left.
    """

    memory_bytes: int | None = None


@dataclass(slots=True, kw_only=True)
class PrefixCounts:
    """Totals since the start: prompt tokens that were not computed, and cached prefixes that gave way to something else."""

    cached_tokens: int = 0
    evictions: int = 0


class PrefixCache:
    """The prefixes that the stages hold in one epoch.

    Args:
        options: None keeps nothing.
        ledger: the stages' KV memory.
        frees: takes the names of caches to drop.
        ready: tells of the stages' disks, and of the bytes of a token.
        counts: totals of all epochs.
        held_back: tokens at the end of what is shared that are computed again all the same. A draft head reads the feature of the
            position before the first new token, which no cache keeps.
    """

    def __init__(
        self,
        options: PrefixOptions | None,
        ledger: KvLedger,
        frees: list[int],
        ready: Ready,
        counts: PrefixCounts,
        *,
        held_back: int = 0,
    ) -> None:
        self.options = options
        self._held_back = held_back
        self.counts = counts
        self.index = PrefixIndex()
        self._ledger = ledger
        self._frees = frees
        info = ready.info
        self._whole_only = info.whole_prefixes
        budget_bytes = options.memory_bytes if options is not None else 0
        per_token = info.kv_bytes_per_token
        self._budget_tokens = budget_bytes // per_token if budget_bytes is not None and per_token else budget_bytes
        if options is not None and info.disk_blocks:
            self.blocks = DiskBlockIndex(
                block_tokens=info.cache_step, capacity_blocks=info.disk_blocks, stages=ready.blocks
            )
        else:
            self.blocks = DiskBlockIndex(block_tokens=ledger.limits.cache_step)

    @property
    def kept_tokens(self) -> int:
        """KV memory, in tokens, that caches of ended sequences take."""
        return sum(self._ledger.held(kept.seq_id) for kept in self.index)

    def on_disk_blocks(self, event: DiskBlocks) -> None:
        """A stage's disk changed."""
        self.blocks.on_disk_blocks(event)

    def release(self, sequence: Sequence) -> None:
        """A sequence ends, or gives way: its caches stay, or are dropped with its hold on KV memory."""
        whole = sequence.registered and sequence.restoring is None and sequence.num_computed_tokens > 0
        whole = whole and not sequence.damaged
        if self.options is None or self._budget_tokens == 0 or not whole or not sequence.request.use_prefix_cache:
            self.blocks.cancel_stores(sequence.seq_id)
            self._ledger.release(sequence.seq_id)
            if sequence.registered:
                self._frees.append(sequence.seq_id)
            elif sequence.source is not None and sequence.source.move:
                self._frees.append(sequence.source.seq_id)
            return
        # A sequence may end within an answer: the caches hold all of it but its newest token.
        known = (
            len(sequence.tokens) - 1
            if sequence.decoding and not sequence.awaiting_token
            else sequence.num_computed_tokens
        )
        sequence.num_computed_tokens = known
        kept = CachedPrefix(sequence.seq_id, sequence.prefix_ids(known))
        covered = self.index.add(kept)
        if kept not in covered:
            self._request_stores(sequence)
        for other in covered:
            self._drop(other)
        while self._budget_tokens is not None and self.kept_tokens > self._budget_tokens:
            self.evict_one()

    def drop_damaged(self, seq_ids: Container[int]) -> None:
        """Some stage's caches of these are shorter than others': nobody may begin from them."""
        for kept in [each for each in self.index if each.seq_id in seq_ids]:
            self.index.remove(kept)
            self._drop(kept)

    def evict_one(self) -> bool:
        """Give back the memory of the caches that were not used for longest; False when there are none."""
        if not len(self.index):
            return False
        self._evict(next(iter(self.index)))
        return True

    def make_room(self, sequence: Sequence, needed: int) -> bool:
        """Whether `needed` more tokens fit, after what nobody uses was dropped as far as it must be.

        A conversation that goes on takes its own caches over, so its need is less by what they hold.
        """
        if needed > self._ledger.free_tokens + self.kept_tokens:
            return False
        source = self._best(sequence.prefix_ids(-1)) if sequence.request.use_prefix_cache else None
        whole = source is not None and len(source[0].tokens) - source[1] < self._block_tokens
        sequence.takes_over = source if whole else None  # when next to nothing of them would be lost
        while needed - self._held(sequence.takes_over) > self._ledger.free_tokens:
            victim = next((kept for kept in self.index if source is None or kept is not source[0]), None)
            if victim is not None:
                self._evict(victim)
            else:
                sequence.takes_over = source  # too little memory for a copy: it takes all there is
        return True

    def take_over(self, sequence: Sequence) -> None:
        """A sequence that got its name takes over the caches that it continues, or will read them from disk."""
        if sequence.takes_over is not None:
            kept, count = sequence.takes_over
            self.blocks.cancel_stores(kept.seq_id)
            self.index.remove(kept)
            self._ledger.transfer(kept.seq_id, sequence.seq_id)
            sequence.begin_from(PrefixSource(seq_id=kept.seq_id, tokens=count, move=True))
        sequence.takes_over = None

    def choose_start(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Decide where a sequence begins, when its first chunk is due; False while it waits for an older one that is just
        computing what it needs, or for the disk."""
        if sequence.restoring is not None:
            return False
        if not (self.options and sequence.request.use_prefix_cache):
            return True
        if sequence.registered or (sequence.source is not None and sequence.source.move):
            return True
        sequence.begin_from(None)  # what was chosen before may be gone
        tokens = sequence.prefix_ids(-1)
        best = self._best(tokens)
        source = PrefixSource(seq_id=best[0].seq_id, tokens=best[1]) if best is not None else None
        to_come = 0
        for other in running:
            if other is sequence or not (other.registered or other.order < sequence.order):
                continue
            if self._whole_only:
                break  # what runs is past what they share, or about to be
            shared = common_tokens(tokens, other.prompt_ids)
            held = other.registered and other.restoring is None
            there = min(shared, other.num_computed_tokens) - self._held_back if held else 0
            if there > (source.tokens if source is not None else 0):
                source = PrefixSource(seq_id=other.seq_id, tokens=there)
            if not other.decoding:
                to_come = max(to_come, shared)
        count = source.tokens if source is not None else 0
        if to_come >= count + self._block_tokens or self._plan_restore(sequence, count):
            return False
        if source is not None and self._worthwhile(count):
            if best is not None and best[0].seq_id == source.seq_id:
                self.index.touch(best[0])
            sequence.begin_from(source)
        return True

    def on_prompt_sent(self, sequence: Sequence) -> None:
        """All that was known of a sequence has been sent."""
        if sequence.request.use_prefix_cache:
            self._request_stores(sequence)

    def count_hit(self, sequence: Sequence) -> None:
        """A sequence is about to be registered on the stages."""
        if sequence.restoring is None:
            self._hit(sequence, sequence.num_computed_tokens)

    @property
    def has_orders(self) -> bool:
        """Whether there is something for the disks to do now."""
        return self.blocks.has_orders

    def disk_orders(self, *, busy: bool) -> tuple[tuple[Blocks, ...], tuple[str, ...]]:
        """What to write and what to delete in the next step; little where sequences wait for it."""
        store = self.blocks.take_stores(STORE_BLOCKS if busy else IDLE_STORE_BLOCKS)
        return store, self.blocks.take_drops()

    def restore_orders(self, running: Iterable[Sequence]) -> dict[Sequence, Blocks]:
        """What to read from disk in the next step."""
        size = self._block_tokens
        orders = {}
        for sequence in running:
            work = sequence.restoring
            if work is not None and work.ordered < len(work.keys) and not work.failed:
                keys = work.keys[work.ordered : work.ordered + RESTORE_BLOCKS]
                offset = work.ordered * size
                orders[sequence] = Blocks(seq_id=sequence.seq_id, offset=offset, block_tokens=size, keys=keys)
                work.ordered += len(keys)
                work.due.append(work.ordered * size)
        return orders

    def on_restored(self, sequence: Sequence, tokens: int) -> None:
        """All stages hold so many tokens of a sequence after the oldest order that is due."""
        work = sequence.restoring
        if work is None or not work.due:
            return
        work.failed |= tokens < work.due.pop(0)
        if work.due or (work.ordered < len(work.keys) and not work.failed):
            return
        sequence.restoring = None
        sequence.num_computed_tokens = max(0, min(tokens - self._held_back, len(sequence.tokens) - 1))
        self._hit(sequence, sequence.num_computed_tokens)

    def _plan_restore(self, sequence: Sequence, count: int) -> bool:
        if not self.blocks.capacity_blocks:
            return False
        keys = block_keys(sequence.prefix_ids(-1), self._block_tokens)
        known = self.blocks.count_complete(keys)
        if known * self._block_tokens < count + self._block_tokens:
            return False
        self.blocks.touch(keys[:known])
        sequence.restoring = DiskRestore(keys=keys[:known])
        return True

    def _hit(self, sequence: Sequence, tokens: int) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(tokens, sequence.prompt_tokens)
            self.counts.cached_tokens += sequence.cached_tokens

    def _best(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        if self._whole_only and self._held_back:
            return None  # nothing is held back of what is not cut
        best = self.index.whole(tokens) if self._whole_only else self.index.best(tokens)
        if best is None or not self._worthwhile(best[1] - self._held_back):
            return None
        return best[0], best[1] - self._held_back

    def _held(self, takes: tuple[CachedPrefix, int] | None) -> int:
        return self._ledger.held(takes[0].seq_id) if takes is not None else 0

    def _worthwhile(self, count: int) -> bool:
        return count >= max(1, self._block_tokens // FEW_BLOCKS)

    def _request_stores(self, sequence: Sequence) -> None:
        if self.blocks.capacity_blocks:
            keys = block_keys(sequence.prefix_ids(sequence.num_computed_tokens), self._block_tokens)
            self.blocks.request_stores(sequence.seq_id, keys)

    def _evict(self, kept: CachedPrefix) -> None:
        self.counts.evictions += 1
        self.index.remove(kept)
        self._drop(kept)

    def _drop(self, kept: CachedPrefix) -> None:
        self.blocks.cancel_stores(kept.seq_id)
        self._ledger.release(kept.seq_id)
        self._frees.append(kept.seq_id)

    @property
    def _block_tokens(self) -> int:
        return self.blocks.block_tokens
