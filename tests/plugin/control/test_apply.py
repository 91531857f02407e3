"""Placing, watching and taking back, against a fake exo: each way in which the real one was seen not to get there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from exo_kimi.errors import ExoLoadError, ExoPlacementError, ExoRefusedError, PlanInfeasibleError, UsageError
from exo_kimi.plugin.control.apply import Applied, apply_plan
from exo_kimi.plugin.control.texts import applied_text, progress_line, status_text
from exo_kimi.plugin.control.watch import Deadlines

MODEL = "lab/kimi-k2-tiny"
STUDIO, MINI = "a" * 32, "b" * 32


@pytest.fixture
def apply(client_of: Any, plan_of: Any, clock: Any) -> Any:
    """Place a split of the tiny Kimi in a fake; its plan can be changed first."""

    def run(exo: Any, *, plan: Any = None, **options: Any) -> Applied:
        return apply_plan(client_of(exo), plan or plan_of(exo), timing=clock.timing, **options)

    return run


def layers_of(instance: dict[str, Any]) -> dict[str, tuple[int, int]]:
    assigned = instance["MlxRingInstance"]["shardAssignments"]
    shards = {runner: next(iter(shard.values())) for runner, shard in assigned["runnerToShard"].items()}
    return {
        node: (shards[run]["startLayer"], shards[run]["endLayer"]) for node, run in assigned["nodeToRunner"].items()
    }


def test_a_plan_is_placed_as_it_is_and_answers(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    applied = apply(exo)
    assert [layers_of(instance) for instance in exo.posted] == [{MINI: (0, 2), STUDIO: (2, 7)}]
    (shard, _) = exo.posted[0]["MlxRingInstance"]["shardAssignments"]["runnerToShard"].values()
    assert shard["PipelineShardMetadata"]["modelCard"]["contextLength"] == 4096  # the plan's
    assert applied.layers_seen == {"mini": 2, "studio": 5}
    assert applied.answer == "sea" and applied.seconds > 0
    assert exo.deleted == []
    assert "rank 1  studio  layers 2:7 (5, exo loaded 5)" in applied_text(applied)


def test_progress_is_told_node_by_node(make_exo: Any, apply: Any) -> None:
    told: list[str] = []
    apply(make_exo(), report=lambda progress: told.append(progress_line(progress)))
    assert told[:2] == ["mini Waiting | studio Waiting", "mini Idle | studio Idle"]
    assert "mini Loading 0/2 | studio Loading 0/5" in told
    assert told[-1] == "mini Ready | studio Ready"


def test_without_waiting_it_returns_when_exo_has_taken_it(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    applied = apply(exo, wait=False)
    assert applied.answer is None and list(exo.instances) == [applied.instance_id]
    assert "it is loading" in applied_text(applied)


def test_runners_of_older_instances_are_not_mistaken_for_ours(make_exo: Any, apply: Any) -> None:
    exo = make_exo(
        runners={"old": {"RunnerReady": {}}, "older": {"RunnerFailed": {"errorMessage": "x", "diagnostics": []}}}
    )
    assert apply(exo).layers_seen == {"mini": 2, "studio": 5}


def test_a_model_that_exo_does_not_know_is_made_known(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    apply(exo)
    assert exo.known == {MODEL}


def test_a_model_that_exo_cannot_know_is_told(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    with pytest.raises(ExoRefusedError, match="Failed to fetch model"):
        apply(exo, model_id="lab/kimi-k2-other")
    assert exo.posted == []


def test_an_older_exo_gives_the_card_with_its_previews(make_exo: Any, apply: Any) -> None:
    assert apply(make_exo(older=True)).answer == "sea"


def test_a_plan_for_another_model_is_refused(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    exo.cards[MODEL]["nLayers"] = 61
    with pytest.raises(ExoPlacementError, match="another model than exo has"):
        apply(exo)
    assert exo.posted == []


def test_a_plan_that_counts_the_ends_once_is_for_our_engine_only(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo, our_engine=True)
    for exos_own in ({"our_engine": False}, {"tensor": True}):
        with pytest.raises(UsageError, match="exo's own engine holds them on every node"):
            apply(exo, plan=plan, **exos_own)
    assert exo.posted == []
    assert apply(exo, plan=plan, our_engine=True).answer == "sea"


def test_the_plan_knows_its_engine_and_need_not_be_told(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    ours, theirs = plan_of(exo, our_engine=True), plan_of(exo)
    assert (ours.engine, theirs.engine) == ("exo-kimi", "exo")
    applied = apply(exo, plan=ours)
    assert applied.answer == "sea" and "`exo-kimi exo run`" in applied_text(applied)
    with pytest.raises(UsageError, match="made for exo's own engine, and --our-engine says"):
        apply(exo, plan=theirs, our_engine=True, replace=True)
    assert len(exo.posted) == 1


def test_a_plan_that_streams_says_what_a_node_must_be_started_with(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo, told = make_exo(), []
    plan = plan_of(exo, our_engine=True)
    last = replace(plan.stages[-1], expert_slots=3, expert_cache_bytes=4096)
    apply(exo, plan=replace(plan, stages=(*plan.stages[:-1], last)), say=told.append)
    wanted = f"{last.machine} reads experts from disk: start exo there with EXO_KIMI_EXPERT_CACHE=4096"
    assert [line for line in told if "disk" in line] == [wanted]


def test_a_machine_that_could_be_no_node_is_named(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo)
    exo.nodes[0].name, exo.nodes[0].chip = "somebody", "Apple M9"
    with pytest.raises(ExoPlacementError, match=r"cannot tell which node studio is(.|\n)*--node studio=NODE"):
        apply(exo, plan=plan)


def test_memory_that_a_node_lacks_is_told_before_anything_is_sent(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo)
    exo.nodes[1].free_bytes = 1 << 20
    with pytest.raises(ExoPlacementError, match=r"mini needs(.|\n)*bytes\) short"):
        apply(exo, plan=plan)
    assert exo.posted == []


def test_an_instance_of_the_model_is_in_the_way_until_replaced(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    first = apply(exo)
    with pytest.raises(ExoPlacementError, match=f"placed already(.|\n)*{first.instance_id}(.|\n)*--replace"):
        apply(exo)
    second = apply(exo, replace=True)
    assert list(exo.instances) == [second.instance_id]


def test_what_serves_goes_on_when_the_new_plan_cannot_fit(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    first, plan = apply(exo), plan_of(exo, split=(4, 3))
    exo.nodes[1].total_bytes = exo.nodes[1].free_bytes = 1 << 20
    with pytest.raises(ExoPlacementError, match=r"mini needs(.|\n)*short"):
        apply(exo, plan=plan, replace=True, nodes={"mini": "mini"})
    assert list(exo.instances) == [first.instance_id] and exo.deleted == []


def test_memory_of_what_is_replaced_is_counted_back(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo, split=(4, 3))
    exo.held_bytes = {MINI: exo.nodes[1].free_bytes - (1 << 20), STUDIO: exo.nodes[0].free_bytes - (1 << 20)}
    first, second = apply(exo), apply(exo, plan=plan, replace=True)
    assert exo.deleted == [first.instance_id] and list(exo.instances) == [second.instance_id]


@pytest.mark.parametrize("older", [False, True])
def test_what_served_is_placed_again_when_the_new_plan_fails(
    make_exo: Any, apply: Any, plan_of: Any, client_of: Any, older: bool
) -> None:
    exo = make_exo(older=older, most_layers={STUDIO: 5})
    first, told = apply(exo), []
    with pytest.raises(
        ExoLoadError, match=r"runner on studio failed(.|\n)*what was there before is placed again"
    ) as caught:
        apply(exo, plan=plan_of(exo, split=(1, 6)), replace=True, say=told.append)
    again, *others = client_of(exo).state().instances
    assert not others and again.instance_id != first.instance_id and again.instance_id in str(caught.value)
    assert [layers_of(instance) for instance in exo.posted] == [
        {MINI: (0, 2), STUDIO: (2, 7)}, {MINI: (0, 1), STUDIO: (1, 7)}, {MINI: (0, 2), STUDIO: (2, 7)},
    ]  # fmt: skip
    assert client_of(exo).answer(MODEL, "Hello") == "sea"
    assert told[0] == f"ending {MODEL}, instance {first.instance_id}" and "and ready" in told[-1]


def test_what_served_is_placed_again_when_memory_turns_out_to_be_somebody_elses(
    make_exo: Any, apply: Any, plan_of: Any
) -> None:
    """Everything used counts as the older one's until it has ended; then it is measured."""
    exo = make_exo()
    apply(exo)
    plan = plan_of(exo, split=(4, 3))
    exo.nodes[1].free_bytes = 1 << 20
    with pytest.raises(ExoPlacementError, match=r"mini needs(.|\n)*"):
        apply(exo, plan=plan, replace=True)
    assert len(exo.instances) == 1 and layers_of(exo.posted[-1]) == {MINI: (0, 2), STUDIO: (2, 7)}


