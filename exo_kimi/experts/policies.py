"""Which expert a layer gives up for another: least recently used, and four that remember more.

The engine and the simulator use the same objects. A policy knows the experts that one layer holds, by number; slots, bytes and
files are none of its business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol, get_args

from exo_kimi.errors import UsageError

PolicyName = Literal["lru", "slru", "lfu", "s3fifo", "pinned"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
DEFAULT_POLICY: PolicyName = "lru"

PROTECTED_SHARE = 0.8
"""Of a segmented LRU. Source: Karedla, Love and Wherry, "Caching strategies to improve disk system performance", 1994."""

SMALL_SHARE = 0.1
"""Of S3-FIFO's first queue. Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023."""

MOST_FREQUENCY = 3
"""S3-FIFO's counters have two bits."""

HALF_LIFE_REQUESTS = 64
"""Requests of a layer after which a use counts half in the decaying LFU."""

PINNED_SHARE = 0.5
"""Slots that a profile pins, at most."""


class Policy(Protocol):
    """The order in which one layer gives up its experts."""

    def request(self, experts: Sequence[int]) -> None:
        """A pass asks for these experts, each once: what follows, until the next request, belongs to it."""
        ...

    def hit(self, expert: int) -> None:
        """An expert that is held is used."""
        ...

    def admit(self, expert: int) -> None:
        """An expert is held from now on."""
        ...

    def evict(self, kept: Collection[int]) -> int:
        """The expert to give up, which is held no longer; none of `kept`, and there is another.

        Raises:
            LookupError: every expert is kept.
        """
        ...

    def drop(self, expert: int) -> None:
        """An expert is held no longer, for a reason of somebody else's."""
        ...


