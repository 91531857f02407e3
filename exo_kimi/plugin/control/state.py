"""exo's cluster state as typed values: nodes, links, instances, runners, downloads.

Source: `GET /state` of exo v1.0.71 and b5375f8ce, as recorded from running nodes. Keys that are not read may change; one that
is read and missing means an exo that this project does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from exo_kimi.errors import ExoVersionError
from exo_kimi.plugin.control.model_card import Card

Generation = Literal["1.0.71", "b5375f8ce"]
_SILENT_S = 8.0
ANSWERS = ("RunnerReady", "RunnerRunning")
_NEEDED = ("instances", "runners", "downloads", "topology", "nodeIdentities", "nodeMemory", "nodeNetwork")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine as exo sees it. Bytes are 0 while exo has not measured them yet."""

    node_id: str
    name: str
    chip: str
    total_bytes: int
    available_bytes: int
    interfaces: Mapping[str, str]  # address -> wifi, ethernet, maybe_ethernet, thunderbolt or unknown
    heard_s: float = 0.0  # when exo last heard of it, as seconds of the epoch; 0 where exo does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one runner of an instance holds. `kind` is Pipeline, Tensor or Cfg."""

    runner_id: str
    node_id: str
    kind: str
    rank: int
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A placed model; shards in rank order. `placed` is the whole of it as exo tells it, to place the same again."""

    instance_id: str
    model_id: str
    shards: tuple[Shard, ...]
    placed: Mapping[str, Any]

    @property
    def card(self) -> Card:
        """exo's full card of the model."""
        (body,) = self.placed.values()
        shard = next(iter(body["shardAssignments"]["runnerToShard"].values()))
        return dict(_tagged(shard)[1]["modelCard"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """A runner's status: RunnerIdle, Connecting, Connected, Loading, Loaded, WarmingUp, Ready, Running, ShuttingDown, Shutdown
    or Failed. Layers are 0 unless it is loading."""

    phase: str
    layers_loaded: int = 0
    total_layers: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Whether a node has a model's files: DownloadCompleted, DownloadPending, DownloadOngoing or DownloadFailed."""

    status: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """One look at the whole cluster.

    Args:
        generation: which exo this is.
        nodes: in exo's order.
        sockets: (from, to) -> addresses of `to` that `from` has reached.
        rdma: pairs (from, to) with an RDMA link.
        instances: placed models.
        runners: by id; exo keeps entries of instances that are gone.
        downloads: (node, model) -> status.
        cards: full cards of models that were added by a user.
        last_event: number of the last event that made this state; it begins anew when exo elects another master, who knows
            nothing of what was placed before.
    """

    generation: Generation
    nodes: tuple[Node, ...]
    sockets: Mapping[tuple[str, str], tuple[str, ...]]
    rdma: frozenset[tuple[str, str]]
    instances: tuple[Instance, ...]
    runners: Mapping[str, Runner]
    downloads: Mapping[tuple[str, str], Download]
    cards: Mapping[str, Card]
    last_event: int = 0

    def node(self, node_id: str) -> Node | None:
        """A node by id."""
        return next((node for node in self.nodes if node.node_id == node_id), None)

    def instance(self, instance_id: str) -> Instance | None:
        """An instance by id."""
        return next((instance for instance in self.instances if instance.instance_id == instance_id), None)

    @property
    def names(self) -> Mapping[str, str]:
        """Node id -> a name that is unique: the friendly one, with the address where two share it.

        A restarted node has a new id and the old address, so that plans made before still find it.
        """
        friendly = [node.name for node in self.nodes]
        return {
            node.node_id: node.name if friendly.count(node.name) == 1 else f"{node.name}-{self._address_of(node)}"
            for node in self.nodes
        }

    def find(self, wanted: str) -> Node | None:
        """The node of an id or a name; None when there is none, or when it could be several.

        A name with an address stays that node's when the other of that name has left, and the plain name stays while a
        restarted node is listed twice, as long as only one of both can be meant.
        """
        exact = [node for node in self.nodes if wanted in (node.node_id, self.names[node.node_id])]
        alike = [
            node for node in self.nodes if wanted in (node.name, *(f"{node.name}-{a}" for a in self._addresses(node)))
        ]
        found = exact or alike
        return found[0] if len(found) == 1 else None

    def _address_of(self, node: Node) -> str:
        return min(self._addresses(node))

    def _addresses(self, node: Node) -> list[str]:
        """By which others have reached it; its own where nobody has."""
        reached = [address for (_, sink), found in self.sockets.items() if sink == node.node_id for address in found]
        return reached or list(node.interfaces) or [node.node_id[:8]]


def parse_state(raw: object, *, where: object) -> ClusterState:
    """The state of a running exo.

    Args:
        raw: the JSON of `GET /state`.
        where: the address, for messages.

    Raises:
        ExoVersionError: it lacks what every known exo 1.x has.
    """
    if not isinstance(raw, dict):
        raise _unknown("an object", type(raw).__name__, where)
    missing = [key for key in _NEEDED if key not in raw]
    if missing:
        raise _unknown(f"the keys {', '.join(_NEEDED)}", f"no {', '.join(missing)}", where)
    try:
        return _parse(raw)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise _unknown("the shapes of v1.0.71 or b5375f8ce", f"{type(error).__name__}: {error}", where) from error


def _parse(raw: Mapping[str, Any]) -> ClusterState:
    sockets: dict[tuple[str, str], tuple[str, ...]] = {}
    rdma = set()
    for source, sinks in raw["topology"]["connections"].items():
        for sink, edges in sinks.items():
            addresses = [_address(edge) for edge in edges if "sinkMultiaddr" in edge]
            if addresses:
                sockets[source, sink] = tuple(addresses)
            if len(addresses) < len(edges):
                rdma.add((source, sink))
    return ClusterState(
        generation="b5375f8ce" if "customModelCards" in raw else "1.0.71",
        nodes=_without_former([_node(_text(node_id), raw) for node_id in raw["topology"]["nodes"]]),
        sockets=sockets,
        rdma=frozenset(rdma),
        instances=tuple(_instance(entry) for entry in raw["instances"].values()),
        runners={runner_id: _runner(entry) for runner_id, entry in raw["runners"].items()},
        downloads=dict(_download(node_id, entry) for node_id, entries in raw["downloads"].items() for entry in entries),
        cards={model_id: dict(card) for model_id, card in raw.get("customModelCards", {}).items()},
        last_event=int(raw.get("lastEventAppliedIdx", 0)),
    )


def _without_former(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Nodes without what a restarted one was before: exo lists both for 30 s, and hears of every living node each second."""
    return tuple(
        node
        for node in nodes
        if not any(
            (node.name, node.chip, node.total_bytes, node.interfaces)
            == (other.name, other.chip, other.total_bytes, other.interfaces)
            and node.interfaces
            and other.heard_s - node.heard_s > _SILENT_S
            for other in nodes
        )
    )


def _node(node_id: str, raw: Mapping[str, Any]) -> Node:
    identity = raw["nodeIdentities"].get(node_id, {})
    memory = raw["nodeMemory"].get(node_id)
    network = raw["nodeNetwork"].get(node_id, {"interfaces": []})
    return Node(
        node_id=node_id,
        name=str(identity.get("friendlyName") or node_id),
        chip=str(identity.get("chipId") or "Unknown"),
        total_bytes=int(memory["ramTotal"]["inBytes"]) if memory else 0,
        available_bytes=int(memory["ramAvailable"]["inBytes"]) if memory else 0,
        interfaces={_text(each["ipAddress"]): _text(each["interfaceType"]) for each in network["interfaces"]},
        heard_s=_seconds(raw.get("lastSeen", {}).get(node_id)),
    )


def _seconds(moment: object) -> float:
    return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else 0.0


def _address(edge: Mapping[str, Any]) -> str:
    sink = edge["sinkMultiaddr"]
    return str(sink["ip_address"] if "ip_address" in sink else sink["ipAddress"])


def _instance(entry: Mapping[str, Any]) -> Instance:
    body = _tagged(entry)[1]
    assigned = body["shardAssignments"]
    nodes = {_text(runner_id): node_id for node_id, runner_id in assigned["nodeToRunner"].items()}
    shards = []
    for runner_id, tagged in assigned["runnerToShard"].items():
        kind, shard = _tagged(tagged)
        _ = dict(shard["modelCard"])  # `Instance.card` reads it later
        shards.append(
            Shard(
                runner_id=runner_id,
                node_id=nodes.get(runner_id, ""),
                kind=kind.removesuffix("ShardMetadata"),
                rank=_whole(shard["deviceRank"]),
                start_layer=_whole(shard["startLayer"]),
                end_layer=_whole(shard["endLayer"]),
            )
        )
    return Instance(
        instance_id=_text(body["instanceId"]),
        model_id=_text(assigned["modelId"]),
        shards=tuple(sorted(shards, key=lambda shard: shard.rank)),
        placed=entry,
    )


def _runner(entry: Mapping[str, Any]) -> Runner:
    phase, body = _tagged(entry)
    return Runner(
        phase=phase,
        layers_loaded=int(body.get("layersLoaded") or 0),
        total_layers=int(body.get("totalLayers") or 0),
        message=str(body.get("errorMessage") or ""),
    )


def _download(node_id: str, entry: Mapping[str, Any]) -> tuple[tuple[str, str], Download]:
    status, body = _tagged(entry)
    card = _tagged(body["shardMetadata"])[1]["modelCard"]
    return (node_id, _text(card["modelId"])), Download(status=status, message=str(body.get("errorMessage") or ""))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text expected, found {type(value).__name__}")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"a whole number expected, found {type(value).__name__}")
    return value


def _tagged(entry: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """exo's unions are objects with one key, the name of the kind."""
    if len(entry) != 1:
        raise ValueError(f"one tag expected, found {', '.join(entry) or 'none'}")
    return next(iter(entry.items()))


def _unknown(expected: str, found: str, where: object) -> ExoVersionError:
    return ExoVersionError(
        "an exo that this project does not know",
        expected=f"exo 1.x; its state with {expected}",
        found=found,
        where=where,
        fix="exo v1.0.71 and b5375f8ce were tested",
    )
