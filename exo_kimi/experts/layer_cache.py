"""Which experts lie in the slots of one layer, and in which rounds a pass goes through the experts that it asks for.

No slot is a slot of two layers: layers are visited in a cycle, and one list over all of them would give up each expert just
before it is asked for again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from exo_kimi.experts.policies import Policy


@dataclass(slots=True)
class HitCounters:
    """What a layer's passes asked for, each expert once a pass.

    Args:
        hits: experts that lay in a slot.
        misses: experts that did not.
        evictions: experts that were given up for another.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Of all experts asked for; 1 when none was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclass(frozen=True, slots=True)
class Round:
    """Experts that are computed together, by slot.

    Args:
        held: (expert, slot) of those that are there already, or are read by a round before.
        read: (expert, slot) of those to be read.
        after: how many rounds, from the first, must be computed before a slot of `read` is written.
    """

    held: tuple[tuple[int, int], ...]
    read: tuple[tuple[int, int], ...]
    after: int = 0


class LayerCache:
    """The slots of one layer.

    What a pass asks for is planned at once. The reader then says of each slot what is really in it, by `writing` and `installed`;
    after a failure, `abandon` forgets what was planned and did not come.

    Args:
        slots: how many, at least one; fewer than a token has experts will do.
        policy: which expert is given up.

    Attributes:
        counters: of the passes so far.
    """

    def __init__(self, slots: int, policy: Policy) -> None:
        self.slots = slots
        self.policy = policy
        self.counters = HitCounters()
        self._slot_of: dict[int, int] = {}
        self._free = list(range(slots))[::-1]
        self._content: list[int | None] = [None] * slots

    @property
    def held(self) -> tuple[int, ...]:
        """The experts that have a slot, ascending."""
        return tuple(sorted(self._slot_of))

    def slot_of(self, expert: int) -> int | None:
        """Where an expert lies, or will once it is read; None where it has no slot."""
        return self._slot_of.get(expert)

    def request(self, experts: Sequence[int]) -> list[Round]:
        """The rounds of a pass, each with at most as many experts as there are slots; those that are held come first.

        Args:
            experts: what the pass asks for, each once, the one that most tokens want last: where not all of them have room, it is
                the last that stay.
        """
        held = [expert for expert in experts if expert in self._slot_of]
        missing = [expert for expert in experts if expert not in self._slot_of]
        self.counters.hits += len(held)
        self.counters.misses += len(missing)
        if len(experts) > self.slots:
            return self._sweep(held, missing)
        self.policy.request(experts)
        for expert in held:
            self.policy.hit(expert)
        kept = frozenset(experts)
        read = tuple((expert, self._place(expert, kept)) for expert in missing)
        return [Round(self._slots_of(held), read)]

    def admit(self, expert: int, kept: Sequence[int] = ()) -> int | None:
        """A slot for an expert that nobody has asked for yet; None where every other expert is to be kept.

        Args:
            expert: that is not held.
            kept: experts that stay.
        """
        if not self._free and set(self._slot_of) <= set(kept):
            return None
        return self._place(expert, frozenset(kept))

    def writing(self, slot: int) -> None:
        """The bytes of a slot are being overwritten."""
        self._content[slot] = None

    def installed(self, expert: int, slot: int) -> None:
        """A slot holds this expert's bytes."""
        self._content[slot] = expert

    def install(self, rounds: Sequence[Round]) -> None:
        """Every expert of these rounds was read: for replays."""
        for each in rounds:
            for expert, slot in each.read:
                self.installed(expert, slot)

    def abandon(self) -> None:
        """Forget every expert whose bytes are not in its slot; call it when no read is under way."""
        for expert, slot in list(self._slot_of.items()):
            if self._content[slot] != expert:
                del self._slot_of[expert]
                self.policy.drop(expert)
        used = set(self._slot_of.values())
        self._free = [slot for slot in range(self.slots) if slot not in used][::-1]

    def _place(self, expert: int, kept: Collection[int]) -> int:
        slot = self._free.pop() if self._free else self._give_up(kept)
        self._slot_of[expert] = slot
        self.policy.admit(expert)
        return slot

    def _give_up(self, kept: Collection[int]) -> int:
        self.counters.evictions += 1
        return self._slot_of.pop(self.policy.evict(kept))

    def _slots_of(self, experts: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return tuple((expert, self._slot_of[expert]) for expert in experts)

    def _sweep(self, held: list[int], missing: list[int]) -> list[Round]:
        """More experts than slots, as of a prompt: what is missing passes through two windows of slots in turn, so that the next
        are read while the ones before are computed. The other slots keep what they have, and the policy learns nothing of what
        was asked for: a pass that asks for everything does not say what the next will want."""
        width = max(1, self.slots // (4 if len(missing) > self.slots else 2), len(self._free) // 2)
        width = min(width, -(-len(missing) // 2))
        wanted, slot_before = set(held), dict(self._slot_of)
        room: list[int] = []
        while len(room) < min(2 * width, self.slots, len(missing)):
            others = any(expert not in wanted for expert in self._slot_of)
            room.append(self._free.pop() if self._free else self._give_up(wanted if others else ()))
        # What lies in the windows and is wanted is computed before anything is written there.
        first = [(expert, slot_before[expert]) for expert in held if expert not in self._slot_of]
        rounds = [Round(tuple(first), ())] if first else []
        before = {slot: len(rounds) for slot in room}
        content: dict[int, int] = {}
        rest = self._slots_of([expert for expert in held if expert in self._slot_of])
        spare = min(len(self._free), len(missing) - len(room))
        fresh = [
            self._free.pop() for _ in range(spare)
        ]  # those that come last stay: nothing is lost by giving them room
        windows = [room[start : start + width] for start in range(0, len(room), width)]
        before |= dict.fromkeys(fresh, 0)
        swept, last = missing[: len(missing) - spare], missing[len(missing) - spare :]
        batches = [swept[start : start + width] for start in range(0, len(swept), width)]
        placed = [(batch, windows[number % len(windows)]) for number, batch in enumerate(batches)]
        placed += [(last[start : start + width], fresh[start : start + width]) for start in range(0, len(last), width)]
        for batch, slots in placed:
            read = tuple(zip(batch, slots, strict=False))
            after = max(before[slot] for _, slot in read)
            rounds.append(Round(rest, read, after))
            rest = ()
            self.counters.evictions += sum(slot in content for _, slot in read)
            for expert, slot in read:
                before[slot], content[slot] = len(rounds), expert
        for slot, expert in content.items():
            self._slot_of[expert] = slot
            self.policy.admit(expert)
        return rounds
