"""The routed experts of one layer in slots: its parameters have a row for each slot, and what a pass asks for is read into them.

A pass reads its choices back from MLX, which a layer that holds all its experts never does. Experts that are there compute while
the others are read. No slot is written while a graph may still read it: whatever the layer returned last is evaluated first, and
within a pass every round that used the slot.

Axes: N tokens, K experts of each, P = N * K pairs of both; S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from exo_kimi.experts.layer_cache import HitCounters, LayerCache, Round
from exo_kimi.experts.layout import LayerLayout
from exo_kimi.experts.store import ExpertStore, PendingRead, SlotOrder, SlotViews

KEPT_BYTES = 1024**2
"""What a layer returned is kept until its next pass up to this size; more is evaluated at once."""

READS_AHEAD = 2
"""Rounds that may be read while another computes."""

Pairs = NDArray[np.int64]
Compute = Callable[[Pairs, NDArray[np.uint32]], mx.array]
"""(p, D) of some of the P pairs, by number, and the slots that their experts lie in."""


class ExpertBank:
    """Slots of one layer, their memory and the files behind them.

    Args:
        layout: where the layer's experts lie.
        cache: which of them have a slot.
        store: reads them.
        views: writable bytes of each slot; the layer's parameters are the same memory.
    """

    def __init__(self, layout: LayerLayout, cache: LayerCache, store: ExpertStore, views: Sequence[SlotViews]) -> None:
        self.layout = layout
        self.cache = cache
        self.store = store
        self._views = views
        self._last: list[mx.array] = []

    def chosen(self, indices: mx.array, beside: Sequence[mx.array]) -> NDArray[np.int64]:
        """The choices (P,) of a pass, read back from MLX.

        Args:
            indices: experts, in any shape.
            beside: what the layer computes whatever they are: begun, and not waited for.
        """
        mx.async_eval(indices)  # type: ignore[no-untyped-call]
        if beside:
            mx.async_eval(*beside)  # type: ignore[no-untyped-call]
        mx.eval(self._last)
        self._last = []
        return np.array(indices).reshape(-1).astype(np.int64)

    def apply(self, chosen: NDArray[np.int64], compute: Compute) -> mx.array:
        """(P, D), what `compute` makes of every pair once its expert is in a slot. Each expert is read at most once.

        Args:
            chosen: (P,) the expert of each pair.
            compute: called for all pairs at once where that is possible.

        Raises:
            ExpertReadError: a read failed; the slots are in order for the next pass.
        """
        experts, counts = np.unique(chosen, return_counts=True)
        rounds = self.cache.request(experts[np.argsort(counts, kind="stable")].tolist())
        reads: dict[int, PendingRead] = {}
        try:
            y = self._run(rounds, reads, chosen, compute)
        except BaseException:
            for read in reads.values():
                read.cancel()
            self.cache.abandon()
            raise
        if y.nbytes > KEPT_BYTES:
            mx.eval(y)
        else:
            self._last = [y]
        return y

    def _run(
        self, rounds: Sequence[Round], reads: dict[int, PendingRead], chosen: NDArray[np.int64], compute: Compute
    ) -> mx.array:
        slots = np.zeros(self.layout.experts, np.uint32)
        if not rounds[0].read and len(rounds) == 1:
            return compute(np.arange(len(chosen)), _fill(slots, rounds[0].held)[chosen])
        parts: list[Pairs] = []
        outputs: list[mx.array] = []
        ends = [0]
        """Outputs of the rounds before each, in number."""

        def add(placed: Sequence[tuple[int, int]]) -> None:
            if placed:
                wanted = np.isin(chosen, [expert for expert, _ in placed])
                pairs = np.flatnonzero(wanted)
                parts.append(pairs)
                outputs.append(compute(pairs, _fill(slots, placed)[chosen[pairs]]))
                mx.async_eval(outputs[-1])  # type: ignore[no-untyped-call]

        def begin(number: int) -> None:
            mx.eval(outputs[: ends[rounds[number].after]])
            reads[number] = self._begin(rounds[number])

        begun = 0
        for number, each in enumerate(rounds):
            while begun <= number or (
                begun < len(rounds) and begun < number + READS_AHEAD and rounds[begun].after <= max(0, number - 1)
            ):
                begin(begun)
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
        return self.store.begin([SlotOrder(self.layout, expert, self._views[slot]) for expert, slot in each.read])


@dataclass(frozen=True, slots=True)
class StreamedExperts:
    """The layers of one stage that hold fewer experts than they have.

    Args:
        store: reads for all of them.
        banks: by layer.
    """

    store: ExpertStore
    banks: Mapping[int, ExpertBank]

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


def _fill(slots: NDArray[np.uint32], placed: Sequence[tuple[int, int]]) -> NDArray[np.uint32]:
    for expert, slot in placed:
        slots[expert] = slot
    return slots
