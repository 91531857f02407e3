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
        """(p, D) of some of the `count` pairs, by number, and the slots that their experts lie in."""
        ...


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
        parts: list[Ids] = []
        outputs: list[mx.array] = []
        ends = [0]
        """Outputs of the rounds before each, in number."""

        def add(placed: Sequence[tuple[int, int]]) -> None:
            if placed:
                slots = np.full(self.layout.experts, -1)
                slots[[expert for expert, _ in placed]] = [slot for _, slot in placed]
                found = slots[chosen]
                pairs = np.flatnonzero(found >= 0)
                parts.append(pairs)
                outputs.append(experts.some(pairs, found[pairs], len(chosen)))
                mx.async_eval(outputs[-1])  # type: ignore[no-untyped-call]

        begun = len(reads)
        for number, each in enumerate(rounds):
            while begun <= number or (
                begun < len(rounds) and begun < number + READS_AHEAD and rounds[begun].after <= max(0, number - 1)
            ):
                mx.eval(outputs[: ends[rounds[begun].after]])
                reads[begun] = self._begin(rounds[begun])
                begun += 1
            add(each.held)
            reads[number].wait()
            del reads[number]
            for expert, slot in each.read:
                self.cache.installed(expert, slot)
            add(each.read)
            ends.append(len(outputs))
        order = np.argsort(np.concatenate(parts))
        return mx.concatenate(outputs)[mx.array(order.astype(np.uint32))]

    def _begin(self, each: Round) -> PendingRead:
        for _, slot in each.read:
            self.cache.writing(slot)
        return self.store.begin([self._order(expert, slot) for expert, slot in each.read])

    def _order(self, expert: int, slot: int) -> SlotOrder:
        read = None if self._prefetcher is None else self._prefetcher.take(self.layout.layer, expert)
        return SlotOrder(self.layout, expert, self._views[slot], read)


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
