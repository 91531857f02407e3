"""What is sent to exo: every layer once, every rank in place, every neighbour reachable; anything else is refused here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import ExoPlacementError
from exo_kimi.plugin.control.instance import (
    NOBODY,
    NodeAssignment,
    assign_nodes,
    check_assignments,
    check_instance,
    renamed,
    ring_instance,
)
from exo_kimi.plugin.control.state import ClusterState, Node

CARD = {"modelId": "lab/kimi-k2-tiny", "storageSize": {"inBytes": 1000}, "nLayers": 61, "hiddenSize": 7168}


def cluster(count: int, *, free: int = 1000, unreached: Sequence[tuple[str, str]] = ()) -> ClusterState:
    ids = [f"n{number}" for number in range(count)]
    nodes = tuple(
        Node(
            node_id=node,
            name=node.upper(),
            chip="Apple M3 Ultra",
            total_bytes=2000,
            available_bytes=free,
            interfaces={f"10.0.0.{number}": "wifi", f"169.254.0.{number}": "thunderbolt"},
        )
        for number, node in enumerate(ids)
    )
    sockets = {
        (one, two): (f"10.0.0.{ids.index(two)}", f"169.254.0.{ids.index(two)}")
        for one in ids
        for two in ids
        if one != two and (one, two) not in unreached
    }
    return ClusterState(
        generation="b5375f8ce",
        nodes=nodes,
        sockets=sockets,
        rdma=frozenset(),
        instances=(),
        runners={},
        downloads={},
        cards={},
    )


def assignments(*counts: int, need_bytes: int = 10) -> tuple[NodeAssignment, ...]:
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(
        NodeAssignment(
            node_id=f"n{index}", name=f"N{index}", start_layer=end - count, end_layer=end, need_bytes=need_bytes
        )
        for index, (end, count) in enumerate(zip(ends, counts, strict=True))
    )


def body(instance: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = instance["MlxRingInstance"]
    return found


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_an_instance_holds_every_layer_once_in_the_order_of_the_ranks(counts: list[int]) -> None:
    card = {**CARD, "nLayers": sum(counts)}
    chosen, state = assignments(*counts), cluster(len(counts))
    check_assignments(chosen, state, card)
    assigned = body(ring_instance(chosen, state, card, port=50000))["shardAssignments"]
    shards = [
        assigned["runnerToShard"][assigned["nodeToRunner"][each.node_id]]["PipelineShardMetadata"] for each in chosen
    ]
    assert [shard["deviceRank"] for shard in shards] == list(range(len(counts)))
    assert [layer for shard in shards for layer in range(shard["startLayer"], shard["endLayer"])] == list(
        range(sum(counts))
    )
    assert {shard["worldSize"] for shard in shards} == {len(counts)}


def test_the_planned_context_is_in_the_card_of_every_shard() -> None:
    card = {**CARD, "contextLength": 262_144}
    for context, written in ((4096, 4096), (None, 262_144)):
        assigned = body(ring_instance(assignments(44, 17), cluster(2), card, port=50000, context=context))
        shards = assigned["shardAssignments"]["runnerToShard"].values()
        assert [shard["PipelineShardMetadata"]["modelCard"]["contextLength"] for shard in shards] == [written] * 2
    assert card["contextLength"] == 262_144


@given(st.integers(2, 6))
def test_each_node_knows_itself_its_neighbours_and_nobody_else(count: int) -> None:
    chosen = assignments(*[1] * count)
    hosts = body(ring_instance(chosen, cluster(count), {**CARD, "nLayers": count}, port=50000))["hostsByNode"]
    for rank, each in enumerate(chosen):
        for other, host in enumerate(hosts[each.node_id]):
            distance = (other - rank) % count
            if distance == 0:
                assert host == {"ip": "0.0.0.0", "port": 50000}
            elif distance in (1, count - 1):
                assert host == {"ip": f"169.254.0.{other}", "port": 50000}, "Thunderbolt before wifi"
            else:
                assert host == NOBODY


def test_every_instance_and_every_runner_has_an_id_of_its_own() -> None:
    state, chosen = cluster(2), assignments(44, 17)
    two = [body(ring_instance(chosen, state, CARD, port=50000)) for _ in range(2)]
    ids = [each["instanceId"] for each in two] + [r for each in two for r in each["shardAssignments"]["runnerToShard"]]
    assert len(set(ids)) == 6


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ([(0, 43), (44, 61)], "found 0:43, 44:61"),
        ([(0, 45), (44, 61)], "found 0:45, 44:61"),
        ([(0, 44), (44, 62)], "found 0:44, 44:62"),
        ([(0, 61), (61, 61)], "an empty stage"),
        ([(44, 61), (0, 44)], "found 44:61, 0:44"),
        ([], "no stage"),
    ],
    ids=["gap", "overlap", "beyond the end", "empty", "not in order", "none"],
)
def test_what_exo_would_answer_wrong_text_for_is_refused(ranges: list[tuple[int, int]], told: str) -> None:
    wrong = [
        NodeAssignment(node_id=f"n{index}", name=f"N{index}", start_layer=start, end_layer=end, need_bytes=1)
        for index, (start, end) in enumerate(ranges)
    ]
    with pytest.raises(ExoPlacementError, match=told):
        check_assignments(wrong, cluster(2), CARD)


def test_all_reasons_are_told_at_once() -> None:
    state = cluster(2, free=400, unreached=[("n0", "n1")])
    chosen = [
        *assignments(44, 17, need_bytes=900),
        NodeAssignment(node_id="n9", name="N9", start_layer=61, end_layer=61, need_bytes=1),
    ]
    with pytest.raises(ExoPlacementError) as caught:
        check_assignments(chosen, state, CARD)
    text = str(caught.value)
    for reason in (
        "empty stage",
        "N9 is not in the cluster",
        "N0 has not reached N1",
        "500 bytes) short",
        "exo refuses a model",
    ):
        assert reason in text


def test_a_link_in_one_direction_is_not_enough() -> None:
    with pytest.raises(ExoPlacementError, match="N1 has not reached N0"):
        check_assignments(assignments(44, 17), cluster(2, unreached=[("n1", "n0")]), CARD)


def test_nodes_that_are_no_neighbours_need_no_link() -> None:
    check_assignments(assignments(20, 20, 20, 1), cluster(4, unreached=[("n0", "n2"), ("n2", "n0")]), CARD)


def test_one_node_needs_no_link() -> None:
    check_assignments(assignments(61), cluster(1), CARD)


def test_a_previewed_instance_gets_ids_of_our_own() -> None:
    preview = ring_instance(assignments(44, 17), cluster(2), CARD, port=50000, make_id=iter("abcdef").__next__)
    mine = renamed(preview)
    old, new = body(preview)["shardAssignments"], body(mine)["shardAssignments"]
    assert not set(old["runnerToShard"]) & set(new["runnerToShard"])
    assert [list(old["runnerToShard"].values()), list(old["nodeToRunner"])] == [
        list(new["runnerToShard"].values()),
        list(new["nodeToRunner"]),
    ]


def break_rank(shards: list[dict[str, Any]], instance: dict[str, Any]) -> None:
    shards[1]["deviceRank"] = 0


def break_world(shards: list[dict[str, Any]], instance: dict[str, Any]) -> None:
    shards[0]["worldSize"] = 3


def break_layers(shards: list[dict[str, Any]], instance: dict[str, Any]) -> None:
    shards[0]["endLayer"] = 43


def break_hosts(shards: list[dict[str, Any]], instance: dict[str, Any]) -> None:
    body(instance)["hostsByNode"]["n0"].pop()


def break_runner(shards: list[dict[str, Any]], instance: dict[str, Any]) -> None:
    body(instance)["shardAssignments"]["nodeToRunner"].pop("n1")


@pytest.mark.parametrize("damage", [break_rank, break_world, break_layers, break_hosts, break_runner])
def test_an_instance_that_contradicts_itself_never_leaves(damage: Any) -> None:
    instance = copy.deepcopy(ring_instance(assignments(44, 17), cluster(2), CARD, port=50000))
    shards = [next(iter(shard.values())) for shard in body(instance)["shardAssignments"]["runnerToShard"].values()]
    damage(shards, instance)
    with pytest.raises(ExoPlacementError, match="contradicts itself"):
        check_instance(instance)


def test_a_plans_machines_are_found_by_name(make_exo: Any, client_of: Any, plan_of: Any) -> None:
    exo = make_exo()
    found = assign_nodes(plan_of(exo), client_of(exo).state())
    assert [(each.name, each.start_layer, each.end_layer) for each in found] == [
        ("mini", 0, 2),
        ("studio", 2, 7),
    ]


def test_a_renamed_machine_is_found_by_chip_and_memory(make_exo: Any, client_of: Any, plan_of: Any) -> None:
    exo = make_exo()
    plan = plan_of(exo)
    exo.nodes[0].name = "atelier"
    assert [each.name for each in assign_nodes(plan, client_of(exo).state())] == ["mini", "atelier"]


def test_a_machine_that_could_be_two_nodes_is_asked_for(
    make_exo: Any, client_of: Any, plan_of: Any, fake_exo: Any
) -> None:
    exo = make_exo()
    plan = plan_of(exo, split=(7,))
    exo.nodes[1].name = "x"
    exo.nodes.append(copy.copy(exo.nodes[1]))
    exo.nodes[2].name, exo.nodes[2].node_id = "y", "c" * 32
    state = client_of(exo).state()
    with pytest.raises(ExoPlacementError, match=r"--node mini=NODE"):
        assign_nodes(plan, state)
    assert assign_nodes(plan, state, nodes={"mini": "y"})[0].node_id == "c" * 32
    with pytest.raises(ExoPlacementError, match="nobody is no machine of the plan"):
        assign_nodes(plan, state, nodes={"nobody": "y"})


def test_memory_counts_what_is_new_on_a_node(make_exo: Any, client_of: Any, plan_of: Any) -> None:
    """The reserve is for what runs there anyway, and exo's free memory is already without it."""
    exo = make_exo()
    plan = plan_of(exo)
    stage, each = plan.stages[0], assign_nodes(plan, client_of(exo).state())[0]
    assert each.need_bytes == stage.weight_bytes + stage.kv_bytes + stage.scratch_bytes
    assert plan.stages[1].weight_bytes + stage.weight_bytes > plan.model.total_bytes, "exo holds the ends on every rank"
