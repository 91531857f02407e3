"""Prefix-cache policy: which cached prefix each sequence reuses, in memory and on disk.

Caches of sequences that ended stay on the stages, within the KV memory's account, until that memory is wanted. The next turn of
the same conversation takes them over as they are; who shares only a beginning gets a copy of it, also from a sequence that
still runs. What neither offers may lie on the disks. Where layers have states, who shares a beginning begins at a snapshot in it,
see `snapshots`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from collections.abc import Sequence as Stages
from dataclasses import dataclass, replace

from exo_kimi.runtime.engine.admission import KvLedger
from exo_kimi.runtime.engine.kept_caches import KnownCaches, held_by_all
from exo_kimi.runtime.engine.prefix_index import (
    CachedPrefix,
    DiskBlockIndex,
    PrefixIndex,
    Tokens,
    common_tokens,
)
from exo_kimi.runtime.engine.sequence import DiskRestore, PrefixSource, Sequence
from exo_kimi.runtime.engine.snapshots import MOST_SNAPSHOTS, Snapshot, SnapshotTable, positions_of, thinned
from exo_kimi.runtime.pipeline import DiskBlocks, Ready
from exo_kimi.runtime.prefix_key import block_keys, snapshot_key
from exo_kimi.runtime.steps import Blocks, HeldCaches

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
    """Totals since the start.

    Args:
        cached_tokens: prompt tokens that were not computed.
        evictions: cached prefixes that gave way to something else.
        snapshots: of states, that were taken.
        lost_snapshots: of states, on disk, that some stage had lost.
        resumed_tokens: tokens of interrupted sequences that were not computed again.
    """

    cached_tokens: int = 0
    evictions: int = 0
    snapshots: int = 0
    lost_snapshots: int = 0
    resumed_tokens: int = 0


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
        self.snapshots = SnapshotTable()
        self._recurrent = info.recurrent
        # A draft head would need the feature of the token before a snapshot, which none keeps.
        self._snapshots_of_use = info.recurrent and options is not None and not held_back
        self._forgotten: list[Snapshot] = []
        budget_bytes = options.memory_bytes if options is not None else 0
        per_token = info.kv_bytes_per_token
        self._budget_tokens = budget_bytes // per_token if budget_bytes is not None and per_token else budget_bytes
        if options is not None and info.disk_blocks:
            self.blocks = DiskBlockIndex(
                block_tokens=info.cache_step,
                capacity_blocks=info.disk_blocks,
                snapshot_blocks=info.snapshot_blocks,
                stages=ready.blocks,
            )
        else:
            self.blocks = DiskBlockIndex(block_tokens=ledger.limits.cache_step)

    def known(self) -> Iterator[KnownCaches]:
        """What is cached of sequences that ended, the one that was not used for longest first."""
        for kept in self.index:
            yield KnownCaches(seq_id=kept.seq_id, tokens=kept.tokens, reserved_tokens=self._ledger.held(kept.seq_id))

    def adopt(self, known: Iterable[KnownCaches], stages: Stages[Stages[HeldCaches]]) -> int:
        """Offer the caches of the epoch before that every stage still holds, and have the others freed.

        Args:
            known: what the leader knew of them; what was used last comes last.
            stages: what each stage holds.

        Returns:
            How many tokens they hold.
        """
        unknown = {each.seq_id for held in stages for each in held}
        for each in held_by_all(known, stages) if self.options is not None else ():
            if not self._worthwhile(len(each.tokens) - self._held_back):
                continue
            unknown.discard(each.seq_id)
            self._ledger.take(each.seq_id, each.reserved_tokens)
            kept = CachedPrefix(each.seq_id, each.tokens)
            covered = self.index.add(kept)
            if kept not in covered:
                self._request_stores(kept)
            for other in covered:
                self._drop(other)
        while self._ledger.free_tokens < 0 and self.evict_one():
            pass  # less memory came back
        self._frees += sorted(unknown)
        return sum(len(kept.tokens) for kept in self.index)

    @property
    def kept_tokens(self) -> int:
        """KV memory, in tokens, that caches of ended sequences take."""
        return sum(map(self._held, self.index))

    def _held(self, kept: CachedPrefix) -> int:
        return self._ledger.held(kept.seq_id) + self._ledger.held_in_snapshots(kept.seq_id)

    def on_disk_blocks(self, event: DiskBlocks) -> None:
        """A stage's disk changed."""
        self.blocks.on_disk_blocks(event)

    def release(self, sequence: Sequence) -> None:
        """A sequence ends, or gives way: its caches stay, or are dropped with its hold on KV memory."""
        whole = sequence.registered and sequence.restoring is None and sequence.num_computed_tokens > 0
        whole = whole and not sequence.damaged
        if self.options is None or self._budget_tokens == 0 or not whole or not sequence.request.use_prefix_cache:
            self.blocks.cancel_stores(sequence.seq_id)
            self.snapshots.drop_all(sequence.seq_id)
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
            self._request_stores(kept)
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
        return self._evict_other(())

    def _evict_other(self, needed: Container[int]) -> bool:
        """The same, but for those of some names."""
        victim = next((kept for kept in self.index if kept.seq_id not in needed), None)
        if victim is not None:
            self._evict(victim)
        return victim is not None

    def forget_snapshot(self) -> bool:
        """Give back the memory of the oldest snapshot; False when there is none, or when they take none."""
        if not self._ledger.limits.snapshot_tokens:
            return False
        oldest = next(iter(self.snapshots), None)
        if oldest is not None:
            self._forget(oldest)
        return oldest is not None

    def _forget(self, snapshot: Snapshot) -> None:
        key = dict(self.snapshots.keys(snapshot.seq_id))[snapshot.position]
        self.blocks.cancel_stores(snapshot.seq_id, snapshot=key)
        self.snapshots.drop(snapshot)
        self._ledger.release_snapshot(snapshot.seq_id)
        self._forgotten.append(snapshot)

    def take_forgotten(self) -> tuple[tuple[int, int], ...]:
        """Snapshots that the stages are to let go of with the next step."""
        forgotten = tuple((snapshot.seq_id, snapshot.position) for snapshot in self._forgotten)
        self._forgotten.clear()
        return forgotten

    def make_room(self, sequence: Sequence, needed: int) -> bool:
        """Whether `needed` more tokens fit, after what nobody uses was dropped as far as it must be.

        A conversation that goes on takes its own caches over, so its need is less by what they hold.
        """
        in_snapshots = len(self.snapshots) * self._ledger.limits.snapshot_tokens
        if (
            needed
            > self._ledger.free_tokens + sum(self._ledger.held(kept.seq_id) for kept in self.index) + in_snapshots
        ):
            return False
        source = self._best(sequence.prefix_ids(-1)) if sequence.request.use_prefix_cache else None
        whole = source is not None and len(source[0].tokens) - source[1] < self._block_tokens
        sequence.takes_over = source if whole else None  # when next to nothing of them would be lost
        while needed - self._taken(sequence.takes_over) > self._ledger.free_tokens:
            if self._evict_other(() if source is None else {source[0].seq_id}):
                continue
            if sequence.takes_over is None and source is not None:
                sequence.takes_over = source  # too little memory for a copy: it takes all there is
            elif not self._forget_other(source):
                if source is None:
                    return False
                self._evict(source[0])  # its states alone are too much beside what comes
                source = sequence.takes_over = None
        return True

    def _taken(self, takes: tuple[CachedPrefix, int] | None) -> int:
        """KV memory, in tokens, that need not be found for a sequence that takes caches over."""
        return self._ledger.held(takes[0].seq_id) if takes is not None else 0

    def _forget_other(self, source: tuple[CachedPrefix, int] | None) -> bool:
        """Give back the memory of the oldest snapshot but for the one at which a sequence is to begin."""
        needed = None if source is None else Snapshot(source[0].seq_id, source[1])
        other = next((snapshot for snapshot in self.snapshots if snapshot != needed), None)
        if other is not None:
            self._forget(other)
        return other is not None

    def take_over(self, sequence: Sequence) -> None:
        """A sequence that got its name takes over the caches that it continues, or will read them from disk."""
        if sequence.takes_over is not None:
            kept, count = sequence.takes_over
            self.blocks.cancel_stores(kept.seq_id)
            self.index.remove(kept)
            self._ledger.transfer(kept.seq_id, sequence.seq_id)
            for position, key in self.snapshots.keys(kept.seq_id):
                self.snapshots.drop(Snapshot(kept.seq_id, position))
                if position <= count:
                    self.snapshots.add(Snapshot(sequence.seq_id, position), key)
                else:
                    self._ledger.release_snapshot(sequence.seq_id)
            sequence.begin_from(PrefixSource(seq_id=kept.seq_id, tokens=count, move=True))
        sequence.takes_over = None

    def choose_start(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Decide where a sequence begins, when its first chunk is due; False while it waits for an older one that is just
        computing what it needs, or for the disk."""
        if not self._may_begin(sequence, running):
            return False
        if self._snapshots_of_use and (sequence.snapshot_plan is None or not sequence.registered):
            self._plan_snapshots(sequence, running)
        return True

    def _may_begin(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        if sequence.restoring is not None:
            return False
        if not (self.options and sequence.request.use_prefix_cache):
            return True
        if sequence.registered or (sequence.source is not None and sequence.source.move):
            return True
        sequence.begin_from(None)  # what was chosen before may be gone
        tokens = sequence.prefix_ids(-1)
        if self._recurrent:
            return self._begin_at_snapshot(sequence, tokens, running)
        best = self._best(tokens)
        source = PrefixSource(seq_id=best[0].seq_id, tokens=best[1]) if best is not None else None
        to_come = 0
        for other in running:
            if other is sequence or not (other.registered or other.order < sequence.order):
                continue
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

    def _begin_at_snapshot(self, sequence: Sequence, tokens: Tokens, running: Iterable[Sequence]) -> bool:
        """The same where layers have states: it begins as all of another, at a snapshot, or from nothing."""
        if not self._snapshots_of_use:
            return True
        size = self._block_tokens
        best = self.index.whole(tokens)
        source = PrefixSource(seq_id=best[0].seq_id, tokens=best[1]) if best is not None else None
        snapshot = self.snapshots.best(block_keys(tokens, size))
        if snapshot is not None and (source is None or snapshot.position > source.tokens):
            source = PrefixSource(seq_id=snapshot.seq_id, tokens=snapshot.position)
        count = source.tokens if source is not None else 0
        to_come = 0
        for other, shared in self._sharing(sequence, tokens, running):
            if shared > max(count, other.num_computed_tokens) and not other.decoding:
                other.parts_at.add(shared)
                if other.snapshot_plan is not None:
                    other.snapshot_plan.add(shared)
                to_come = max(to_come, shared)
        if to_come >= count + size or self._plan_restore(sequence, count):
            return False
        if source is not None and self._worthwhile(count):
            for kept in self.index:
                if kept.seq_id == source.seq_id:
                    self.index.touch(kept)
            sequence.begin_from(source)
        return True

    def _sharing(
        self, sequence: Sequence, tokens: Tokens, running: Iterable[Sequence]
    ) -> Iterator[tuple[Sequence, int]]:
        """Older sequences that run, and up to which end of a block they are the same as one that is to begin."""
        for other in running:
            if other is not sequence and (other.registered or other.order < sequence.order):
                yield other, common_tokens(tokens, other.prompt_ids) // self._block_tokens * self._block_tokens

    def _plan_snapshots(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Decide where a sequence's states are kept as its prompt is computed."""
        begins, tokens = sequence.num_computed_tokens, sequence.prefix_ids(-1)
        known = self.index.best(tokens) if len(self.index) else None
        parting = [shared for _, shared in self._sharing(sequence, tokens, running)]
        if known is not None:
            parting.append(known[1] // self._block_tokens * self._block_tokens)
        ends = positions_of(tokens, sequence.request.stop_ids, self._block_tokens)
        kept = {*sequence.parts_at, max(parting, default=0), *ends[-1:]}
        held = self.snapshots.positions(sequence.seq_id)
        positions = sorted({*ends, *kept, *held})
        chosen = thinned([each for each in positions if 0 < each < len(sequence.tokens)], kept=kept)
        sequence.snapshot_plan = {position for position in chosen if position > begins}

    def keep_states(self, sequence: Sequence, length: int, beginning: Iterable[Sequence]) -> bool:
        """Whether the stages keep their states after the next `length` tokens of a sequence: where that is planned, and there is
        memory. What was not used for longest gives way, but not what others begin from in the same step."""
        end = sequence.num_computed_tokens + length
        if not sequence.snapshot_plan or end not in sequence.snapshot_plan:
            return False
        held = self.snapshots.positions(sequence.seq_id)
        if len(held) >= MOST_SNAPSHOTS:
            left = thinned([*held, end], kept={end})
            for position in held:
                if position not in left:
                    self._forget(Snapshot(sequence.seq_id, position))
        needed = {other.source.seq_id for other in beginning if other.source is not None}
        while not self._ledger.reserve_snapshot(sequence.seq_id):
            if not self._evict_other(needed):
                return False
        key = block_keys(sequence.prefix_ids(end), self._block_tokens)[-1]
        self.snapshots.add(Snapshot(sequence.seq_id, end), key)
        self.counts.snapshots += 1
        return True

    def on_prompt_sent(self, sequence: Sequence) -> None:
        """All that was known of a sequence has been sent."""
        if sequence.request.use_prefix_cache:
            sent = sequence.prefix_ids(sequence.num_computed_tokens)
            self._request_stores(CachedPrefix(sequence.seq_id, sent))

    def on_begin(self, sequence: Sequence) -> None:
        """A sequence is about to be registered on the stages: it holds the snapshot where it begins, too."""
        if sequence.restoring is None:
            self._hit(sequence, sequence.num_computed_tokens)
        source = sequence.source
        if source is None or not self._recurrent:
            return
        held = self.snapshots.keys(source.seq_id)
        if not source.move:
            held = [(position, key) for position, key in held if position == source.tokens]
            held = [each for each in held if self._ledger.reserve_snapshot(sequence.seq_id)]
            for position, key in held:
                self.snapshots.add(Snapshot(sequence.seq_id, position), key)
        else:
            held = self.snapshots.keys(sequence.seq_id)
        sequence.source = replace(source, snapshots=tuple(position for position, _ in held))

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
                work.ordered += len(keys)
                snapshot = work.snapshot if work.ordered == len(work.keys) else None
                orders[sequence] = Blocks(
                    seq_id=sequence.seq_id, offset=offset, block_tokens=size, keys=keys, snapshot=snapshot
                )
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
        if self._recurrent:
            if work.failed:
                self.counts.lost_snapshots += 1
                if self._plan_restore(sequence, 0, before=tokens):
                    return
                tokens = 0
            elif self._ledger.reserve_snapshot(sequence.seq_id):
                self.snapshots.add(Snapshot(sequence.seq_id, tokens), work.keys[-1])
        sequence.num_computed_tokens = max(0, min(tokens - self._held_back, len(sequence.tokens) - 1))
        self._hit(sequence, sequence.num_computed_tokens)

    def _plan_restore(self, sequence: Sequence, count: int, *, before: int | None = None) -> bool:
        """Whether a sequence begins with more than `count` tokens from disk; with `before`, as many as these at most."""
        if not self.blocks.capacity_blocks:
            return False
        keys = block_keys(sequence.prefix_ids(-1), self._block_tokens)
        if before is not None:
            keys = keys[: before // self._block_tokens]
        known = self.blocks.count_to_snapshot(keys) if self._recurrent else self.blocks.count_complete(keys)
        if known * self._block_tokens < count + self._block_tokens:
            return False
        snapshot = snapshot_key(keys[known - 1]) if self._recurrent else None
        self.blocks.touch([*keys[:known], *([snapshot] if snapshot is not None else [])])
        sequence.restoring = DiskRestore(keys=keys[:known], snapshot=snapshot)
        return True

    def _hit(self, sequence: Sequence, tokens: int) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(tokens, sequence.prompt_tokens)
            self.counts.cached_tokens += sequence.cached_tokens
        if sequence.interruption is not None:
            self.counts.resumed_tokens += tokens

    def _best(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        best = self._best_states(tokens) if self._recurrent else self.index.best(tokens)
        if best is None or not self._worthwhile(best[1] - self._held_back):
            return None
        return best[0], best[1] - self._held_back

    def _best_states(self, tokens: Tokens) -> tuple[CachedPrefix, int] | None:
        """Of what ended sequences left, with which it would begin with most tokens, and how many."""
        if not self._snapshots_of_use:
            return None
        best = self.index.whole(tokens)
        kept = {each.seq_id: each for each in self.index}
        snapshot = self.snapshots.best(block_keys(tokens, self._block_tokens), among=kept)
        if snapshot is not None and (best is None or snapshot.position > best[1]):
            return kept[snapshot.seq_id], snapshot.position
        return best

    def _worthwhile(self, count: int) -> bool:
        return count >= max(1, self._block_tokens // FEW_BLOCKS)

    def _request_stores(self, kept: CachedPrefix) -> None:
        if not self.blocks.capacity_blocks:
            return
        snapshots = self.snapshots.keys(kept.seq_id)
        tokens = kept.tokens
        if self._recurrent:  # what lies after the last snapshot would never be read
            tokens = tokens[: max((position for position, _ in snapshots), default=0)]
        self.blocks.request_stores(kept.seq_id, block_keys(tokens, self._block_tokens), snapshots)

    def _evict(self, kept: CachedPrefix) -> None:
        self.counts.evictions += 1
        self.index.remove(kept)
        self._drop(kept)

    def _drop(self, kept: CachedPrefix) -> None:
        self.blocks.cancel_stores(kept.seq_id)
        self.snapshots.drop_all(kept.seq_id)
        self._ledger.release(kept.seq_id)
        self._frees.append(kept.seq_id)

    @property
    def _block_tokens(self) -> int:
        return self.blocks.block_tokens