class LRU:
    """Gives up the expert whose last use is longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def request(self, experts: Sequence[int]) -> None:
        """Nothing is counted."""

    def hit(self, expert: int) -> None:
        self._order.move_to_end(expert)

    def admit(self, expert: int) -> None:
        self._order[expert] = None

    def evict(self, kept: Collection[int]) -> int:
        expert = _first(self._order, kept)
        del self._order[expert]
        return expert

    def drop(self, expert: int) -> None:
        del self._order[expert]


class SLRU:
    """Two LRUs: an expert that is used again while it is on probation is protected from those that come once.

    Args:
        slots: experts that the layer holds.
        protected_share: of them, at most.

    Source: as of PROTECTED_SHARE.
    """

    def __init__(self, slots: int, protected_share: float = PROTECTED_SHARE) -> None:
        self._most_protected = int(slots * protected_share)
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()

    def request(self, experts: Sequence[int]) -> None:
        """Nothing is counted."""

    def hit(self, expert: int) -> None:
        if expert in self._protected:
            self._protected.move_to_end(expert)
            return
        del self._probation[expert]
        self._protected[expert] = None
        if len(self._protected) > self._most_protected:
            demoted, _ = self._protected.popitem(last=False)
            self._probation[demoted] = None

    def admit(self, expert: int) -> None:
        self._probation[expert] = None

    def evict(self, kept: Collection[int]) -> int:
        for queue in (self._probation, self._protected):
            for expert in queue:
                if expert not in kept:
                    del queue[expert]
                    return expert
        raise LookupError("every expert is kept")

    def drop(self, expert: int) -> None:
        del (self._probation if expert in self._probation else self._protected)[expert]


class DecayingLFU:
    """Gives up the expert with the fewest uses, where each use counts half as much `half_life` requests later.

    Uses are remembered of experts that are not held as well.

    Args:
        half_life: in requests of the layer.
    """

    def __init__(self, half_life: float = HALF_LIFE_REQUESTS) -> None:
        self._growth: float = 2 ** (1 / half_life)
        self._unit = 1.0
        self._uses: dict[int, float] = {}
        self._held: dict[int, None] = {}

    def request(self, experts: Sequence[int]) -> None:
        """Newer uses count more, which orders experts as if older ones counted less."""
        self._unit *= self._growth
        if self._unit > 1e100:
            self._uses = {expert: uses / self._unit for expert, uses in self._uses.items()}
            self._unit = 1.0
        for expert in experts:
            self._uses[expert] = self._uses.get(expert, 0.0) + self._unit

    def hit(self, expert: int) -> None:
        """Counted by `request`."""

    def admit(self, expert: int) -> None:
        self._held[expert] = None

    def evict(self, kept: Collection[int]) -> int:
        expert = min(
            (each for each in self._held if each not in kept), key=lambda each: self._uses.get(each, 0.0), default=None
        )
        if expert is None:
            raise LookupError("every expert is kept")
        del self._held[expert]
        return expert

    def drop(self, expert: int) -> None:
        del self._held[expert]


class S3FIFO:
    """A small queue for newcomers, a main queue for those that were used again, and the names of those that left the small one.

    Args:
        slots: experts that the layer holds.
        small_share: of them, for newcomers.

    Source: as of SMALL_SHARE, algorithm 1.
    """

    def __init__(self, slots: int, small_share: float = SMALL_SHARE) -> None:
        self._small_slots = max(1, round(slots * small_share))
        self._most_ghosts = max(1, slots - self._small_slots)
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def request(self, experts: Sequence[int]) -> None:
        """Nothing is counted."""

    def hit(self, expert: int) -> None:
        queue = self._small if expert in self._small else self._main
        queue[expert] = min(queue[expert] + 1, MOST_FREQUENCY)

    def admit(self, expert: int) -> None:
        if expert in self._ghosts:
            del self._ghosts[expert]
            self._main[expert] = 0
        else:
            self._small[expert] = 0

    def evict(self, kept: Collection[int]) -> int:
        if len(self._small) >= self._small_slots or not self._main:
            expert = self._evict_small(kept)
            if expert is not None:
                return expert
        expert = self._evict_main(kept)
        if expert is None:
            expert = self._evict_small(kept)
        if expert is None:
            raise LookupError("every expert is kept")
        return expert

    def drop(self, expert: int) -> None:
        del (self._small if expert in self._small else self._main)[expert]

    def _evict_small(self, kept: Collection[int]) -> int | None:
        for expert, uses in list(self._small.items()):
            if expert in kept:
                continue
            del self._small[expert]
            if uses > 1:
                self._main[expert] = 0
                continue
            self._ghosts[expert] = None
            if len(self._ghosts) > self._most_ghosts:
                self._ghosts.popitem(last=False)
            return expert
        return None

    def _evict_main(self, kept: Collection[int]) -> int | None:
        """Each turn takes one use off, so that it ends."""
        while any(expert not in kept for expert in self._main):
            expert, uses = next((each, uses) for each, uses in self._main.items() if each not in kept)
            del self._main[expert]
            if not uses:
                return expert
            self._main[expert] = uses - 1
        return None


class Pinned:
    """Keeps the experts that a profile names first, and gives up the others by least recent use.

    Args:
        profile: experts of the layer, the one that was used most first.
        pins: how many of them stay once they are there. They go last, where nothing else is left.
    """

    def __init__(self, profile: Sequence[int], pins: int) -> None:
        self._pins = frozenset(profile[:pins])
        self._pinned, self._others = LRU(), LRU()

    def request(self, experts: Sequence[int]) -> None:
        """Nothing is counted."""

    def hit(self, expert: int) -> None:
        self._queue(expert).hit(expert)

    def admit(self, expert: int) -> None:
        self._queue(expert).admit(expert)

    def evict(self, kept: Collection[int]) -> int:
        try:
            return self._others.evict(kept)
        except LookupError:
            return self._pinned.evict(kept)

    def drop(self, expert: int) -> None:
        self._queue(expert).drop(expert)

    def _queue(self, expert: int) -> LRU:
        return self._pinned if expert in self._pins else self._others


def make_policy(name: str, *, slots: int, profile: Sequence[int] = ()) -> Policy:
    """A policy of one layer, by name.

    Args:
        name: one of POLICY_NAMES.
        slots: experts that the layer holds.
        profile: its experts, the one that was used most first; for `pinned` alone.

    Raises:
        UsageError: no such policy, or `pinned` without a profile.
    """
    if name == "pinned":
        if not profile:
            raise UsageError(
                "experts are pinned by a profile",
                expected="a profile of a trace",
                found="none",
                fix="record one with `exo-kimi trace record`, or take another policy",
            )
        return Pinned(profile, int(slots * PINNED_SHARE))
    makers: dict[str, Callable[[], Policy]] = {
        "lru": LRU,
        "slru": lambda: SLRU(slots),
        "lfu": DecayingLFU,
        "s3fifo": lambda: S3FIFO(slots),
    }
    if name not in makers:
        raise UsageError("no such policy", expected=", ".join(POLICY_NAMES), found=repr(name))
    return makers[name]()


def _first(experts: Collection[int], kept: Collection[int]) -> int:
    for expert in experts:
        if expert not in kept:
            return expert
    raise LookupError("every expert is kept")
