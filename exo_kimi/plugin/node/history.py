"""Why an instance is gone: a person ended it, or machines and exo did. exo does not say, so each look at its state is remembered.

A person did when every machine of it was there all the time, none of its runners was failing, and the master is the one that
placed it. Everything else is a machine's doing, also what nobody was there to see.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from exo_kimi.plugin.control.state import ANSWERS, ClusterState, Instance

# exo forgets a silent node after 30 s and ends its instances up to 10 s later; by then the node may be back.
MISSING_S = 90.0
UNSEEN_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An instance that is gone. `why` is a clause for the user."""

    instance: Instance
    by_person: bool
    why: str


@dataclass(slots=True)
class _Seen:
    instance: Instance
    failing: bool = False
    missing_s: float = float("-inf")
    missing: str = ""


@dataclass(slots=True)
class History:
    """The instances of some models, look by look.

    Args:
        models: ids; instances of others are not followed.
    """

    models: Collection[str]
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _looked_s: float = float("-inf")
    _last_event: int = -1

    def look(self, state: ClusterState, now_s: float) -> tuple[Ended, ...]:
        """Take in a state.

        Args:
            state: the cluster now.
            now_s: of a clock that never goes back.

        Returns:
            What was there at the last look and is gone.
        """
        unseen = now_s - self._looked_s > UNSEEN_S
        new_master = state.last_event < self._last_event
        self._names.update(state.names)
        for seen in self._seen.values():
            self._note_missing(seen, state, now_s)
        gone = [each for each in self._seen.values() if state.instance(each.instance.instance_id) is None]
        ended = tuple(self._judged(each, now_s, unseen=unseen, new_master=new_master) for each in gone)
        for each in gone:
            del self._seen[each.instance.instance_id]
        for instance in state.instances:
            if instance.model_id in self.models:
                self._follow(instance, state, now_s)
        self._looked_s, self._last_event = now_s, state.last_event
        return ended

    def forget(self, instance_id: str) -> None:
        """Follow an instance no more: whoever asks ends it himself."""
        self._seen.pop(instance_id, None)

    def _follow(self, instance: Instance, state: ClusterState, now_s: float) -> None:
        seen = self._seen.setdefault(instance.instance_id, _Seen(instance))
        self._note_missing(seen, state, now_s)
        phases = [
            runner.phase for shard in instance.shards if (runner := state.runners.get(shard.runner_id)) is not None
        ]
        if "RunnerFailed" in phases:
            seen.failing = True
        elif phases and all(phase in ANSWERS for phase in phases):
            seen.failing = False

    def _note_missing(self, seen: _Seen, state: ClusterState, now_s: float) -> None:
        gone = [shard.node_id for shard in seen.instance.shards if state.node(shard.node_id) is None]
        if gone:
            seen.missing_s = now_s
            seen.missing = " and ".join(self._names.get(node_id, node_id) for node_id in gone)

    def _judged(self, seen: _Seen, now_s: float, *, unseen: bool, new_master: bool) -> Ended:
        if now_s - seen.missing_s <= MISSING_S:
            why = f"{seen.missing} had left the cluster"
        elif new_master:
            why = "exo has another master, which does not know it"
        elif seen.failing:
            why = "its runners failed until exo gave it up"
        elif unseen:
            why = "it ended while nobody looked"
        else:
            return Ended(instance=seen.instance, by_person=True, why="somebody ended it")
        return Ended(instance=seen.instance, by_person=False, why=why)
