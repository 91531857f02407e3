"""What one exo runner is to hold and whom it talks to, read from exo's instance.

`rank` is exo's word for our stage: rank order is layer order, and rank 0 leads.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zmq.utils import z85

from exo_kimi.checkpoint.text_files import read_kimi_config
from exo_kimi.errors import CheckpointError, ExoPlacementError
from exo_kimi.plugin.control.model_names import names_a_kimi
from exo_kimi.plugin.ours_alone import runs_on_ours_alone
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey, find_key

_NOBODY = ipaddress.ip_network("198.51.100.0/24")  # exo's filler for a node that is no neighbour (RFC 5737)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLayers:
    """The layers of one runner, and where it reaches the others.

    Args:
        instance_id: exo's, equal on all ranks.
        model_id: exo's.
        stage: this rank.
        ranges: half-open layers of every stage.
        nodes: exo's ids of the nodes, by rank.
        context: most tokens of a sequence, as the instance was planned; None where it does not say.
        listen: where this rank listens for others; None when it is alone.
        leader: where this rank reaches rank 0; None on rank 0.
        seen: where rank 0 reaches ranks 1, 2 and so on; empty on others.
        from_previous: where each of them is reached by the rank before it, which may be over another cable.
        neighbours: rank -> the IP address at which this rank sees it; exo's instance has only some.
        rdma_device: of this node, to the other one; None for an instance over addresses. An instance on RDMA names the address
            of rank 0 only: there the other rank says where it listens.
    """

    instance_id: str
    model_id: str
    stage: int
    ranges: tuple[tuple[int, int], ...]
    nodes: tuple[str, ...]
    context: int | None = None
    listen: Address | None = None
    leader: Address | None = None
    seen: tuple[Address, ...] = ()
    from_previous: tuple[Address, ...] = ()
    neighbours: tuple[tuple[int, str], ...] = ()
    rdma_device: str | None = None

    @property
    def stages(self) -> int:
        """How many ranks there are."""
        return len(self.ranges)

    @property
    def start_layer(self) -> int:
        """First layer of this rank."""
        return self.ranges[self.stage][0]

    @property
    def end_layer(self) -> int:
        """One past the last layer of this rank."""
        return self.ranges[self.stage][1]


def not_ours(bound_instance: Any, directory: Path | None) -> str | None:
    """Why exo's own engine should run this instance, or None when ours does. All ranks must come to the same answer.

    Args:
        bound_instance: exo's BoundInstance.
        directory: the model's files on this node, or None where they are still to come.
    """
    card = bound_instance.bound_shard.model_card
    if "kimi" not in str(card.family).lower() and not names_a_kimi(str(card.model_id)):
        return "not a Kimi"
    config = None
    if directory is not None and (directory / "config.json").exists():
        try:
            config = read_kimi_config(directory)
        except CheckpointError as error:
            return error.what
    if config is not None and runs_on_ours_alone(config) is not None:
        return None  # a placement that ours cannot take is refused by `connect`
    return _not_our_placement(bound_instance)


def check_placement(bound_instance: Any) -> None:
    """Refuse an instance of a model that exo's own engine cannot run either, placed in a way that ours does not take.

    Raises:
        ExoPlacementError: with the way.
    """
    reason = _not_our_placement(bound_instance)
    if reason is not None:
        raise ExoPlacementError(
            "this model is placed in a way that exo-kimi's engine does not take, and exo's own does not know it",
            expected="an instance over layers: TCP, or RDMA between two nodes",
            found=reason,
            where=bound_instance.bound_shard.model_card.model_id,
            fix="delete the instance and place it with `exo-kimi exo apply`",
        )


def _not_our_placement(bound_instance: Any) -> str | None:
    shards = bound_instance.instance.shard_assignments.runner_to_shard.values()
    if any(type(shard).__name__ != "PipelineShardMetadata" for shard in shards):
        return "placed with tensor parallelism"
    if type(bound_instance.instance).__name__ != "MlxRingInstance" and len(shards) > 2:
        return "placed on RDMA over more than two nodes, whose instances do not name all addresses"
    return None


def node_layers_of(bound_instance: Any) -> NodeLayers:
    """Read an instance that is ours.

    Raises:
        ExoPlacementError: the layers are not each on exactly one rank, or a rank has no address.
    """
    instance = bound_instance.instance
    assigned = instance.shard_assignments
    shards = {shard.device_rank: shard for shard in assigned.runner_to_shard.values()}
    ranges = tuple((shards[rank].start_layer, shards[rank].end_layer) for rank in sorted(shards))
    layers = bound_instance.bound_shard.n_layers
    ends = [0, *(end for _, end in ranges)]
    gapless = all(start == before < end for (start, end), before in zip(ranges, ends, strict=False))
    if sorted(shards) != list(range(len(assigned.runner_to_shard))) or not gapless or ends[-1] != layers:
        raise ExoPlacementError(
            "the instance does not place every layer exactly once, in rank order",
            expected=f"ranks from 0, layers 0 to {layers}",
            found=", ".join(f"{start}:{end}" for start, end in ranges),
            where=f"instance {instance.instance_id}",
            fix="delete the instance and place it with `exo-kimi exo apply`",
        )
    stage = bound_instance.bound_shard.device_rank
    own = NodeLayers(
        instance_id=str(instance.instance_id),
        model_id=str(bound_instance.bound_shard.model_card.model_id),
        stage=stage,
        ranges=ranges,
        nodes=_nodes_by_rank(instance),
        context=int(bound_instance.bound_shard.model_card.context_length) or None,
    )
    if own.stages == 1:
        return own
    if not hasattr(instance, "hosts_by_node"):
        return _on_rdma(own, instance)
    hosts = _hosts_by_rank(instance)
    return replace(
        own,
        listen=_listen_address(hosts, stage),
        leader=_address(hosts, stage, 0) if stage else None,
        seen=() if stage else tuple(_address(hosts, 0, other) for other in range(1, own.stages)),
        from_previous=() if stage else tuple(_address(hosts, other - 1, other) for other in range(1, own.stages)),
        neighbours=tuple((rank, host[0]) for rank, host in enumerate(hosts[stage]) if rank != stage and _is_real(host)),
    )


def with_address(own: NodeLayers, other: Address) -> NodeLayers:
    """Rank 0 of two, once the other has said where its stage listens."""
    return replace(own, seen=(other,), from_previous=(other,))


def _on_rdma(own: NodeLayers, instance: Any) -> NodeLayers:
    """One of two ranks on RDMA. exo's coordinator address is where rank 0 listens; exo's own group is not made.

    Source: exo `shared/types/worker/instances.py: MlxJacclInstance` and `master/placement_utils.py` at b5375f8ce.
    """
    host, _, port = str(instance.jaccl_coordinators[own.nodes[own.stage]]).rpartition(":")
    device = instance.jaccl_devices[own.stage][1 - own.stage]
    if device is None or not port.isdecimal():
        raise ExoPlacementError(
            "the instance is on RDMA and names no device or coordinator of this rank",
            expected="a device to the other rank, and IP:PORT of rank 0",
            found=f"{device}, {host}:{port}",
            where=f"instance {own.instance_id}",
            fix="delete the instance and place it with `exo-kimi exo apply`",
        )
    leader = Address(host, int(port))
    if own.stage == 0:
        return replace(own, listen=Address("0.0.0.0", leader.port), rdma_device=str(device))
    return replace(
        own,
        listen=Address("0.0.0.0", 0),
        leader=leader,
        neighbours=((0, leader.host),),
        rdma_device=str(device),
    )


def key_of(own: NodeLayers, *, environment_text: str | None) -> ClusterKey:
    """The cluster's key: the user's own, else one that follows from the instance.

    exo shows its instances to everybody who reaches its API, so the second keeps out strangers' accidents and nothing more,
    which is what exo's own links do. With EXO_KIMI_KEY or the default key file on every node, nobody else can join.
    """
    given = find_key(key_file=None, environment_text=environment_text)
    if given is not None:
        return replace(given, explicit=True)
    secret = hashlib.sha256(f"exo-kimi {own.instance_id}".encode()).digest()
    return ClusterKey.from_text(z85.encode(secret).decode("ascii"), where=f"instance {own.instance_id}")


def _hosts_by_rank(instance: Any) -> list[list[tuple[str, int]]]:
    """For each rank, what it sees of each rank, as (IP, port)."""
    hosts = instance.hosts_by_node
    return [[(str(host.ip), int(host.port)) for host in hosts[node]] for node in _nodes_by_rank(instance)]


def _nodes_by_rank(instance: Any) -> tuple[Any, ...]:
    assigned = instance.shard_assignments
    ranks = {assigned.runner_to_shard[runner].device_rank: node for node, runner in assigned.node_to_runner.items()}
    return tuple(ranks[rank] for rank in sorted(ranks))


def _listen_address(hosts: list[list[tuple[str, int]]], rank: int) -> Address:
    """The one address that all others see, else every interface."""
    seen = {row[rank][0] for other, row in enumerate(hosts) if other != rank and _is_real(row[rank])}
    port = hosts[rank][rank][1]
    return Address(seen.pop() if len(seen) == 1 else "0.0.0.0", port)


def _address(hosts: list[list[tuple[str, int]]], viewer: int, rank: int) -> Address:
    """Where a rank reaches another; through a third one's eyes if exo did not say (nodes that are no neighbours)."""
    rows = [hosts[viewer], *(row for other, row in enumerate(hosts) if other not in (viewer, rank))]
    found = next((row[rank] for row in rows if _is_real(row[rank])), None)
    if found is None:
        raise ExoPlacementError(
            f"the instance has no address of rank {rank}",
            expected="an address of every rank that some other rank sees",
            found=", ".join(row[rank][0] for row in rows),
            where="hostsByNode",
        )
    return Address(*found)


def _is_real(host: tuple[str, int]) -> bool:
    address = ipaddress.ip_address(host[0])
    return host[1] > 0 and not address.is_unspecified and address not in _NOBODY
