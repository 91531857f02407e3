"""A fake exo 1.x behind httpx: it answers in the recorded shapes of b5375f8ce and is as careless as the real one was seen to be.

Gaps and overlaps become ready; an instance is listed one look after it was asked for; runners of deleted instances stay
listed; a failed runner is created again five times, then the instance vanishes. Every `GET /state` is one step of time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import httpx

GIB = 1 << 30
CARD_KEYS = {
    "modelId", "storageSize", "nLayers", "hiddenSize", "supportsTensor", "numKeyValueHeads", "tasks", "components",
    "family", "quantization", "baseModel", "capabilities", "backends", "reasoningDialect", "contextLength", "usesCfg",
    "trustRemoteCode", "isCustom", "vision", "samplingDefaults",
}  # fmt: skip
SHARD_KEYS = {
    "modelCard", "deviceRank", "worldSize", "startLayer", "endLayer", "nLayers", "immediateException", "shouldTimeout",
}  # fmt: skip
PHASES = ("Idle", "Connecting", "Connected", "Loading", "Loaded", "WarmingUp", "Ready")
RETRIES = 5


@dataclass
class FakeNode:
    """A machine; `has` are the models whose files it has, `version` is that of exo-kimi inside exo, None for a bare exo."""

    node_id: str
    name: str
    ip: str
    chip: str = "Apple M3 Ultra"
    total_bytes: int = 512 * GIB
    free_bytes: int = 480 * GIB
    kind: str = "thunderbolt"
    heard: str = "2026-11-21T10:52:39.675797Z"
    has: set[str] = field(default_factory=set)
    version: str | None = "0.3.0"
    answers: bool = True


@dataclass
class FakeExo:
    """A cluster and its API. `client_options` is what `ExoClient` takes.

    Args:
        nodes: in exo's order.
        cards: model id -> card of every model that exo knows or could make a card of.
        unreached: (from, to) pairs without a link.
        fails: node id -> message with which its runner fails, always.
        most_layers: node id -> layers of which its runner can load no more, as if its memory ended there.
        held_bytes: node id -> memory that a runner there holds, whatever it is asked to load.
        linked: look at which the links of `unreached` are there after all.
        hangs: nodes whose runner never says that it connects.
        leaves: node id -> look at which it has left the cluster.
        vanishes: look at which somebody deletes every instance.
        loads: node id -> number of layers that its runner says it loads, whatever was asked.
        breaks_off: answers end before their first byte.
        reports: what nodes say of their runners, each with its `node_id`.
        older: state as v1.0.71 tells it.
        own_id: of the node that answers; the first one's when not given.
    """

    nodes: list[FakeNode]
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreached: set[tuple[str, str]] = field(default_factory=set)
    fails: dict[str, str] = field(default_factory=dict)
    most_layers: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    linked: int | None = None
    hangs: set[str] = field(default_factory=set)
    leaves: dict[str, int] = field(default_factory=dict)
    vanishes: int | None = None
    loads: dict[str, int] = field(default_factory=dict)
    breaks_off: bool = False
    reports: list[dict[str, Any]] = field(default_factory=list)
    older: bool = False
    known: set[str] = field(default_factory=set)
    looks: int = 0
    last_event: int = 0
    own_id: str = ""
    waiting: list[dict[str, Any]] = field(default_factory=list)
    instances: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    runners: dict[str, dict[str, Any]] = field(default_factory=dict)
    downloads: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    posted: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)

    def handle(self, request: httpx.Request) -> httpx.Response:
        path = unquote(request.url.path)
        if path in ("/exo-kimi", "/node_id"):
            return self._engine(path, request.url.host)
        routes: dict[tuple[str, str], Callable[[httpx.Request], httpx.Response]] = {
            ("GET", "/state"): self._state,
            ("GET", "/models"): self._models,
            ("POST", "/models/add"): self._add,
            ("GET", "/instance/previews"): self._previews,
            ("POST", "/instance"): self._create,
            ("POST", "/v1/chat/completions"): self._chat,
        }
        if request.method == "DELETE" and path.startswith("/instance/"):
            return self._delete(path.rpartition("/")[2])
        route = routes.get((request.method, path))
        return route(request) if route else error(404, "Not Found")

    def _engine(self, path: str, host: str) -> httpx.Response:
        """By the node whose address was asked; the first for any other name."""
        node = next((node for node in self.nodes if node.ip == host), self.nodes[0])
        if not node.answers:
            raise httpx.ConnectTimeout("frozen")
        if path == "/node_id":
            return httpx.Response(200, json=self.own_id or node.node_id)
        if node.version is None:
            return error(404, "Not Found")
        versions = {"exo_kimi": node.version, "mlx": "0.32.0", "mlx_lm": "0.31.3"}
        runners = [each for each in self.reports if each["node_id"] == node.node_id]
        runners = [{key: value for key, value in each.items() if key != "node_id"} for each in runners]
        return httpx.Response(200, json={"node_id": node.node_id, "versions": versions, "runners": runners})

    # --- what a look sees, and what happens meanwhile

    def _state(self, request: httpx.Request) -> httpx.Response:
        self.looks += 1
        self.last_event += 1
        gone = [node.node_id for node in self.nodes if self.looks >= self.leaves.get(node.node_id, self.looks + 1)]
        self.nodes = [node for node in self.nodes if node.node_id not in gone]
        if self.vanishes is not None and self.looks >= self.vanishes:
            self.instances.clear()
        if self.linked is not None and self.looks >= self.linked:
            self.unreached = set()
        for instance in list(self.instances.values()):
            self._advance(instance)
        for instance in self.waiting:
            self.instances[body_of(instance)["instanceId"]] = instance
        self.waiting = []
        return httpx.Response(200, json=self._snapshot())

    def _advance(self, instance: dict[str, Any]) -> None:
        body = body_of(instance)
        assigned = body["shardAssignments"]
        ids = {node.node_id for node in self.nodes}
        model_id = assigned["modelId"]
        for node_id in assigned["nodeToRunner"]:
            node = next((node for node in self.nodes if node.node_id == node_id), None)
            if node is None:
                continue
            has = model_id in node.has
            status = (
                ("DownloadCompleted", "") if has else ("DownloadFailed", f"Model files not found locally: {model_id}")
            )
            self.downloads[node_id, model_id] = status
        complete = all(
            self.downloads.get((node, model_id), ("",))[0] == "DownloadCompleted" for node in assigned["nodeToRunner"]
        )
        slowest = min(self.steps.get(runner, -1) for runner in assigned["nodeToRunner"].values())
        for node_id, runner in assigned["nodeToRunner"].items():
            if node_id not in ids:
                continue
            step = self.steps.get(runner, -1)
            shard = next(iter(assigned["runnerToShard"][runner].values()))
            layers = shard["endLayer"] - shard["startLayer"]
            fails = "Insufficient Memory" if layers > self.most_layers.get(node_id, layers) else self.fails.get(node_id)
            if fails is not None and step >= 3:
                self.failures[runner] = self.failures.get(runner, 0) + 1
                self.runners[runner] = {"RunnerFailed": {"errorMessage": fails, "diagnostics": []}}
                self.steps[runner] = -1
                if self.failures[runner] >= RETRIES:
                    del self.instances[body["instanceId"]]
                continue
            stuck = (step >= 0 and node_id in self.hangs) or (step >= 0 and not complete) or step > slowest
            if not stuck and step < len(PHASES) - 1:
                self.steps[runner] = step = step + 1
            layers = self.loads.get(node_id, layers)
            detail = {"layersLoaded": 0, "totalLayers": layers} if PHASES[max(step, 0)] == "Loading" else {}
            self.runners[runner] = {f"Runner{PHASES[max(step, 0)]}": detail}

    def _free_bytes(self, node: FakeNode) -> int:
        here = sum(
            node.node_id in body_of(instance)["shardAssignments"]["nodeToRunner"]
            for instance in self.instances.values()
        )
        return node.free_bytes - here * self.held_bytes.get(node.node_id, 0)

    def _snapshot(self) -> dict[str, Any]:
        ids = [node.node_id for node in self.nodes]
        connections: dict[str, dict[str, Any]] = {}
        for one in self.nodes:
            for other in self.nodes:
                if one is not other and (one.node_id, other.node_id) not in self.unreached:
                    edge = {"sinkMultiaddr": {"address": f"/ip4/{other.ip}/tcp/52415", "address_type": "ip4",
                                              "ip_address": other.ip, "port": 52415}}  # fmt: skip
                    connections.setdefault(one.node_id, {})[other.node_id] = [edge]
        downloads: dict[str, list[Any]] = {}
        for (node_id, model_id), (status, message) in self.downloads.items():
            shard = {"PipelineShardMetadata": {"modelCard": self.cards[model_id]}}
            detail: dict[str, Any] = {"nodeId": node_id, "shardMetadata": shard, "modelDirectory": ""}
            if message:
                detail["errorMessage"] = message
            downloads.setdefault(node_id, []).append({status: detail})
        state = {
            "instances": self.instances,
            "runners": self.runners,
            "downloads": downloads,
            "tasks": {},
            "lastSeen": {node.node_id: node.heard for node in self.nodes},
            "topology": {"nodes": ids, "connections": connections},
            "lastEventAppliedIdx": self.last_event,
            "nodeIdentities": {
                node.node_id: {
                    "modelId": "Mac Studio",
                    "chipId": node.chip,
                    "friendlyName": node.name,
                    "osVersion": "26.2",
                    "osBuildVersion": "Unknown",
                }
                for node in self.nodes
            },
            "nodeMemory": {
                node.node_id: {
                    "ramTotal": {"inBytes": node.total_bytes},
                    "ramAvailable": {"inBytes": self._free_bytes(node)},
                    "swapTotal": {"inBytes": 0},
                    "swapAvailable": {"inBytes": 0},
                }
                for node in self.nodes
            },
            "nodeNetwork": {
                node.node_id: {"interfaces": [{"name": "en0", "ipAddress": node.ip, "interfaceType": node.kind}]}
                for node in self.nodes
            },
            "nodeRdmaCtl": {},
        }
        if not self.older:
            custom = {model_id: self.cards[model_id] for model_id in self.known}
            state |= {"customModelCards": custom, "nodeBackends": {}, "instanceLinks": {}}
        return json.loads(json.dumps(state))  # type: ignore[no-any-return]

    # --- what a client asks for

    def _models(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, json={"object": "list", "data": [{"id": model_id} for model_id in sorted(self.known)]}
        )

    def _add(self, request: httpx.Request) -> httpx.Response:
        model_id = json.loads(request.content)["model_id"]
        if model_id not in self.cards:
            return error(400, "Failed to fetch model: Cannot connect to host")
        self.known.add(model_id)
        return httpx.Response(200, json={"id": model_id})

    def _previews(self, request: httpx.Request) -> httpx.Response:
        model_id = request.url.params["model_id"]
        if model_id not in self.known:
            return error(400, "Failed to load model card: Cannot connect to host")
        wanted = request.url.params.get_list("node_ids") or [node.node_id for node in self.nodes]
        previews = [
            {"model_id": model_id, "sharding": sharding, "instance_meta": meta, "instance": instance, "error": why}
            for sharding in ("Pipeline", "Tensor")
            for meta in ("MlxRing", "MlxJaccl")
            for instance, why in [self._preview(model_id, sharding, meta, wanted)]
        ]
        return httpx.Response(200, json={"previews": previews})

    def _preview(self, model_id: str, sharding: str, meta: str, wanted: list[str]) -> tuple[Any, str | None]:
        card = self.cards[model_id]
        if sum(self._free_bytes(node) for node in self.nodes) < card["storageSize"]["inBytes"]:
            return None, "No cycles found with sufficient memory"
        if meta == "MlxJaccl":
            return None, "Requested RDMA (MlxJaccl) but no RDMA-connected cycles available"
        layers, world = card["nLayers"], len(wanted)
        shards = {}
        for rank in range(world):
            ends = (0, layers) if sharding == "Tensor" else (rank * layers // world, (rank + 1) * layers // world)
            shards[f"preview-{rank}"] = {
                f"{sharding}ShardMetadata": {
                    "modelCard": card,
                    "deviceRank": rank,
                    "worldSize": world,
                    "immediateException": False,
                    "shouldTimeout": None,
                    "startLayer": ends[0],
                    "endLayer": ends[1],
                    "nLayers": layers,
                }
            }
        ips = {node.node_id: node.ip for node in self.nodes}
        hosts = {
            one: [{"ip": "0.0.0.0" if one == two else ips[two], "port": 50000} for two in wanted] for one in wanted
        }
        runners = {node: f"preview-{rank}" for rank, node in enumerate(wanted)}
        assigned = {"modelId": model_id, "runnerToShard": shards, "nodeToRunner": runners}
        body = {"instanceId": "preview", "shardAssignments": assigned, "hostsByNode": hosts, "ephemeralPort": 50000}
        return {"MlxRingInstance": body}, None

    def _create(self, request: httpx.Request) -> httpx.Response:
        instance = json.loads(request.content)["instance"]
        wrong = wrong_shape(instance)
        if wrong:
            return httpx.Response(
                422, json={"detail": [{"loc": ["body", "instance", wrong], "msg": "Extra inputs are not permitted"}]}
            )
        needed = self.cards[body_of(instance)["shardAssignments"]["modelId"]]["storageSize"]["inBytes"]
        free = sum(self._free_bytes(node) for node in self.nodes)
        if needed > free:
            return error(400, f"Insufficient memory to create instance. Required: {needed}, Available: {free}")
        self.posted.append(instance)
        self.waiting.append(instance)
        return httpx.Response(200, json={"message": "Command received.", "command_id": "1"})

    def _delete(self, instance_id: str) -> httpx.Response:
        if instance_id not in self.instances:
            return error(404, "Instance not found")
        del self.instances[instance_id]
        self.deleted.append(instance_id)
        return httpx.Response(200, json={"message": "Command received.", "instance_id": instance_id})

    def _chat(self, request: httpx.Request) -> httpx.Response:
        if self.breaks_off:
            return httpx.Response(200, content=b"")
        model_id = json.loads(request.content)["model"]
        placed = [body_of(instance)["shardAssignments"]["modelId"] for instance in self.instances.values()]
        if model_id not in placed:
            return error(404, f"No instance found for model {model_id}")
        message = {"role": "assistant", "content": "sea"}
        return httpx.Response(200, json={"choices": [{"index": 0, "message": message, "finish_reason": "length"}]})


def body_of(instance: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = next(iter(instance.values()))
    return body


def error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": "x", "param": None, "code": status}})


def wrong_shape(instance: dict[str, Any]) -> str | None:
    """The first key that exo's strict models would not take. Values are not looked at: nor does exo."""
    body = body_of(instance)
    wanted = {"instanceId", "shardAssignments", "hostsByNode", "ephemeralPort"}
    if set(instance) != {"MlxRingInstance"} or set(body) != wanted:
        return str(set(body) ^ wanted)
    assigned = body["shardAssignments"]
    if set(assigned) != {"modelId", "runnerToShard", "nodeToRunner"}:
        return str(set(assigned))
    for tagged in assigned["runnerToShard"].values():
        shard = next(iter(tagged.values()))
        if not set(shard) <= SHARD_KEYS or not set(shard["modelCard"]) <= CARD_KEYS:
            return str(set(shard) - SHARD_KEYS or set(shard["modelCard"]) - CARD_KEYS)
    return None
