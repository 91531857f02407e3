"""A plan as an exo instance: a node for every stage, everything that exo does not check, and what is then sent.

exo takes gaps, overlaps and empty shards for an instance, becomes ready and answers wrong text: so nothing leaves this module
that has not been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from uuid import uuid4

from exo_kimi.errors import ExoPlacementError
from exo_kimi.planner.plan import Plan, PlanStage
from exo_kimi.planner.workload import RESERVE_BYTES
from exo_kimi.plugin.control.model_card import Card
from exo_kimi.plugin.control.state import ClusterState, Node
from exo_kimi.units import format_bytes

# A ring rank only talks to its neighbours; exo fills the others' places with this. Source: RFC 5737 TEST-NET-2.
NOBODY = {"ip": "198.51.100.1", "port": 0}
# As exo: the fastest cable first.
_PREFERENCE = {"thunderbolt": 0, "maybe_ethernet": 1, "ethernet": 2, "wifi": 3, "unknown": 4}
MakeId = Callable[[], str]
PORTS = (49153, 65535)  # of exo's rings
# An instance that a keeper has placed begins with it, so that every keeper, and a person in exo's dashboard, can tell.
KEPT = "kept-"


def new_id() -> str:
    """A fresh id, as exo makes them."""
    return str(uuid4())


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAssignment:
    """A stage on a node. `need_bytes` is what it will hold beside what runs there already."""

    node_id: str
    name: str
    start_layer: int
    end_layer: int
    need_bytes: int

    @property
    def layers(self) -> int:
        """How many layers it holds."""
        return self.end_layer - self.start_layer


def assign_nodes(
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
    check_machines(plan, given)
    named = {stage.machine: state.find(given.get(stage.machine, stage.machine)) for stage in plan.stages}
    taken = [node.node_id for node in named.values() if node is not None]
    for stage in plan.stages:
        if named[stage.machine] is None and stage.machine not in given:
            named[stage.machine] = node = _alike(stage, plan, named, state, taken)
            taken += [node.node_id] if node is not None else []
    missing = [stage for stage in plan.stages if named[stage.machine] is None]
    if missing:
        raise _no_node(missing[0], given.get(missing[0].machine, missing[0].machine), state)
    return tuple(_assignment(stage, node, state) for stage in plan.stages if (node := named[stage.machine]) is not None)


def check_machines(plan: Plan, nodes: Mapping[str, str]) -> None:
    """Refuse a node that is given for a machine which the plan does not have.

    Raises:
        ExoPlacementError: with the plan's machines.
    """
    strangers = sorted(set(nodes) - {stage.machine for stage in plan.stages})
    if strangers:
        raise ExoPlacementError(
            f"{strangers[0]} is no machine of the plan",
            expected=", ".join(stage.machine for stage in plan.stages),
            where="--node",
        )


def check_assignments(assignments: Sequence[NodeAssignment], state: ClusterState, card: Card) -> None:
    """Refuse what exo would not.

    Args:
        assignments: first layers first; the place is the rank.
        state: the cluster now.
        card: of the model, with all its layers and bytes.

    Raises:
        ExoPlacementError: every reason at once: layers, nodes, links, memory.
    """
    problems = [
        *_layer_problems([(each.start_layer, each.end_layer) for each in assignments], int(card["nLayers"])),
        *_node_problems(assignments, state),
        *missing_links(assignments, state),
        *_memory_problems(assignments, state, int(card["storageSize"]["inBytes"])),
    ]
    if problems:
        raise ExoPlacementError(
            "this cluster cannot take the plan as it is:\n" + "\n".join(f"  - {problem}" for problem in problems),
            fix="`exo-kimi exo status` shows the cluster, `exo-kimi exo plan` plans for it as it is",
        )


def ring_instance(
    assignments: Sequence[NodeAssignment],
    state: ClusterState,
    card: Card,
    *,
    port: int,
    context: int | None = None,
    make_id: MakeId = new_id,
) -> dict[str, Any]:
    """A MlxRingInstance for `POST /instance`.

    Args:
        assignments: checked.
        state: for the addresses by which neighbours reach each other.
        card: full, as exo gave it or `make_card`.
        port: of the ring on every node.
        context: tokens of one sequence, as planned: written into every shard's card, where our engine and exo's API read it.
        make_id: of the instance and of every runner.

    Raises:
        ExoPlacementError: the result is not what was asked for (a mistake of this project).
    """
    world = len(assignments)
    card = card if context is None else {**card, "contextLength": context}
    runners = [make_id() for _ in assignments]
    shards = {
        runner: {
            "PipelineShardMetadata": {
                "modelCard": card,
                "deviceRank": rank,
                "worldSize": world,
                "startLayer": each.start_layer,
                "endLayer": each.end_layer,
                "nLayers": card["nLayers"],
            }
        }
        for rank, (runner, each) in enumerate(zip(runners, assignments, strict=True))
    }
    instance = {
        "MlxRingInstance": {
            "instanceId": make_id(),
            "shardAssignments": {
                "modelId": card["modelId"],
                "runnerToShard": shards,
                "nodeToRunner": {each.node_id: runner for runner, each in zip(runners, assignments, strict=True)},
            },
            "hostsByNode": {
                each.node_id: _hosts(rank, assignments, state, port) for rank, each in enumerate(assignments)
            },
            "ephemeralPort": port,
        }
    }
    check_instance(instance)
    return instance


def renamed(instance: Mapping[str, Any], *, make_id: MakeId = new_id) -> dict[str, Any]:
    """An instance with fresh ids, so that its runners can be told from all others; what a keeper placed stays a keeper's.

    Raises:
        ExoPlacementError: exo's preview itself does not add up.
    """
    (kind, body), *_ = instance.items()
    assigned = body["shardAssignments"]
    fresh = {runner: make_id() for runner in assigned["runnerToShard"]}
    mine = {
        kind: {
            **body,
            "instanceId": (KEPT if body["instanceId"].startswith(KEPT) else "") + make_id(),
            "shardAssignments": {
                **assigned,
                "runnerToShard": {fresh[runner]: shard for runner, shard in assigned["runnerToShard"].items()},
                "nodeToRunner": {node: fresh[runner] for node, runner in assigned["nodeToRunner"].items()},
            },
        }
    }
    check_instance(mine)
    return mine


def check_instance(instance: Mapping[str, Any]) -> None:
    """The last look at what is sent: ranks, world size, ranges, hosts and the one-to-one of nodes, runners and shards.

    Raises:
        ExoPlacementError: with every contradiction.
    """
    (_, body), *_ = instance.items()
    assigned = body["shardAssignments"]
    runner_of, tagged = assigned["nodeToRunner"], assigned["runnerToShard"]
    kinds = {next(iter(shard)) for shard in tagged.values()}
    shards = sorted((next(iter(shard.values())) for shard in tagged.values()), key=lambda shard: shard["deviceRank"])
    world = len(shards)
    problems = []
    if not world or sorted(runner_of.values()) != sorted(tagged):
        problems.append("nodes, runners and shards are not one to one")
    if [shard["deviceRank"] for shard in shards] != list(range(world)):
        problems.append(f"ranks are {[shard['deviceRank'] for shard in shards]}")
    if any(shard["worldSize"] != world for shard in shards):
        problems.append(f"world sizes are {[shard['worldSize'] for shard in shards]}, not {world}")
    ranges = [(shard["startLayer"], shard["endLayer"]) for shard in shards]
    if kinds == {"PipelineShardMetadata"}:
        problems += _layer_problems(ranges, shards[0]["nLayers"]) if shards else []
    elif kinds != {"TensorShardMetadata"} or any(each != (0, shards[0]["nLayers"]) for each in ranges):
        problems.append(f"shards of {', '.join(sorted(kinds))} with ranges {ranges}")
    hosts = body.get("hostsByNode")
    if hosts is not None and (set(hosts) != set(runner_of) or any(len(row) != world for row in hosts.values())):
        problems.append("hosts are not given for every pair of nodes")
    if problems:
        raise ExoPlacementError("an instance that contradicts itself", found="; ".join(problems))


def _layer_problems(ranges: Sequence[tuple[int, int]], layers: int) -> list[str]:
    text = ", ".join(f"{start}:{end}" for start, end in ranges) or "no stage"
    problems = [f"an empty stage in {text}"] if any(end <= start for start, end in ranges) else []
    ends = [0, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), layers]
    if ends != starts:
        problems.append(
            f"the model has {layers} layers, each to be placed once in the order of the ranks; found {text}"
        )
    return problems


def _node_problems(assignments: Sequence[NodeAssignment], state: ClusterState) -> list[str]:
    problems = [f"{each.name} is not in the cluster" for each in assignments if state.node(each.node_id) is None]
    ids = [each.node_id for each in assignments]
    return problems + [f"{each.name} has two stages" for each in assignments if ids.count(each.node_id) > 1]


def unmeasured(assignments: Sequence[NodeAssignment], state: ClusterState) -> list[str]:
    """Nodes whose memory exo has not measured yet: one sentence each."""
    return [
        f"{each.name} is not measured yet"
        for each in assignments
        if (node := state.node(each.node_id)) is not None and not node.total_bytes
    ]


def missing_links(assignments: Sequence[NodeAssignment], state: ClusterState) -> list[str]:
    """What the ring needs and exo has not seen working: one sentence each."""
    return [
        f"{one.name} has not reached {other.name}: check cable, addresses and firewall; "
        "a node that has just come is found within some 15 s, and --wait waits for that"
        for one, other in _neighbours(assignments)
        if state.node(one.node_id) and state.node(other.node_id) and (one.node_id, other.node_id) not in state.sockets
    ]


def _memory_problems(assignments: Sequence[NodeAssignment], state: ClusterState, storage_bytes: int) -> list[str]:
    problems = []
    for each in assignments:
        node = state.node(each.node_id)
        if node is not None and each.need_bytes > node.available_bytes:
            missing = each.need_bytes - node.available_bytes
            problems.append(
                f"{each.name} needs {format_bytes(each.need_bytes)} for layers {each.start_layer}:{each.end_layer} and has "
                f"{format_bytes(node.available_bytes)} free: {format_bytes(missing)} ({missing} bytes) short"
            )
    free = sum(node.available_bytes for node in state.nodes)
    if storage_bytes > free:
        problems.append(
            f"exo refuses a model of {format_bytes(storage_bytes)} with {format_bytes(free)} free on all nodes together"
        )
    return problems


def _neighbours(assignments: Sequence[NodeAssignment]) -> list[tuple[NodeAssignment, NodeAssignment]]:
    """Every ordered pair that the ring connects: each with the next, and the last with the first."""
    if len(assignments) < 2:
        return []
    pairs = [*pairwise(assignments), (assignments[-1], assignments[0])]
    both = [*pairs, *((other, one) for one, other in pairs)]
    return list(dict.fromkeys(both))


def _hosts(rank: int, assignments: Sequence[NodeAssignment], state: ClusterState, port: int) -> list[dict[str, Any]]:
    """By rank, how this node reaches each: itself as 0.0.0.0, neighbours by their best address, others not at all."""
    me, reached = assignments[rank], _neighbours(assignments)
    return [
        {"ip": "0.0.0.0", "port": port}
        if other == me
        else {"ip": _best_address(me, other, state), "port": port}
        if (me, other) in reached
        else dict(NOBODY)
        for other in assignments
    ]


def _best_address(one: NodeAssignment, other: NodeAssignment, state: ClusterState) -> str:
    node = state.node(other.node_id)
    kinds = node.interfaces if node else {}
    addresses = state.sockets.get((one.node_id, other.node_id), ())
    if not addresses:
        raise ExoPlacementError(f"{one.name} has not reached {other.name}")
    return min(addresses, key=lambda address: _PREFERENCE.get(kinds.get(address, "unknown"), 4))


def _assignment(stage: PlanStage, node: Node, state: ClusterState) -> NodeAssignment:
    # The plan's reserve is for what runs there anyway; only what was added to it is new.
    added_bytes = max(stage.reserve_bytes - RESERVE_BYTES, 0)
    return NodeAssignment(
        node_id=node.node_id,
        name=state.names[node.node_id],
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        need_bytes=stage.weight_bytes + stage.expert_cache_bytes + stage.kv_bytes + stage.scratch_bytes + added_bytes,
    )


def _alike(
    stage: PlanStage, plan: Plan, named: Mapping[str, Node | None], state: ClusterState, taken: Sequence[str]
) -> Node | None:
    """A node of the stage's chip and memory, where there are no more of those than stages for them."""
    nodes = [
        node
        for node in state.nodes
        if node.node_id not in taken and _same_chip(node.chip, stage.chip) and node.total_bytes == stage.memory_bytes
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


def _same_chip(one: str, other: str) -> bool:
    """Whether two names mean one chip: `Apple M3 Ultra` and `M3 Ultra`."""
    return one.lower().removeprefix("apple ") == other.lower().removeprefix("apple ")
