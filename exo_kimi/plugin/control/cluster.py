"""exo's nodes as the planner's machines and links; what exo does not tell is assumed, and the plan says so."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from exo_kimi.errors import ExoPlacementError, UsageError
from exo_kimi.planner.machines.cluster import Cluster, NetworkLink, link_of_kind, make_cluster
from exo_kimi.planner.machines.hardware import Machine, Value, default_limit_bytes, machine_of_chip
from exo_kimi.plugin.control.state import ClusterState, Node
from exo_kimi.units import GIB

# For a chip without a profile: what the slowest Mac of the last years has. Only the order of splits hangs on it.
_ASSUMED_BANDWIDTH = 1.0e11
_ASSUMED_PREFILL = 1.0e12
_ASSUMED_OVERHEAD_S = 4.0e-4


def cluster_of_state(state: ClusterState) -> Cluster:
    """Every node that exo has measured, by its unique name, with the links that exo has seen working.

    Raises:
        ExoPlacementError: exo has measured no node yet.
    """
    nodes = [node for node in state.nodes if node.total_bytes]
    if not nodes:
        raise ExoPlacementError("exo has not measured any node yet", fix="wait some seconds and try again")
    machines = {node.node_id: machine_of_node(node, state) for node in nodes}
    links = {
        frozenset((machines[one.node_id].name, machines[other.node_id].name)): _link(one, other, machines, state)
        for one, other in combinations(nodes, 2)
    }
    return make_cluster(list(machines.values()), links)


def machine_of_node(node: Node, state: ClusterState) -> Machine:
    """A node's chip as its profile declares it; assumed values for a chip without one."""
    name = state.names[node.node_id]
    rdma = any(node.node_id in pair for pair in state.rdma)
    try:
        known = machine_of_chip(node.chip, round(node.total_bytes / GIB), name=name)
    except UsageError:
        return _unknown(node, name, rdma)
    return replace(known, memory_bytes=node.total_bytes, rdma=known.rdma and rdma)


def _unknown(node: Node, name: str, rdma: bool) -> Machine:
    said = f"no profile of {node.chip}; as a small Mac"
    limit_bytes = default_limit_bytes(node.total_bytes)
    return Machine(
        name=name,
        chip=node.chip,
        memory_bytes=node.total_bytes,
        limit=Value(number=limit_bytes, source="as Metal's default for this memory", status="assumed"),
        bandwidth=Value(number=_ASSUMED_BANDWIDTH, source=said, status="assumed"),
        prefill=Value(number=_ASSUMED_PREFILL, source=said, status="assumed"),
        overhead=Value(number=_ASSUMED_OVERHEAD_S, source=said, status="assumed"),
        rdma=rdma,
    )


def link_kind(one: Node, other: Node, state: ClusterState) -> str:
    """The best way that exo has seen from one node to another: thunderbolt, ethernet, wifi, unknown, or none."""
    kinds = [
        other.interfaces.get(address, "unknown") for address in state.sockets.get((one.node_id, other.node_id), ())
    ]
    order = ("thunderbolt", "ethernet", "maybe_ethernet", "wifi", "unknown")
    return next((kind.removeprefix("maybe_") for kind in order if kind in kinds), "none")


def _link(one: Node, other: Node, machines: dict[str, Machine], state: ClusterState) -> NetworkLink:
    if link_kind(one, other, state) == "thunderbolt":
        version = min(machines[one.node_id].thunderbolt, machines[other.node_id].thunderbolt)
        return link_of_kind(f"thunderbolt{max(version, 4)}")
    # exo tells a cable's kind and not its speed.
    kinds = {"ethernet": "ethernet10", "wifi": "wifi"}
    return link_of_kind(kinds.get(link_kind(one, other, state), "ethernet1"))
