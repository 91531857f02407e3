"""The routed experts of one layer in slots: its parameters have a row for each slot, and what a pass asks for is read into them.

A pass reads its choices back from MLX, which a layer that holds all its experts never does. Experts that are there compute while
the others are read. No slot is written while a graph may still read it: whatever the layer returned last is evaluated first, and
within a pass every round that used the slot.

Axes: N tokens, K experts of each, P = N * K pairs of both; S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from exo_kimi.experts.asked import FEW_PAIRS, asked
from exo_kimi.experts.layer_cache import HitCounters, LayerCache, Round
from exo_kimi.experts.layout import LayerLayout
from exo_kimi.experts.prefetch import Prefetcher
from exo_kimi.experts.store import ExpertStore, PendingRead, SlotOrder, SlotViews

KEPT_BYTES = 1024**2
"""What a layer returned is kept until the next one runs up to this size; more is evaluated at once."""

READS_AHEAD = 2
"""Rounds that may be read while another computes."""

PARTS = 8
"""Of the pairs of a pass, at least. Two parts are under way at a time: their arrays take less than all that is returned."""

Ids = NDArray[np.int64]


class LastOutput:
    """What the bank that ran last returned. Every bank evaluates it before it writes into any slot, so that of all that was ever
    returned, nothing else can still be waiting to read one."""

    __slots__ = ("_array",)

    def __init__(self) -> None:
        self._array: mx.array | None = None

    def settle(self) -> None:
        """Evaluate it, and let go of it."""
        if self._array is not None:
            mx.eval(self._array)
            self._array = None

    def keep(self, y: mx.array) -> mx.array:
        """Take note of an output; a large one is evaluated at once and not held."""
        if y.nbytes > KEPT_BYTES:
            mx.eval(y)
        else:
            self._array = y
        return y


class Experts(Protocol):
    """What computes experts whose rows are slots."""

    @property
    def x(self) -> mx.array:
        """(N, D): the layer's tokens, which its router chose for."""
        ...

    def whole(self, slots: mx.array) -> mx.array:
        """All pairs at once: (..., K, D) of slots in the shape of the choices."""
        ...

    def some(self, pairs: Ids, slots: Ids, count: int) -> mx.array:
        """(p, D) of some of the `count` pairs, by number, and the slots that their experts lie in, which ascend."""
        ...


