"""A kept plan against a fake exo: placed again after every fault, and never against a person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.errors import ExoPlacementError, PlanInfeasibleError, UsageError
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.node.keeper import Keeper, KeptPlan
from exo_kimi.plugin.node.record import KeepRecord

MODEL, SMALL = "lab/kimi-k2-tiny", "lab/kimi-k2-small"
STUDIO, MINI = "a" * 32, "b" * 32


@dataclass
class Home:
    """A fake cluster with keepers, and what these have said."""

    exo: Any
    client_of: Callable[[Any], Any]
    clock: Any
    folder: Path
    plans: Sequence[KeptPlan]
    said: list[str] = field(default_factory=list)
    keepers: list[Keeper] = field(default_factory=list)

    def keeper(
        self, *, name: str = "here", plans: Sequence[KeptPlan] | None = None, member: bool = True, **options: Any
    ) -> Keeper:
        record = KeepRecord(self.folder / name / "kept.json")
        made = Keeper(
            self.client_of(self.exo),
            plans or self.plans,
            record=record,
            say=self.said.append,
            member=member,
            timing=self.clock.timing,
            **options,
        )
        self.keepers.append(made)
        return made

    def live(self, seconds: float) -> None:
        """Every keeper looks again and again, in turn."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            for keeper in self.keepers:
                keeper.step()
            self.clock.sleep(2.0)

    def placed(self) -> list[tuple[str, list[str]]]:
        """Model and nodes of what is placed, in rank order."""
        instances = self.client_of(self.exo).state().instances
        return [(instance.model_id, [shard.node_id for shard in instance.shards]) for instance in instances]

    def leave(self, node_id: str, *, deleted: bool = True) -> Any:
        """A machine that sleeps: exo forgets it, and its instances."""
        (gone,) = [node for node in self.exo.nodes if node.node_id == node_id]
        self.exo.nodes.remove(gone)
        if deleted:
            self.live(4)
            for key, instance in list(self.exo.instances.items()):
                if node_id in instance["MlxRingInstance"]["shardAssignments"]["nodeToRunner"]:
                    del self.exo.instances[key]
        return gone

    def heard(self, word: str) -> bool:
        return any(word in line for line in self.said)


@pytest.fixture
def home(make_exo: Any, plan_of: Any, client_of: Any, clock: Any, tiny: Path, tmp_path: Path) -> Home:
    """Two nodes; the wanted plan is on both, the fallback on the studio alone."""
    exo = make_exo()
    exo.cards[SMALL] = exo.cards[MODEL] | {"modelId": SMALL}
    for node in exo.nodes:
        node.has.add(SMALL)
    state = client_of(exo).state()
    small = exo_plan(state, tiny, model_id=SMALL, context=4096, nodes=["studio"]).plan
    return Home(exo, client_of, clock, tmp_path, [KeptPlan.of(plan_of(exo)), KeptPlan.of(small)])


BOTH = (MODEL, [MINI, STUDIO])
ALONE = (SMALL, [STUDIO])


def test_a_kept_plan_is_placed_once_its_nodes_are_there(home: Home) -> None:
    home.keeper()
    home.live(30)
    assert home.placed() == [BOTH] and len(home.exo.posted) == 1
    assert home.heard("answers, ")


@pytest.mark.parametrize("fresh_id", [False, True], ids=["slept", "restarted"])
def test_it_is_placed_again_when_a_node_is_back(home: Home, fresh_id: bool) -> None:
    home.keeper(plans=home.plans[:1])
    home.live(30)
    mini = home.leave(MINI)
    home.live(60)
    assert home.placed() == []
    assert home.heard("is gone: mini had left the cluster") and home.heard("waits for its nodes")
    home.exo.nodes.append(replace(mini, node_id="c" * 32) if fresh_id else mini)
    home.live(40)
    assert home.placed() == [(MODEL, ["c" * 32 if fresh_id else MINI, STUDIO])]


def test_what_exo_still_lists_of_a_node_that_left_is_ended_first(home: Home) -> None:
    home.keeper(plans=home.plans[:1])
    home.live(30)
    mini = home.leave(MINI, deleted=False)
    home.live(10)
    home.exo.nodes.append(replace(mini, node_id="c" * 32))
    home.live(30)
    assert home.placed() == [(MODEL, ["c" * 32, STUDIO])] and len(home.exo.deleted) == 1


def test_both_nodes_back_after_a_power_cut(home: Home) -> None:
    home.keeper()
    home.live(30)
    nodes = list(home.exo.nodes)
    home.exo.nodes.clear()
    home.exo.instances.clear()
    home.exo.last_event = 0
    home.keepers.clear()  # power is out for the keeper too
    home.exo.nodes.extend(replace(node, node_id=node.node_id[:31] + "2") for node in nodes)
    home.keeper()
    home.live(30)
    assert home.placed() == [(MODEL, [MINI[:31] + "2", STUDIO[:31] + "2"])]


