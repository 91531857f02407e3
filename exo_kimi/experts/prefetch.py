"""Experts that the next layer will probably ask for, read while this one computes.

The next layer's router is asked one layer early. What it names and has no slot is read into memory beside the slots, and copied
into one once the layer has asked for it: what is held, hit and given up is the same as without, and a guess that is wrong costs
only its bytes. How many are read is decided by what is measured: how often the guesses of each rank were right, and how long
a layer computes while nothing is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

from exo_kimi.experts.budget import check_prefetch
from exo_kimi.experts.layer_cache import LayerCache
from exo_kimi.experts.layout import LayerLayout
from exo_kimi.experts.store import ExpertStore, PrefetchedExpert, SlotOrder, SlotViews

MEMORY_SHARE = 0.01
"""Of an expert cache, at most, for experts that nobody has asked for yet."""

PROBE_PASSES = 16
"""While nothing is read ahead, the router is asked early in one pass of so many, to know what would come of it."""

DECIDE_LAYERS = 64
"""Layers between two decisions."""

COMPARE_DECISIONS = 16
"""Decisions to go on after which it is off until the next, to measure anew what that would take."""

MOST_REST = 64
"""Decisions until it is tried again after it did not win: twice as many each time, up to these."""

BEGIN_GAIN, GO_ON_GAIN = 0.03, 0.01
"""Of a layer's time: what reading ahead must promise to save to begin, and save to go on."""

FORGET = 0.98
"""Weight that what was measured keeps when the next comes."""

LEAST_WEIGHT = 8.0
"""Guesses of a rank, or layers, that must have been seen before they say anything."""


