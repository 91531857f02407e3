"""Which stage of a plan sits on which node of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exo_kimi.errors import ExoPlacementError
from exo_kimi.planner.plan import Plan, PlanStage
from exo_kimi.planner.workload import RESERVE_BYTES
from exo_kimi.plugin.control.instance import NodeAssignment
from exo_kimi.plugin.control.state import ClusterState, Node


def seats_of_plan(
    plan: Plan, state: ClusterState, *, nodes: Mapping[str, str] | None = None
) -> tuple[NodeAssignment, ...]:
    """A node for every stage: as given, by name, or the only one of that chip and memory.

    Args:
        plan: what to place.
        state: the cluster now.
        nodes: machine of the plan -> name or id of a node.

    Raises:
        ExoPlacementError: a machine of the plan is not found, or could be several nodes.
    """
    given = dict(nodes or {})
    strangers = sorted(set(given) - {stage.machine for stage in plan.stages})
    if strangers:
        raise ExoPlacementError(
            f"{strangers[0]} is no machine of the plan",
            expected=", ".join(stage.machine for stage in plan.stages),
            where="--node",
        )
    named = {stage.machine: _named(given.get(stage.machine, stage.machine), state) for stage in plan.stages}
    taken = [node.node_id for node in named.values() if node is not None]
    for stage in plan.stages:
        if named[stage.machine] is None and stage.machine not in given:
            named[stage.machine] = node = _alike(stage, plan, named, state, taken)
            taken += [node.node_id] if node is not None else []
    missing = [stage for stage in plan.stages if named[stage.machine] is None]
    if missing:
        raise _no_node(missing[0], given.get(missing[0].machine, missing[0].machine), state)
    return tuple(_seat(stage, node, state) for stage in plan.stages if (node := named[stage.machine]) is not None)


def _seat(stage: PlanStage, node: Node, state: ClusterState) -> NodeAssignment:
    # The plan's reserve is for what runs there anyway; only what was added to it is new.
    added_bytes = max(stage.reserve_bytes - RESERVE_BYTES, 0)
    return NodeAssignment(
        node_id=node.node_id,
        name=state.names[node.node_id],
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        need_bytes=stage.weight_bytes + stage.kv_bytes + stage.scratch_bytes + added_bytes,
    )


def _named(wanted: str, state: ClusterState) -> Node | None:
    return next((node for node in state.nodes if wanted in (state.names[node.node_id], node.node_id)), None)


def _alike(
    stage: PlanStage, plan: Plan, named: Mapping[str, Node | None], state: ClusterState, taken: Sequence[str]
) -> Node | None:
    """A node of the stage's chip and memory, where there are no more of those than stages for them."""
    nodes = [
        node
        for node in state.nodes
        if node.node_id not in taken and same_chip(node.chip, stage.chip) and node.total_bytes == stage.memory_bytes
    ]
    open_stages = [
        other
        for other in plan.stages
        if named[other.machine] is None and (other.chip, other.memory_bytes) == (stage.chip, stage.memory_bytes)
    ]
    return nodes[0] if len(nodes) == len(open_stages) else None


def _no_node(stage: PlanStage, wanted: str, state: ClusterState) -> ExoPlacementError:
    return ExoPlacementError(
        f"cannot tell which node {wanted} is",
        expected=f"a node of that name, or one {stage.chip} with {stage.memory_bytes} bytes",
        found=", ".join(state.names.values()) or "no nodes",
        fix=f"--node {stage.machine}=NODE, or plan for this cluster: `exo-kimi exo plan`",
    )


def same_chip(one: str, other: str) -> bool:
    """Whether two names mean one chip: `Apple M3 Ultra` and `M3 Ultra`."""
    return one.lower().removeprefix("apple ") == other.lower().removeprefix("apple ")
