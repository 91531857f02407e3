"""Who begins from whose caches: the leader's decisions about prefixes, in memory and on disk; every stage obeys.

Caches of sequences that ended stay on the stages, within the KV memory's account, until that memory is wanted. The next turn of
the same conversation takes them over as they are; who shares only a beginning gets a copy of it, also from a sequence that
still runs. What neither offers may lie on the disks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from exo_kimi.runtime.engine.admission import KvLedger
from exo_kimi.runtime.engine.prefix_blocks import DiskBlockIndex
from exo_kimi.runtime.engine.prefix_index import CachedPrefix, PrefixIndex, Tokens, as_tokens, common_tokens
from exo_kimi.runtime.engine.sequence import DiskRestore, PrefixSource, Sequence
from exo_kimi.runtime.pipeline import DiskBlocks, Ready
from exo_kimi.runtime.prefix_key import block_keys
from exo_kimi.runtime.steps import Blocks

RESTORE_BLOCKS = 8  # read within one step, so that what decodes beside waits for no more
STORE_BLOCKS, IDLE_STORE_BLOCKS = 2, 8  # copied within one step that has other work, or none
FEW_BLOCKS = 16  # a prefix shorter than a sixteenth of a block is not worth a decision


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """Args:
    memory_bytes: KV memory of each stage that prefixes may take while nobody uses them; None: all that is left.
    """

    memory_bytes: int | None = None


class PrefixCache:
    """The prefixes of one scheduler.

    Args:
        options: None keeps nothing.
    """

    def __init__(self, options: PrefixOptions | None) -> None:
        self.options = options
        self.hit_tokens = 0
        self.evictions = 0
        self.blocks = DiskBlockIndex()
        self._index = PrefixIndex()
        self._ledger: KvLedger | None = None
        self._frees: list[int] = []
        self._budget_tokens: int | None = 0

    @property
    def kept_tokens(self) -> int:
        """KV memory that kept caches take."""
        assert self._ledger is not None or not len(self._index)
        return sum(self._ledger.held(kept.seq_id) for kept in self._index) if self._ledger is not None else 0

    def open(self, ledger: KvLedger, frees: list[int], ready: Ready | None) -> None:
        """The stages are empty, but for their disks.

        Args:
            ledger: of their KV memory.
            frees: takes the names of caches to drop.
            ready: None: nothing is known of disks or bytes.
        """
        self._ledger, self._frees, self._index = ledger, frees, PrefixIndex()
        info = ready.info if ready is not None else None
        budget_bytes = self.options.memory_bytes if self.options is not None else 0
        per_token = info.kv_bytes_per_token if info is not None else 0
        self._budget_tokens = budget_bytes // per_token if budget_bytes is not None and per_token else budget_bytes
        self.blocks = DiskBlockIndex(block_tokens=ledger.limits.cache_step)
        if info is not None and ready is not None and self.options is not None and info.disk_blocks:
            self.blocks = DiskBlockIndex(
                block_tokens=info.cache_step, capacity_blocks=info.disk_blocks, stages=ready.blocks
            )

    def close(self) -> None:
        """The stages lost everything."""
        self._ledger, self._index = None, PrefixIndex()
        self.blocks = DiskBlockIndex()

    def on_disk(self, event: DiskBlocks) -> None:
        """A stage's disk changed."""
        self.blocks.hear(event)

    def leave(self, sequence: Sequence) -> None:
        """A sequence ends, or gives way: its caches stay, or are dropped with its hold on KV memory."""
        assert self._ledger is not None
        whole = sequence.begun and sequence.restoring is None and sequence.sent > 0
        if self.options is None or self._budget_tokens == 0 or not whole:
            self.blocks.forget(sequence.seq_id)
            self._ledger.release(sequence.seq_id)
            if sequence.begun:
                self._frees.append(sequence.seq_id)
            elif sequence.source is not None and sequence.source.move:
                self._frees.append(sequence.source.seq_id)
            return
        # A sequence may end within an answer: the caches hold all of it but its newest token.
        known = len(sequence.tokens) - 1 if sequence.decoding and not sequence.sampling else sequence.sent
        sequence.sent = known
        kept = CachedPrefix(sequence.seq_id, as_tokens(sequence.tokens[:known]))
        covered = self._index.add(kept)
        if kept not in covered:
            self._want(sequence)
        for other in covered:
            self._drop(other)
        while self._budget_tokens is not None and self.kept_tokens > self._budget_tokens:
            self.evict_one()

    def evict_one(self) -> bool:
        """Give back the memory of the caches that were not used for longest; False when there are none."""
        if not len(self._index):
            return False
        self._evict(next(iter(self._index)))
        return True

    def make_room(self, sequence: Sequence, needed: int) -> bool:
        """Whether `needed` more tokens fit, after what nobody uses was dropped as far as it must be.

        A conversation that goes on takes its own caches over, so its need is less by what they hold.
        """
        assert self._ledger is not None
        if needed > self._ledger.free_tokens + self.kept_tokens:
            return False
        source = self._best(as_tokens(sequence.tokens[:-1]))
        whole = source is not None and len(source[0].tokens) - source[1] < self._block_tokens
        sequence.takes = source if whole else None  # when next to nothing of them would be lost
        while needed - self._held(sequence.takes) > self._ledger.free_tokens:
            victim = next((kept for kept in self._index if source is None or kept is not source[0]), None)
            if victim is not None:
                self._evict(victim)
            else:
                sequence.takes = source  # too little memory for a copy: it takes all there is
        return True

    def enter(self, sequence: Sequence) -> None:
        """A sequence that got its name takes over the caches that it continues, or will read them from disk."""
        assert self._ledger is not None
        if sequence.takes is not None:
            kept, count = sequence.takes
            self.blocks.forget(kept.seq_id)
            self._index.remove(kept)
            self._ledger.transfer(kept.seq_id, sequence.seq_id)
            sequence.begin_from(PrefixSource(seq_id=kept.seq_id, tokens=count, move=True))
        sequence.takes = None

    def chosen(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Decide where a sequence begins, when its first chunk is due; False while it waits for an older one that is just
        computing what it needs, or for the disk."""
        if sequence.restoring is not None:
            return False
        if not self.options or sequence.begun or (sequence.source is not None and sequence.source.move):
            return True
        sequence.begin_from(None)  # what was chosen before may be gone
        tokens = as_tokens(sequence.tokens[:-1])
        best = self._best(tokens)
        source = PrefixSource(seq_id=best[0].seq_id, tokens=best[1]) if best is not None else None
        to_come = 0
        for other in running:
            if other is sequence or not (other.begun or other.order < sequence.order):
                continue
            shared = common_tokens(tokens, other.prompt_ids)
            there = min(shared, other.sent) if other.begun and other.restoring is None else 0
            if there > (source.tokens if source is not None else 0):
                source = PrefixSource(seq_id=other.seq_id, tokens=there)
            if not other.decoding:
                to_come = max(to_come, shared)
        count = source.tokens if source is not None else 0
        if to_come >= count + self._block_tokens or self._plan_restore(sequence, count):
            return False
        if source is not None and self._worthwhile(count):
            if best is not None and best[0].seq_id == source.seq_id:
                self._index.touch(best[0])
            sequence.begin_from(source)
        return True

    def filled(self, sequence: Sequence) -> None:
        """All that was known of a sequence has been sent."""
        self._want(sequence)

    def began(self, sequence: Sequence) -> None:
        """A sequence is about to be registered on the stages."""
        if sequence.restoring is None:
            self._hit(sequence, sequence.sent)

    @property
    def has_orders(self) -> bool:
        """Whether there is something for the disks to do now."""
        return self.blocks.has_orders

    def disk_orders(self, *, busy: bool) -> tuple[tuple[Blocks, ...], tuple[str, ...]]:
        """What to write and what to delete in the next step; little where sequences wait for it."""
        store = self.blocks.take_stores(STORE_BLOCKS if busy else IDLE_STORE_BLOCKS)
        return store, self.blocks.take_drops()

    def restores(self, running: Iterable[Sequence]) -> dict[Sequence, Blocks]:
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

    def restored(self, sequence: Sequence, tokens: int) -> None:
        """All stages hold so many tokens of a sequence after the oldest order that is due."""
        work = sequence.restoring
        if work is None or not work.due:
            return
        work.failed |= tokens < work.due.pop(0)
        if work.due or (work.ordered < len(work.keys) and not work.failed):
            return
        sequence.restoring = None
        sequence.sent = min(tokens, len(sequence.tokens) - 1)
        self._hit(sequence, sequence.sent)

    def _plan_restore(self, sequence: Sequence, count: int) -> bool:
        if not self.blocks.capacity_blocks:
            return False
        keys = block_keys(sequence.tokens[:-1], self._block_tokens)
        known = self.blocks.known(keys)
        if known * self._block_tokens < count + self._block_tokens:
            return False
        self.blocks.touch(keys[:known])
        sequence.restoring = DiskRestore(keys=keys[:known])
        return True

    def _hit(self, sequence: Sequence, tokens: int) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(tokens, sequence.prompt_tokens)
            self.hit_tokens += sequence.cached_tokens

    def _best(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        best = self._index.best(tokens)
        return best if best is not None and self._worthwhile(best[1]) else None

    def _held(self, takes: tuple[CachedPrefix, int] | None) -> int:
        return self._ledger.held(takes[0].seq_id) if takes is not None and self._ledger is not None else 0

    def _worthwhile(self, count: int) -> bool:
        return count >= max(1, self._block_tokens // FEW_BLOCKS)

    def _want(self, sequence: Sequence) -> None:
        if self.blocks.capacity_blocks:
            keys = block_keys(sequence.tokens[: sequence.sent], self._block_tokens)
            self.blocks.want(sequence.seq_id, keys)

    def _evict(self, kept: CachedPrefix) -> None:
        self.evictions += 1
        self._index.remove(kept)
        self._drop(kept)

    def _drop(self, kept: CachedPrefix) -> None:
        assert self._ledger is not None
        self.blocks.forget(kept.seq_id)
        self._ledger.release(kept.seq_id)
        self._frees.append(kept.seq_id)

    @property
    def _block_tokens(self) -> int:
        return self.blocks.block_tokens
