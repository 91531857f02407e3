"""A plan as legacy exo follows it: borders that truncate to the cut, places that travel, and clear refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.errors import ProtocolError, UsageError
from exo_kimi.plugin.legacy.plan import inclusive, pin
from exo_kimi.plugin.legacy.tensors import TensorPosition, ids_of, position_of


def exo_ranges(pieces: list[tuple[str, float, float]], layers: int) -> list[tuple[int, int]]:
    """What legacy exo makes of fractions: both ends truncated, the last piece to the end."""
    ranges = [(int(start * layers), int(end * layers) - 1) for _, start, end in pieces]
    return [*ranges[:-1], (ranges[-1][0], layers - 1)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_exo_finds_exactly_the_plans_layers(legacy_shapes: Any, split: list[int]) -> None:
    plan = legacy_shapes.plan_of_shape(tuple(split), layers=sum(split))
    pinned = pin(plan, node_id="node1")
    pieces = pinned.pieces(set(pinned.node_ids))
    assert exo_ranges(pieces, sum(split)) == [inclusive(*each) for each in plan.ranges]
    assert [pinned.range_of(node_id) for node_id in pinned.node_ids] == [inclusive(*each) for each in plan.ranges]
    assert pieces[0][1] == 0.0 and pieces[-1][2] == 1.0


def test_every_cut_of_61_layers_is_exact(legacy_shapes: Any) -> None:
    for cut in range(1, 61):
        plan = legacy_shapes.plan_of_shape((cut, 61 - cut), layers=61)
        pieces = pin(plan, node_id="node1").pieces({"node1", "node2"})
        assert exo_ranges(pieces, 61) == [(0, cut - 1), (cut, 60)]


def test_while_nodes_are_away_the_others_share_everything(legacy_shapes: Any) -> None:
    pinned = pin(legacy_shapes.plan_of_shape((3, 2, 2)), node_id="node2")
    assert pinned.pieces({"node2"}) == [("node2", 0.0, 1.0)]
    assert pinned.pieces(set()) == [("node2", 0.0, 1.0)]
    two = pinned.pieces({"node1", "node3", "a stranger"})
    assert [node for node, _, _ in two] == ["node1", "node3"]
    assert exo_ranges(two, 5) == [(0, 2), (3, 4)]


def test_a_node_that_is_not_in_the_plan_is_told_who_is(legacy_shapes: Any) -> None:
    plan = legacy_shapes.plan_of_shape()
    with pytest.raises(UsageError, match="not in the plan") as refused:
        pin(plan, node_id=None)
    assert "--node-id node1" in str(refused.value) and "node1, node2" in str(refused.value)
    with pytest.raises(UsageError, match="not in the plan") as refused:
        pin(plan, node_id="studio")
    assert "--node node1=studio" in str(refused.value)
    with pytest.raises(UsageError, match="no machine of the plan"):
        pin(plan, node_id="node1", nodes=["studio=node1"])
    with pytest.raises(UsageError, match="one node id"):
        pin(plan, node_id="node1", nodes=["node2=node1"])
    with pytest.raises(UsageError, match="MACHINE=NODE_ID"):
        pin(plan, node_id="node1", nodes=["node2"])
    named = pin(plan, node_id="b", nodes=["node1=a", "node2=b"])
    assert named.own.start_layer == 5 and named.node_ids == ("a", "b")


def test_nodes_of_one_plan_know_each_other(legacy_shapes: Any) -> None:
    plan = legacy_shapes.plan_of_shape()
    one, two = (pin(plan, node_id=node_id) for node_id in ("node1", "node2"))
    assert one.digest == two.digest
    assert one.digest != pin(legacy_shapes.plan_of_shape((4, 3)), node_id="node1").digest
    assert one.digest != replace(one, name="other").digest


def test_a_place_survives_exos_json(legacy_shapes: Any) -> None:
    position = TensorPosition(plan="abc", offset=5, layer=3, more=True)
    assert position_of({**position.to_state(), "other": 1}) == position
    for wrong in (None, {}, {"exo_kimi": {"plan": "abc", "offset": "5", "layer": 3, "more": True}}):
        with pytest.raises(ProtocolError, match="no exo-kimi"):
            position_of(wrong)
    assert ids_of(None) is None and ids_of({"exo_kimi_ids": [1, 2]}) == [1, 2]
    with pytest.raises(ProtocolError, match="token ids"):
        ids_of({"exo_kimi_ids": ["1"]})