class _RowsInParts:
    """(P, D) rows that rounds compute, in parts. Of many rows, two parts are under way at a time, and each is copied into one
    array once it is there: parts that are put together at the end are in memory three times.

    Args:
        count: of all rows, P.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[tuple[int, Ids, mx.array]] = []
        self._memory: list[_RowMemory] = []

    def begin(self, number: int, rows: Ids, part: mx.array) -> None:
        """Have a part of a round computed.

        Args:
            number: of the round.
            rows: (p,) which rows they are.
            part: (p, D) of them, not evaluated.
        """
        if not self._memory and self._count * part.itemsize * part.shape[-1] > KEPT_BYTES:
            self._memory.append(_RowMemory(self._count, part))
        if self._memory:
            self._settle(len(self._parts) - 1)
            part = part.view(mx.uint8)
        self._parts.append((number, rows, part))
        mx.async_eval(part)  # type: ignore[no-untyped-call]

    def wait(self, rounds: int) -> None:
        """Until so many of the first rounds are computed."""
        self._settle(sum(number < rounds for number, _, _ in self._parts))

    def whole(self) -> mx.array:
        """All rows; not evaluated where they are few."""
        if self._memory:
            self._settle(len(self._parts))
            return self._memory[0].array()
        order = np.argsort(np.concatenate([rows for _, rows, _ in self._parts]))
        return mx.concatenate([part for _, _, part in self._parts])[mx.array(order.astype(np.uint32))]

    def _settle(self, count: int) -> None:
        """Until so many parts, from the first, are computed."""
        mx.eval([part for _, _, part in self._parts[: max(0, count)]])
        while self._memory and count > 0:
            _, rows, part = self._parts.pop(0)
            self._memory[0].write(rows, part)
            count -= 1


class _RowMemory:
    """An array of rows that are written by the processor; nobody reads it before it is whole.

    Args:
        count: of the rows.
        like: some of them, of their width and dtype.
    """

    def __init__(self, count: int, like: mx.array) -> None:
        self._dtype = like.dtype
        self._raw = mx.zeros((count, like.shape[-1] * like.itemsize), mx.uint8)
        mx.eval(self._raw)
        self._bytes = np.asarray(memoryview(self._raw))  # type: ignore[arg-type]  # it has the buffer protocol

    def write(self, rows: Ids, part: mx.array) -> None:
        """(p,) rows from the bytes of (p, D), which are evaluated."""
        self._bytes[rows] = np.asarray(memoryview(part))  # type: ignore[arg-type]

    def array(self) -> mx.array:
        """(P, D): the same memory."""
        return self._raw.view(self._dtype)


@dataclass(frozen=True, slots=True)
class NextLayer:
    """What a layer knows of the next one, to have experts read ahead for it.

    Args:
        bank: its slots.
        guess: (N, C) experts that it may choose, the most probable first, of what this layer's router chose for, (N, D).
    """

    bank: ExpertBank
    guess: Callable[[mx.array], mx.array]


class ExpertBank:
    """Slots of one layer, their memory and the files behind them.

    Args:
        layout: where the layer's experts lie.
        cache: which of them have a slot.
        store: reads them.
        views: writable bytes of each slot; the layer's parameters are the same memory.
        last: shared by all banks of a model.
        prefetcher: of the stage; None reads nothing ahead.

    Attributes:
        next_layer: None where the next layer is another stage's, or holds all its experts.
    """

    def __init__(
        self,
        layout: LayerLayout,
        cache: LayerCache,
        store: ExpertStore,
        views: Sequence[SlotViews],
        last: LastOutput,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self.layout = layout
        self.cache = cache
        self.store = store
        self._views = views
        self._last = last
        self._prefetcher = prefetcher
        self.next_layer: NextLayer | None = None

    def run(self, indices: mx.array, experts: Experts, beside: Sequence[mx.array] = ()) -> mx.array:
        """What `experts` makes of every pair once its expert is in a slot; each expert is read at most once.

        Args:
            indices: the choices, in any shape, P in all.
            experts: of the layer.
            beside: what the layer computes whatever the choices are: begun, and not waited for.

        Returns:
            What `experts.whole` returns, or (P, D) where not all experts were there.

        Raises:
            ExpertReadError: a read failed; the slots are in order for the next pass.
        """
        guess = self._guess(experts, indices.size)
        mx.async_eval(indices, *([] if guess is None else [guess]))  # type: ignore[no-untyped-call]
        if beside:
            mx.async_eval(*beside)  # type: ignore[no-untyped-call]
        self._last.settle()
        chosen = np.array(indices).reshape(-1)
        wanted = asked(chosen)
        rounds = self.cache.request(wanted)
        if self._prefetcher is not None:
            self._prefetcher.settle(self.layout.layer, frozenset(wanted))
            if len(rounds) == 1:
                self._prefetcher.asked(len(rounds[0].read))
        if len(rounds) == 1 and not rounds[0].read:
            self._read_ahead(guess)
            place = dict(rounds[0].held)
            slots = mx.array([place[expert] for expert in chosen.tolist()], mx.uint32)
            return self._last.keep(experts.whole(slots.reshape(indices.shape)))
        reads: dict[int, PendingRead] = {}
        try:
            reads[0] = self._begin(rounds[0])
            self._read_ahead(guess)
            return self._last.keep(self._rounds(rounds, reads, chosen, experts))
        except BaseException:
            for read in reads.values():
                read.cancel()
            self.cache.abandon()
            raise

    def _guess(self, experts: Experts, pairs: int) -> mx.array | None:
        """What the next layer's router may choose, if somebody wants to know; not evaluated."""
        if self._prefetcher is None:
            return None
        self._prefetcher.arrive(self.layout)
        if self.next_layer is None or pairs > FEW_PAIRS or not self._prefetcher.policy.is_asking:
            return None
        return self.next_layer.guess(experts.x)

    def _read_ahead(self, guess: mx.array | None) -> None:
        """Begin to read what the next layer may ask for, behind what this one waits for."""
        if guess is not None and self._prefetcher is not None and self.next_layer is not None:
            # Every token's first choices, then every token's second.
            ranked: list[int] = np.array(guess).T.reshape(-1).tolist()
            bank = self.next_layer.bank
            self._prefetcher.begin(bank.layout, bank.cache, list(dict.fromkeys(ranked)))

    def _rounds(
        self, rounds: Sequence[Round], reads: dict[int, PendingRead], chosen: NDArray[np.uint32], experts: Experts
    ) -> mx.array:
        """`reads` has those that are under way, from the first round on."""
        rows = _RowsInParts(len(chosen))

        def add(placed: Sequence[tuple[int, int]], number: int) -> None:
            if placed:
                slots = np.full(self.layout.experts, -1)
                slots[[expert for expert, _ in placed]] = [slot for _, slot in placed]
                found = slots[chosen]
                pairs = np.flatnonzero(found >= 0)
                for part in _by_expert(pairs, found):
                    rows.begin(number, part, experts.some(part, found[part], len(chosen)))

        begun = len(reads)
        for number, each in enumerate(rounds):
            while begun <= number or (
                begun < len(rounds) and begun < number + READS_AHEAD and rounds[begun].after <= max(0, number - 1)
            ):
                rows.wait(rounds[begun].after)
                reads[begun] = self._begin(rounds[begun])
                begun += 1
            add(each.held, number)
            reads[number].wait()
            del reads[number]
            for expert, slot in each.read:
                self.cache.installed(expert, slot)
            add(each.read, number)
        return rows.whole()

    def _begin(self, each: Round) -> PendingRead:
        for _, slot in each.read:
            self.cache.writing(slot)
        return self.store.begin([self._order(expert, slot) for expert, slot in each.read])

    def _order(self, expert: int, slot: int) -> SlotOrder:
        read = None if self._prefetcher is None else self._prefetcher.take(self.layout.layer, expert)
        return SlotOrder(self.layout, expert, self._views[slot], read)