def test_a_new_master_that_knows_nothing_is_no_person(home: Home) -> None:
    home.keeper(plans=home.plans[:1])
    home.live(30)
    home.exo.instances.clear()
    home.exo.last_event = 0
    home.live(40)
    assert home.placed() == [BOTH] and home.heard("exo has another master")


def test_what_failed_until_exo_gave_it_up_is_tried_again(home: Home) -> None:
    home.keeper(plans=home.plans[:1])
    home.live(30)
    home.exo.fails[MINI] = "Insufficient Memory"
    for runner in home.exo.steps:
        home.exo.steps[runner] = 3  # it dies, and is started again five times
    home.live(44)
    home.exo.fails.clear()
    home.live(60)
    assert home.placed() == [BOTH] and home.heard("its runners failed until exo gave it up")


def test_a_fallback_serves_while_a_node_is_away_and_makes_room_when_it_is_back(home: Home) -> None:
    home.keeper()
    home.live(30)
    mini = home.leave(MINI)
    home.live(20)
    assert home.placed() == []  # a node that restarts is soon back
    home.live(60)
    assert home.placed() == [ALONE] and home.heard("placing the fallback, lab/kimi-k2-small on studio")
    home.exo.nodes.append(mini)
    home.live(40)
    assert home.placed() == [BOTH] and home.heard("in place of a fallback")


def test_a_fallback_finishes_what_it_is_asked_before_it_makes_room(home: Home) -> None:
    home.keeper()
    mini = home.leave(MINI, deleted=False)
    home.live(80)
    assert home.placed() == [ALONE]
    (fallback,) = home.client_of(home.exo).state().instances
    runner = fallback.shards[0].runner_id
    busy = True
    original = home.exo._advance

    def advance(instance: Any) -> None:
        original(instance)
        if busy and runner in home.exo.runners:
            home.exo.runners[runner] = {"RunnerRunning": {}}

    home.exo._advance = advance
    home.exo.nodes.append(mini)
    home.live(60)
    assert home.placed() == [ALONE]
    busy = False
    home.live(20)
    assert home.placed() == [BOTH]


def test_a_wanted_plan_that_fails_leaves_the_fallback_in_service_and_marked(home: Home) -> None:
    home.keeper()
    mini = home.leave(MINI, deleted=False)
    home.live(80)
    home.exo.fails[MINI] = "Insufficient Memory"
    home.exo.nodes.append(mini)
    home.live(60)
    assert home.placed() == [ALONE] and home.heard("could not be placed")
    home.exo.fails.clear()
    home.live(120)
    assert home.placed() == [BOTH]  # the one that was placed again is still known as a keeper's


def test_what_a_person_ends_stays_ended_over_restarts(home: Home) -> None:
    home.keeper()
    home.live(30)
    home.exo.instances.clear()
    home.live(120)
    assert home.placed() == [] and home.heard("somebody ended lab/kimi-k2-tiny")
    home.keepers.clear()
    home.keeper()
    home.live(120)
    assert home.placed() == [] and len(home.exo.posted) == 1


def test_what_a_person_ends_while_it_loads_stays_ended(home: Home) -> None:
    home.keeper(plans=home.plans[:1])
    home.exo.vanishes = 8
    home.live(20)
    home.exo.vanishes = None
    home.live(120)
    assert home.placed() == [] and len(home.exo.posted) == 1 and home.heard("somebody ended")


def test_what_a_person_ends_before_its_first_answer_stays_ended(home: Home) -> None:
    keeper = home.keeper(plans=home.plans[:1])
    original = home.exo._chat

    def end_it(request: Any) -> Any:
        home.exo.instances.clear()
        return original(request)

    home.exo._chat = end_it
    home.live(30)
    home.exo._chat = original
    home.live(120)
    assert home.placed() == [] and len(home.exo.posted) == 1 and home.heard("somebody ended")
    assert keeper.record.rests(MODEL)


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_what_a_person_ends_as_soon_as_it_answers_stays_ended(home: Home, looks: int) -> None:
    home.keeper(plans=home.plans[:1])
    original = home.exo._chat

    def answer(request: Any) -> Any:
        home.exo.vanishes = home.exo.looks + 1 + looks
        return original(request)

    home.exo._chat = answer
    home.live(30)
    home.exo.vanishes = None
    home.live(120)
    assert home.placed() == [] and len(home.exo.posted) == 1 and home.heard("somebody ended")


