"""Keeps a plan placed: again after sleep, reboot, death or update of a node, and a fallback while its nodes are away.

Several keepers of one plan, one on each node, do not place it twice: they take turns by node id, each looks again before it
acts, and ids follow from what all of them see, so that two which meet ask for one and the same instance, which exo makes once.
Should their views have differed, every keeper ends the instance with the greater id.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from uuid import NAMESPACE_OID, uuid5

from exo_kimi.errors import ExoDeletedError, ExoError, ExoKimiError, ExoPlacementError
from exo_kimi.planner.plan import Plan, check_headroom
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.instance import (
    KEPT,
    PORTS,
    MakeId,
    assign_nodes,
    check_machines,
    missing_links,
    unmeasured,
)
from exo_kimi.plugin.control.model_names import check_model_id
from exo_kimi.plugin.control.state import ClusterState, Instance
from exo_kimi.plugin.control.watch import Deadlines, LoadingProgress, Timing, take_back
from exo_kimi.plugin.node.history import History
from exo_kimi.plugin.node.record import KeepRecord
from exo_kimi.units import format_seconds

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPlan:
    """A plan to keep placed.

    Args:
        plan: as `exo plan` made it.
        model_id: as exo names it.
        nodes: machine of the plan -> name or id of a node, where they differ.
        force: place it although a machine is over its limit.
    """

    plan: Plan
    model_id: str
    nodes: Mapping[str, str] = field(default_factory=dict)
    force: bool = False

    @classmethod
    def of(
        cls, plan: Plan, *, model_id: str | None = None, nodes: Mapping[str, str] | None = None, force: bool = False
    ) -> KeptPlan:
        """A plan that can be kept.

        Raises:
            PlanInfeasibleError: a machine is over its limit.
            ExoPlacementError: a node is given for a machine that the plan does not have.
            UsageError: no model id.
        """
        check_headroom(plan, force=force)
        check_machines(plan, nodes or {})
        name = check_model_id(model_id or plan.model.name.replace("--", "/", 1))
        return cls(plan=plan, model_id=name, nodes=dict(nodes or {}), force=force)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds that a keeper waits.

    Args:
        poll_s: between two looks.
        settle_s: for which the nodes of a plan must have been there before it is placed.
        turn_s: longer for each node with a smaller id, which may have a keeper too.
        fallback_s: for which the nodes of a plan must have been away before the next plan is placed.
        idle_s: at most, for requests to a fallback to end before it makes room.
        retry_s: after a first failure; doubled after each, up to `retry_most_s`.
        retry_most_s: at most between two tries.
    """

    poll_s: float = 2.0
    settle_s: float = 3.0
    turn_s: float = 5.0
    fallback_s: float = 45.0
    idle_s: float = 120.0
    retry_s: float = 10.0
    retry_most_s: float = 1800.0


@dataclass(slots=True)
class _Attempt:
    """How it stands with one plan: since when its nodes are there or away, what failed, when to try again."""

    there_s: float | None = None
    away_s: float | None = None
    missing: str = ""
    failures: int = 0
    retry_at_s: float = _NEVER