class Mean:
    """A mean that forgets."""

    __slots__ = ("total", "weight")

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.total = self.total * FORGET + value
        self.weight = self.weight * FORGET + 1

    @property
    def value(self) -> float:
        """0 before the first."""
        return self.total / self.weight if self.weight else 0.0


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What one layer of a pass took.

    Args:
        compute_s: without waiting for reads; None where it is not known.
        waited_s: for reads.
        missing: experts that had no slot.
    """

    compute_s: float | None
    waited_s: float
    missing: int


class _Times:
    """Of layers, on average."""

    def __init__(self) -> None:
        self.compute_s, self.waited_s = Mean(), Mean()

    def add(self, layer: LayerTime) -> None:
        if layer.compute_s is not None:
            self.compute_s.add(layer.compute_s)
        self.waited_s.add(layer.waited_s)

    @property
    def total_s(self) -> float:
        return self.compute_s.value + self.waited_s.value


class PrefetchPolicy:
    """How many experts a layer reads ahead, by what was measured; one for all layers of a stage.

    With C seconds of a layer without waiting, M experts missing, t seconds of the disk for each, and G read ahead of which u are
    used, a layer takes C + M t without, and with the greater of C + (M - u) t and (M + G - u) t: reading ahead hides reads behind
    computing until the disk is never idle. That law says how many to try. They are read for as long as layers really wait less
    than while nothing was read ahead; else half as many are tried, and then none for a while.

    Args:
        mode: `auto` decides; `on` reads as many as there is room for.
        most: experts of a layer for which there is room.

    Attributes:
        count: experts of a layer that are read ahead now.
    """

    def __init__(self, mode: str, most: int) -> None:
        check_prefetch(mode)
        self.most = 0 if mode == "off" else most
        self.count = self.most if mode == "on" else 0
        self._decides = mode == "auto" and most > 0
        self._right = [Mean() for _ in range(self.most)]
        self._missing = Mean()
        self._without, self._with = _Times(), _Times()
        self._passes = self._layers = self._decisions = 0
        self._rest, self._next_rest = 0, 1

    def begin_pass(self) -> None:
        """The first layer of a pass is next."""
        self._passes += 1

    @property
    def is_asking(self) -> bool:
        """Whether this pass wants to know what the next layers' routers would choose."""
        return self.count > 0 or (self._decides and self._passes % PROBE_PASSES == 0)

    def learn(self, guesses: Sequence[int], asked: Collection[int]) -> None:
        """What became of the guesses of a layer that had no slot, the most probable first."""
        for mean, expert in zip(self._right, guesses, strict=False):
            mean.add(expert in asked)

    def measured(self, layer: LayerTime, expert_s: float) -> None:
        """A layer was run.

        Args:
            layer: what it took.
            expert_s: of the disk, for one expert.
        """
        self._missing.add(layer.missing)
        (self._with if self.count else self._without).add(layer)
        self._layers += 1
        if self._decides and self._layers % DECIDE_LAYERS == 0:
            self._decide(expert_s)

    def gain(self, count: int, expert_s: float) -> float:
        """The share of a layer's time that reading so many ahead saves."""
        compute_s, missing = self._without.compute_s.value, self._missing.value
        used = min(missing, sum(mean.value for mean in self._right[:count] if mean.weight >= LEAST_WEIGHT))
        before_s = compute_s + missing * expert_s
        after_s = max(compute_s + (missing - used) * expert_s, (missing + count - used) * expert_s)
        return 1 - after_s / before_s if before_s else 0.0

    @property
    def saved(self) -> float:
        """The share of a layer's time that reading ahead really saves, with what it takes from computing."""
        return 1 - self._with.total_s / self._without.total_s if self._without.total_s else 0.0

    def _decide(self, expert_s: float) -> None:
        if min(mean.weight for mean in (self._without.compute_s, self._without.waited_s)) < LEAST_WEIGHT:
            return
        if not self.count:
            self._rest = max(0, self._rest - 1)
            best = max(range(self.most + 1), key=lambda count: self.gain(count, expert_s))
            if not self._rest and self.gain(best, expert_s) >= BEGIN_GAIN:
                self._try(best)
        elif self.saved >= GO_ON_GAIN:
            self._decisions += 1
            self._next_rest = 1
            if self._decisions % COMPARE_DECISIONS == 0:
                self.count = 0
        elif self.count > 1:
            self._try(self.count // 2)
        else:
            self.count = 0
            self._rest, self._next_rest = self._next_rest + 1, min(MOST_REST, 2 * self._next_rest)

    def _try(self, count: int) -> None:
        self.count, self._with = count, _Times()


class Prefetcher:
    """Reads of one stage that nobody has asked for yet.

    Args:
        store: reads.
        policy: how many.
        places: memory for one expert of any layer each, as large as the largest.
        clock: seconds.
    """

    def __init__(
        self,
        store: ExpertStore,
        policy: PrefetchPolicy,
        places: Sequence[memoryview],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.policy = policy
        self._store = store
        self._clock = clock
        self._layer = -1
        self._arrived = (0.0, 0.0)
        self._missing: int | None = None
        self._free = list(places)
        self._lock = Lock()
        self._guesses: dict[int, Sequence[int]] = {}
        self._reads: dict[int, dict[int, PrefetchedExpert]] = {}

    def arrive(self, layout: LayerLayout) -> None:
        """A pass has come to a layer: what the one before it took is measured."""
        now_s, stall_s = self._clock(), self._store.counters.stall_s
        if layout.layer <= self._layer:
            self.policy.begin_pass()
        if self._missing is not None:
            waited_s = stall_s - self._arrived[1]
            follows = layout.layer == self._layer + 1  # or other stages' time lies between
            compute_s = max(0.0, now_s - self._arrived[0] - waited_s) if follows else None
            self.policy.measured(LayerTime(compute_s, waited_s, self._missing), self._expert_s(layout))
        self._layer, self._arrived, self._missing = layout.layer, (now_s, stall_s), None

    def asked(self, missing: int) -> None:
        """The layer asks for so many experts that have no slot, in one round; not called for the sweeps of prompts."""
        self._missing = missing

    def begin(self, layout: LayerLayout, cache: LayerCache, guesses: Sequence[int]) -> None:
        """Read ahead for a layer.

        Args:
            layout, cache: of the layer.
            guesses: experts that it may ask for, each once, the most probable first.
        """
        self.settle(layout.layer, ())
        missing = [expert for expert in guesses if cache.slot_of(expert) is None][: self.policy.most]
        self._guesses[layout.layer] = missing
        reads = self._reads[layout.layer] = {}
        for expert in missing[: self.policy.count]:
            with self._lock:
                place = self._free.pop() if self._free else None
            if place is None:
                return
            order = SlotOrder(layout, expert, _cut(place, layout))
            reads[expert] = self._store.prefetch(order, partial(self._give_back, place))

    def settle(self, layer: int, asked: Collection[int]) -> None:
        """A layer has asked: what it did not ask for is read no further."""
        reads = self._reads.get(layer, {})
        for expert in [expert for expert in reads if expert not in asked]:
            reads.pop(expert).drop()
        if asked and layer in self._guesses:
            self.policy.learn(self._guesses.pop(layer), asked)

    def take(self, layer: int, expert: int) -> PrefetchedExpert | None:
        """A read that began for this expert; the caller settles it."""
        return self._reads.get(layer, {}).pop(expert, None)

    def _expert_s(self, layout: LayerLayout) -> float:
        counters = self._store.counters
        return counters.read_s / counters.read_bytes * layout.disk_bytes if counters.read_bytes else 0.0

    def _give_back(self, place: memoryview) -> None:
        with self._lock:
            self._free.append(place)


def places_for(mode: str, budget_bytes: int, slot_bytes: Collection[int], chosen: int) -> int:
    """Experts for which an expert cache has memory beside its slots: twice what a token chooses of a layer, where that is a small
    share of it. `on` takes as many whatever the share, as long as each layer keeps a slot.

    Args:
        mode: see `budget.Prefetch`.
        budget_bytes: for slots and these.
        slot_bytes: what an expert takes in memory, of each layer.
        chosen: experts of a token.
    """
    if mode == "off" or not slot_bytes:
        return 0
    largest_bytes = max(slot_bytes)
    left_bytes = budget_bytes - sum(slot_bytes)
    allowed_bytes = left_bytes if mode == "on" else min(left_bytes, int(budget_bytes * MEMORY_SHARE))
    return max(0, min(2 * chosen, allowed_bytes // largest_bytes))


def _cut(place: memoryview, layout: LayerLayout) -> SlotViews:
    views: list[dict[str, memoryview]] = []
    start = 0
    for projection in layout.projections:
        views.append({})
        for leaf in projection.leaves:
            views[-1][leaf.name] = place[start : start + leaf.nbytes]
            start += leaf.nbytes
    return views