def test_what_cannot_be_placed_again_is_told(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    apply(exo)
    exo.fails = {STUDIO: "Insufficient Memory"}
    with pytest.raises(ExoLoadError, match="what was there before could not be placed again"):
        apply(exo, plan=plan_of(exo, split=(4, 3)), replace=True)


def test_an_interrupted_replacement_places_again_what_served(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    apply(exo)

    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(exo, plan=plan_of(exo, split=(4, 3)), replace=True, report=interrupt)
    assert len(exo.instances) == 1 and layers_of(exo.posted[-1]) == {MINI: (0, 2), STUDIO: (2, 7)}


def test_a_plan_over_a_limit_is_refused_unless_forced(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo)
    over = replace(plan, stages=(replace(plan.stages[0], headroom_bytes=-1), *plan.stages[1:]))
    with pytest.raises(PlanInfeasibleError, match=r"mini(.|\n)*\(1 bytes\)(.|\n)*--force"):
        apply(exo, plan=over)
    assert exo.posted == []
    assert apply(exo, plan=over, force=True).answer == "sea"


def test_nodes_that_have_just_come_are_waited_for(make_exo: Any, apply: Any, plan_of: Any, clock: Any) -> None:
    """exo lists a node some 15 s before its links."""
    told: list[str] = []
    exo = make_exo(unreached={(STUDIO, MINI), (MINI, STUDIO)}, linked=15)
    assert apply(exo, say=told.append).answer == "sea" and 10 < clock.now < 40
    assert len(told) == 1 and told[0].startswith("waiting for the nodes: mini has not reached studio")
    unlinked = make_exo(unreached={(STUDIO, MINI)})
    for wait in (True, False):
        began = clock.now
        with pytest.raises(ExoPlacementError, match=r"studio has not reached mini: check cable(.|\n)*--wait"):
            apply(unlinked, wait=wait)
        assert (clock.now - began > 40) is wait


def test_a_twin_that_comes_or_goes_does_not_rename_the_plans_nodes(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    exo.nodes[1].name = "studio"
    plan = plan_of(exo, split=(7,), nodes=["studio-169.254.1.1"])
    twin = exo.nodes.pop()
    exo.nodes[0].total_bytes += 1  # so that its memory does not tell
    assert [each.node_id for each in apply(exo, plan=plan).assignments] == [STUDIO]
    alone = make_exo()
    plan = plan_of(alone, split=(7,), nodes=["studio"])
    alone.nodes[0].total_bytes += 1
    twin.name = "studio-ii"
    alone.nodes.append(twin)
    assert [each.node_id for each in apply(alone, plan=plan).assignments] == [STUDIO]


def test_a_restarted_node_that_exo_lists_twice_is_waited_for(
    make_exo: Any, apply: Any, plan_of: Any, fake_exo: Any
) -> None:
    exo = make_exo()
    plan = plan_of(exo)
    exo.nodes.append(replace(exo.nodes[0], node_id="c" * 32))
    exo.leaves = {STUDIO: exo.looks + 8}
    assert [each.node_id for each in apply(exo, plan=plan).assignments] == [MINI, "c" * 32]


def test_a_node_without_the_files_is_named_and_the_instance_taken_back(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    exo.nodes[1].has.clear()
    with pytest.raises(ExoLoadError, match=r"mini does not have the model(.|\n)*lab--kimi-k2-tiny"):
        apply(exo)
    assert exo.instances == {} and len(exo.deleted) == 1


def test_a_node_that_leaves_while_loading_is_named(make_exo: Any, apply: Any) -> None:
    exo = make_exo(leaves={MINI: 6})
    with pytest.raises(ExoLoadError, match="mini left the cluster"):
        apply(exo)
    assert exo.instances == {}


def test_a_runner_that_fails_twice_is_told_with_its_message(make_exo: Any, apply: Any) -> None:
    exo = make_exo(fails={STUDIO: "Insufficient Memory"})
    with pytest.raises(ExoLoadError, match=r"runner on studio failed 2 times(.|\n)*Insufficient Memory"):
        apply(exo)
    assert exo.instances == {}


def test_an_instance_that_exo_gives_up_is_told_with_the_last_message(make_exo: Any, apply: Any) -> None:
    with pytest.raises(ExoLoadError, match=r"deleted the instance after its retries(.|\n)*studio: Insufficient Memory"):
        apply(make_exo(fails={STUDIO: "Insufficient Memory"}), deadlines=Deadlines(failures=9))


def test_an_instance_that_somebody_deletes_is_told(make_exo: Any, apply: Any) -> None:
    with pytest.raises(ExoLoadError, match="was deleted while it was loading"):
        apply(make_exo(vanishes=8))


def test_a_connection_that_hangs_names_the_node_to_restart(make_exo: Any, apply: Any, clock: Any) -> None:
    exo = make_exo(hangs={MINI})
    with pytest.raises(ExoLoadError, match=r"runner on mini hangs(.|\n)*restart exo on mini"):
        apply(exo)
    assert 60 < clock.now < 120
    assert exo.instances == {}


def test_a_node_that_loads_other_layers_is_caught(make_exo: Any, apply: Any) -> None:
    with pytest.raises(ExoLoadError, match=r"studio loads other layers(.|\n)*5 layers(.|\n)*4 layers"):
        apply(make_exo(loads={STUDIO: 4}))


def test_an_answer_that_breaks_off_takes_the_instance_back(make_exo: Any, apply: Any) -> None:
    exo = make_exo(breaks_off=True)
    with pytest.raises(ExoRefusedError, match="broke off"):
        apply(exo)
    assert exo.instances == {}


def test_an_interrupted_wait_takes_the_instance_back(make_exo: Any, apply: Any) -> None:
    exo = make_exo()

    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(exo, report=interrupt)
    assert exo.instances == {} and exo.waiting == []


def test_exo_going_away_is_told_and_what_may_remain(make_exo: Any, plan_of: Any, clock: Any) -> None:
    import httpx

    from exo_kimi.plugin.control.http import ExoClient

    exo = make_exo()
    plan = plan_of(exo)

    def die(request: httpx.Request) -> httpx.Response:
        if exo.posted and exo.looks > 8:
            raise httpx.ConnectError("Connection refused")
        return exo.handle(request)

    client = ExoClient("http://studio:52415", transport=httpx.MockTransport(die))
    with pytest.raises(ExoLoadError, match=r"exo went away(.|\n)*is still there"):
        apply_plan(client, plan, timing=clock.timing)


def test_a_tensor_parallel_plan_is_placed_as_exo_places_it(make_exo: Any, apply: Any) -> None:
    exo = make_exo()
    applied = apply(exo, tensor=True)
    assert layers_of(exo.posted[0]) == {STUDIO: (0, 7), MINI: (0, 7)}
    assert {
        tag for shard in exo.posted[0]["MlxRingInstance"]["shardAssignments"]["runnerToShard"].values() for tag in shard
    } == {"TensorShardMetadata"}
    assert "preview" not in applied.instance_id


def test_a_tensor_parallel_plan_needs_two_nodes(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    with pytest.raises(ExoPlacementError, match="no tensor-parallel placement"):
        apply(exo, plan=plan_of(exo, split=(7,)), tensor=True)


def test_a_tensor_parallel_slice_has_to_fit_the_smallest_node(make_exo: Any, apply: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo)
    exo.nodes[1].free_bytes = 1 << 20
    with pytest.raises(ExoPlacementError, match="mini is too small for an equal slice"):
        apply(exo, plan=plan, tensor=True)
    assert exo.posted == []


def test_the_status_tells_machines_links_and_instances(make_exo: Any, apply: Any, client_of: Any) -> None:
    exo = make_exo()
    apply(exo)
    lines = status_text(client_of(exo).state(), where="here").splitlines()
    assert lines[0] == "exo b5375f8ce or later at here: 2 nodes"
    assert "studio  Apple M3 Ultra  512.00 GiB, 480.00 GiB free" in lines
    assert "mini -> studio  thunderbolt 169.254.1.1" in lines
    assert "  rank 0  mini  layers 0:2  Ready" in lines


def test_the_status_tells_what_is_broken(make_exo: Any, apply: Any, client_of: Any) -> None:
    exo = make_exo()
    apply(exo)
    exo.nodes.pop()
    exo.unreached.add((STUDIO, MINI))
    text = status_text(client_of(exo).state(), where="here")
    assert "its node has left the cluster; `exo-kimi exo apply PLAN --replace` places anew" in text
    alone = make_exo(unreached={(STUDIO, MINI)})
    assert "studio -> mini  not reached" in status_text(client_of(alone).state(), where="here")