class Keeper:
    """Keeps the first of some plans placed whose nodes are there.

    Args:
        client: a node of the cluster.
        plans: the wanted one, then its fallbacks, each for another model.
        record: of what a person has ended.
        say: takes a line whenever something happens.
        member: the keeper of the node that `client` speaks to; else it comes after all of them.
        at_once: place the first time without waiting for a turn.
        patience: seconds that it waits.
        deadlines: of placing and loading.
        timing: clock and sleep.

    Raises:
        ExoPlacementError: two of the plans are for one model.
    """

    def __init__(
        self,
        client: ExoClient,
        plans: Sequence[KeptPlan],
        *,
        record: KeepRecord,
        say: Callable[[str], None],
        member: bool,
        at_once: bool = False,
        patience: Patience | None = None,
        deadlines: Deadlines | None = None,
        timing: Timing | None = None,
    ) -> None:
        models = [kept.model_id for kept in plans]
        if len(set(models)) < len(models):
            raise ExoPlacementError(
                "two kept plans for one model",
                expected="a fallback for another model, such as a smaller one",
                found=", ".join(models),
            )
        self.client, self.plans, self.record = client, tuple(plans), record
        self.patience, self.deadlines = patience or Patience(), deadlines or Deadlines()
        self.timing = timing or Timing()
        self._say, self._said = say, ""
        self._member, self._at_once = member, at_once
        self._history = History(models)
        self._attempts = [_Attempt() for _ in plans]
        self._guest_s = random.uniform(0.0, 2.0)
        self._busy_s: float | None = None
        self._own_id = ""

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Keep the plans until `until` says so, or for ever."""
        while not until():
            self.step()
            self.timing.sleep(self.patience.poll_s)

    def step(self) -> None:
        """Look once, and do what is to be done."""
        try:
            state = self.client.state()
            self._own_id = self.client.node_id()
            if state.node(self._own_id) is None:
                # A node that has just started goes through all that has happened, under another id: that is not now.
                self._once("exo on this node has not caught up with the cluster yet")
                return
            self._take_in(state)
            index = self._next(state)
            if index is not None:
                self._place(index, state)
        except ExoError as error:
            self._once(f"exo cannot be asked: {_told(error)}")

    def _take_in(self, state: ClusterState) -> None:
        now_s = self.timing.clock()
        for ended in self._history.look(state, now_s):
            model = ended.instance.model_id
            if ended.by_person and (self._of(model, state) or self._made_room(ended.instance)):
                continue  # another of it is there, or another keeper ended a fallback
            if ended.by_person:
                self._rest(model)
            else:
                self._say(f"{model} is gone: {ended.why}")
        for index, kept in enumerate(self.plans):
            if self.record.rests(kept.model_id) and self._of(kept.model_id, state):
                self.record.set_resting(kept.model_id, False)
                self._say(f"{kept.model_id} was placed again, and is kept again")
            if index and self._alive(self.plans[0].model_id, state):
                self.record.set_resting(kept.model_id, False)  # ending a fallback was for that time
        self._end_twins(state)
        for kept, attempt in zip(self.plans, self._attempts, strict=True):
            missing = _missing(kept, state)
            if missing and attempt.away_s is None:
                attempt.there_s, attempt.away_s, attempt.missing = None, now_s, missing
                attempt.failures, attempt.retry_at_s = 0, _NEVER  # what failed then need not fail when they are back
            elif not missing and attempt.there_s is None:
                attempt.there_s, attempt.away_s = now_s, None

    def _made_room(self, ended: Instance) -> bool:
        """Whether a keeper's instance ended while something better can be placed."""
        models = [kept.model_id for kept in self.plans]
        better = self._attempts[: models.index(ended.model_id)]
        return ended.instance_id.startswith(KEPT) and any(attempt.there_s is not None for attempt in better)

    def _rest(self, model_id: str) -> None:
        self.record.set_resting(model_id, True)
        self._say(
            f"somebody ended {model_id}: it is left so, over restarts too, until somebody places it "
            "(`exo-kimi exo apply PLAN.json`, or exo's dashboard)"
        )

    def _next(self, state: ClusterState) -> int | None:
        """The plan that is to be placed now; None when there is nothing to do, or not yet."""
        serving = [i for i, kept in enumerate(self.plans) if self._alive(kept.model_id, state)]
        better = self.plans[: min(serving)] if serving else self.plans
        now_s = self.timing.clock()
        for index, (kept, attempt) in enumerate(zip(better, self._attempts, strict=False)):
            if self.record.rests(kept.model_id):
                self._once(f"{kept.model_id} was ended by a person and waits to be placed by one")
                return None
            if attempt.there_s is not None and now_s >= attempt.retry_at_s:
                waited = self._at_once or now_s - attempt.there_s >= self.patience.settle_s + self._turn_s(state)
                return index if waited and self._idle(index, state) else None
            away = attempt.away_s is not None and now_s - attempt.away_s >= self.patience.fallback_s
            if attempt.away_s is not None:
                self._once(f"{kept.model_id} waits for its nodes: {attempt.missing}")
            if not away and attempt.failures < 2:
                return None
        return None

    def _place(self, index: int, state: ClusterState) -> None:
        kept, attempt = self.plans[index], self._attempts[index]
        for instance in self._of(kept.model_id, state):  # of nodes that have left: exo would end them later
            self._history.forget(instance.instance_id)
            take_back(self.client, instance.instance_id, self.deadlines, self.timing)
        room = [each.instance_id for each in self._fallbacks_of(index, state)]
        for instance_id in room:
            self._history.forget(instance_id)
        names = " and ".join(stage.machine for stage in kept.plan.stages)
        what = "the fallback, " if index else ""
        self._say(f"placing {what}{kept.model_id} on {names}" + (", in place of a fallback" if room else ""))
        seed = _seed(kept, state)
        session = state.last_event
        try:
            applied = apply_plan(
                self.client,
                kept.plan,
                model_id=kept.model_id,
                nodes=kept.nodes,
                ending=room,
                make_id=_ids(seed),
                port=PORTS[0] + int(seed[:8], 16) % (PORTS[1] - PORTS[0]),
                force=kept.force,
                deadlines=self.deadlines,
                report=self._report,
                say=self._say,
                timing=self.timing,
            )
        except ExoKimiError as error:
            self._failed(index, error, session)
            return
        finally:
            self._at_once = False
            self._busy_s = None
        attempt.failures, attempt.retry_at_s, self._said = 0, _NEVER, ""
        self._say(f"{kept.model_id} answers, {format_seconds(applied.seconds)} after it was asked for")
        state = self.client.state()
        self._take_in(state)  # so that its end is noticed, however soon it comes
        if state.instance(applied.instance_id) is None and not _missing(kept, state):
            self._rest(kept.model_id)

    def _failed(self, index: int, error: ExoKimiError, session: int) -> None:
        kept, attempt = self.plans[index], self._attempts[index]
        if self._alive(kept.model_id, self.client.state()):  # another keeper, or a person, was before us
            return
        if isinstance(error, ExoDeletedError) and self.client.state().last_event >= session:
            self._rest(kept.model_id)
            return
        attempt.failures += 1
        wait_s = min(self.patience.retry_s * 2 ** (attempt.failures - 1), self.patience.retry_most_s)
        attempt.retry_at_s = self.timing.clock() + wait_s
        self._say(f"{kept.model_id} could not be placed: {_told(error)}; the next try in {format_seconds(wait_s)}")

    def _turn_s(self, state: ClusterState) -> float:
        ids = sorted(node.node_id for node in state.nodes)
        if not self._member:
            return len(ids) * self.patience.turn_s + self._guest_s
        return ids.index(self._own_id) * self.patience.turn_s

    def _idle(self, index: int, state: ClusterState) -> bool:
        """Whether what makes room has nothing to do, or was waited for long enough."""
        runners = [
            state.runners.get(shard.runner_id) for each in self._fallbacks_of(index, state) for shard in each.shards
        ]
        if not any(runner is not None and runner.phase == "RunnerRunning" for runner in runners):
            self._busy_s = None
            return True
        now_s = self.timing.clock()
        if self._busy_s is None:
            self._busy_s = now_s
        return now_s - self._busy_s >= self.patience.idle_s

    def _fallbacks_of(self, index: int, state: ClusterState) -> list[Instance]:
        """What keepers have placed until this plan can be."""
        models = [kept.model_id for kept in self.plans[index + 1 :]]
        return [each for each in state.instances if each.model_id in models and each.instance_id.startswith(KEPT)]

    def _end_twins(self, state: ClusterState) -> None:
        """End all but one of what keepers have placed of a model, the same one for every keeper."""
        for kept in self.plans:
            alive = sorted(each.instance_id for each in self._of(kept.model_id, state) if _whole(each, state))
            for instance_id in [each for each in alive if each.startswith(KEPT)][1:]:
                self._say(f"{kept.model_id} was placed by two keepers: ending {instance_id}")
                self._history.forget(instance_id)
                take_back(self.client, instance_id, self.deadlines, self.timing)

    @staticmethod
    def _of(model_id: str, state: ClusterState) -> list[Instance]:
        return [instance for instance in state.instances if instance.model_id == model_id]

    def _alive(self, model_id: str, state: ClusterState) -> bool:
        """Whether an instance of it is there, whoever placed it, with all of its nodes."""
        return any(_whole(instance, state) for instance in self._of(model_id, state))

    def _report(self, progress: Sequence[LoadingProgress]) -> None:
        loading = [f"{each.name} {each.phase}" for each in progress]
        self._once(" | ".join(loading))

    def _once(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._say(line)


def _whole(instance: Instance, state: ClusterState) -> bool:
    """Whether all nodes of an instance are there."""
    return all(state.node(shard.node_id) is not None for shard in instance.shards)


def _seed(kept: KeptPlan, state: ClusterState) -> str:
    """What every keeper of a plan comes to at this moment, and never again: exo keeps the runners of what is gone."""
    told = [kept.model_id, kept.plan.to_json(), *sorted(state.runners), *sorted(node.node_id for node in state.nodes)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _ids(seed: str) -> MakeId:
    """Ids that follow from a seed, one after the other."""
    numbers = count()
    return lambda: KEPT + str(uuid5(NAMESPACE_OID, f"{seed} {next(numbers)}"))


def _missing(kept: KeptPlan, state: ClusterState) -> str:
    """What a plan's nodes lack to be placed on; empty when nothing."""
    try:
        assignments = assign_nodes(kept.plan, state, nodes=kept.nodes)
    except ExoPlacementError as error:
        return error.what
    lacking = [*unmeasured(assignments, state), *missing_links(assignments, state)]
    return lacking[0].partition(":")[0] if lacking else ""


def _told(error: ExoKimiError) -> str:
    found = f" ({error.found})" if error.found else ""
    return " ".join(f"{error.what}{found}".split())