def test_what_a_person_places_is_left_and_kept_from_then(home: Home, plan_of: Any) -> None:
    home.keeper(plans=home.plans[:1])
    home.live(30)
    home.exo.instances.clear()
    home.live(30)
    apply_plan(home.client_of(home.exo), plan_of(home.exo, (3, 4)), timing=home.clock.timing)
    home.live(60)
    (instance,) = home.client_of(home.exo).state().instances
    assert [shard.end_layer for shard in instance.shards] == [3, 7]  # the person's own split
    mini = home.leave(MINI)
    home.live(10)
    home.exo.nodes.append(mini)
    home.live(40)
    assert home.placed() == [BOTH]


def test_a_persons_other_model_in_the_way_is_never_ended(home: Home) -> None:
    client = home.client_of(home.exo)
    apply_plan(client, home.plans[1].plan, timing=home.clock.timing)  # the fallback's model, placed by a person
    for node in home.exo.nodes:
        home.exo.held_bytes[node.node_id] = node.free_bytes
    home.keeper()
    home.live(120)
    assert home.placed() == [ALONE] and home.exo.deleted == []
    assert home.heard("could not be placed: this cluster cannot take the plan")


def test_what_a_restarted_node_goes_through_of_the_past_is_not_taken_for_now(home: Home) -> None:
    home.keeper(plans=home.plans[:1])
    home.live(30)
    home.keepers.clear()
    home.exo.own_id = "e" * 32  # the id that the node has now
    home.keeper(name="restarted", plans=home.plans[:1])
    home.live(10)
    home.exo.instances.clear()  # as a person did yesterday
    home.live(10)
    assert len(home.exo.posted) == 1 and home.heard("has not caught up") and not home.heard("somebody ended")
    home.exo.own_id = STUDIO
    home.live(30)
    assert home.placed() == [BOTH]


def test_keepers_on_every_node_place_once(home: Home) -> None:
    for name in ("one", "two", "guest"):
        home.keeper(name=name, member=name != "guest")
    home.live(60)
    assert home.placed() == [BOTH] and len(home.exo.posted) == 1


def test_a_keeper_that_makes_room_is_no_person_to_the_others(home: Home) -> None:
    for name in ("one", "two"):
        home.keeper(name=name)
    home.live(30)
    mini = home.leave(MINI)
    home.live(80)
    home.exo.nodes.append(mini)
    home.live(60)
    assert home.placed() == [BOTH] and not home.heard("somebody ended")
    home.leave(MINI)
    home.live(80)
    assert home.placed() == [ALONE]  # and neither rests


@pytest.mark.parametrize("differ", [False, True], ids=["same view", "views that differ"])
def test_keepers_that_meet_leave_one_instance(home: Home, differ: bool) -> None:
    one, two = home.keeper(name="one", plans=home.plans[:1]), home.keeper(name="two", plans=home.plans[:1])
    state = home.client_of(home.exo).state()
    one._place(0, state)
    held, home.exo.instances = home.exo.instances, {}  # as if both had looked before either had placed
    two._place(0, replace(state, runners={"another": None}) if differ else state)
    assert (home.exo.posted[0] == home.exo.posted[1]) is not differ
    home.exo.instances |= held
    home.live(20)
    assert home.placed() == [BOTH] and home.heard("placed by two keepers") is differ
    assert not home.heard("somebody ended")


def test_exo_that_is_not_there_is_told_once_and_waited_for(home: Home) -> None:
    keeper = home.keeper(plans=home.plans[:1])
    transport, keeper.client = keeper.client, home.client_of(make_silent())
    home.live(20)
    assert len([line for line in home.said if "exo cannot be asked" in line]) == 1
    keeper.client = transport
    home.live(20)
    assert home.placed() == [BOTH]


def make_silent() -> Any:
    """A fake whose every answer is that nobody is there."""
    import httpx

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    @dataclass
    class Silent:
        transport: Any = field(default_factory=lambda: httpx.MockTransport(refuse))

    return Silent()


def test_plans_that_cannot_be_kept_are_refused_at_once(home: Home, plan_of: Any) -> None:
    with pytest.raises(ExoPlacementError, match="two kept plans for one model"):
        home.keeper(plans=[home.plans[0], home.plans[0]])
    plan = plan_of(home.exo)
    stages = [replace(plan.stages[0], headroom_bytes=-1), *plan.stages[1:]]
    with pytest.raises(PlanInfeasibleError):
        KeptPlan.of(replace(plan, stages=tuple(stages)))
    with pytest.raises(ExoPlacementError, match="moon is no machine"):
        KeptPlan.of(plan, nodes={"moon": STUDIO})


def test_a_record_that_cannot_be_read_is_refused_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    for text in ("", "[]", '{"version": 9, "resting": []}', '{"version": 1, "resting": [1]}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="not a file of what a person has ended"):
            KeepRecord(path)