def _by_expert(pairs: Ids, slots: Ids) -> list[Ids]:
    """Pairs in the order of their slots, many of them in parts: no slot in two, each of a PARTS-th of all pairs or one slot more.

    Args:
        pairs: (p,) by number.
        slots: (P,) of all pairs.
    """
    order = pairs[np.argsort(slots[pairs], kind="stable")]
    if len(slots) <= FEW_PAIRS:
        return [order]
    ascending = slots[order]
    part = np.searchsorted(ascending, ascending) // (len(slots) // PARTS)
    return np.split(order, np.flatnonzero(np.diff(part)) + 1)


@dataclass(frozen=True, slots=True)
class StreamedExperts:
    """The layers of one stage that hold fewer experts than they have.

    Args:
        store: reads for all of them.
        banks: by layer.
        prefetcher: reads ahead for all of them; None where there is no memory for it, or nobody wants it.
        prefetch_memory_bytes: what it reads into, beside the slots.
    """

    store: ExpertStore
    banks: Mapping[int, ExpertBank]
    prefetcher: Prefetcher | None = None
    prefetch_memory_bytes: int = 0

    @property
    def counters(self) -> HitCounters:
        """Of all layers together."""
        each = [bank.cache.counters for bank in self.banks.values()]
        return HitCounters(
            hits=sum(one.hits for one in each),
            misses=sum(one.misses for one in each),
            evictions=sum(one.evictions for one in each),
        )

    @property
    def slots(self) -> int:
        """Experts that are held, all layers together."""
        return sum(bank.cache.slots for bank in self.banks.values())

    @property
    def slot_bytes(self) -> int:
        """What the slots take in memory."""
        return sum(bank.cache.slots * bank.layout.slot_bytes for bank in self.banks.values())
