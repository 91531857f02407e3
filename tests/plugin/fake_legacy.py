"""Modules in legacy exo's shape, as it was seen: enough of its node, engine and API for two nodes in one process.

Messages between nodes go through JSON and bytes, as gRPC's do. Each node gets modules of its own, for we bind classes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

OTHER = "llama-3.2-1b"
LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """As exo's; both ends included."""

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int

    def is_first_layer(self) -> bool:
        return self.start_layer == 0

    def is_last_layer(self) -> bool:
        return self.end_layer == self.n_layers - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Partition:
    """As exo's."""

    node_id: str
    start: float
    end: float


class Callbacks:
    """As exo's AsyncCallbackSystem: observers run at once, unguarded."""

    def __init__(self) -> None:
        self.observers: dict[str, list[Callable[..., None]]] = {}

    def register(self, name: str) -> Any:
        observers = self.observers.setdefault(name, [])
        return SimpleNamespace(on_next=observers.append)

    def deregister(self, name: str) -> None:
        self.observers.pop(name, None)

    def trigger_all(self, *arguments: Any) -> None:
        for observers in list(self.observers.values()):
            for observer in observers:
                observer(*arguments)


@dataclass
class Peer:
    """The other node, over bytes and JSON."""

    node: Any
    sent: list[tuple[Any, ...]] = field(default_factory=list)
    broken: bool = False
    frozen: bool = False

    def id(self) -> str:
        return str(self.node.id)

    async def send_tensor(self, shard: Any, tensor: Any, *, request_id: str, inference_state: Any) -> None:
        if self.broken:
            raise ConnectionError("the other side hung up")
        if self.frozen:
            await asyncio.Event().wait()
        raw = tensor.tobytes()
        assert len(raw) < LIMIT_BYTES
        copy = np.frombuffer(raw, np.dtype(str(tensor.dtype))).reshape(tensor.shape)
        self.sent.append((tensor.shape, str(tensor.dtype)))
        await self.node.process_tensor(shard, copy, request_id, json.loads(json.dumps(inference_state)))

    async def send_prompt(self, shard: Any, prompt: str, *, request_id: str, inference_state: Any) -> None:
        await self.node.process_prompt(shard, prompt, request_id, json.loads(json.dumps(inference_state)))

    async def send_opaque_status(self, request_id: str, status: str) -> None:
        if self.frozen:
            return
        self.node.on_opaque_status.trigger_all(request_id, status)


def make_modules() -> dict[str, ModuleType]:
    """Fresh modules, with classes that no other node shares."""

    class MLXDynamicShardInferenceEngine:
        def __init__(self, shard_downloader: Any) -> None:
            self.shard = self.model = self.tokenizer = None
            self.caches: dict[str, Any] = {}
            self.session: dict[str, Any] = {}
            self.sampler_params, self.sampler = None, None
            self._mlx_thread = ThreadPoolExecutor(max_workers=1)
            self._shard_lock = asyncio.Lock()

        async def ensure_shard(self, shard: Any) -> None:
            self.shard, self.model, self.tokenizer = shard, "exo's own", SimpleNamespace(eos_token_id=1)

        async def infer_tensor(
            self, request_id: str, shard: Any, input_data: Any, inference_state: Any = None
        ) -> tuple[Any, Any]:
            await self.ensure_shard(shard)
            return np.array([[[0.0, 0.0, 1.0]]], np.float32), None

        async def sample(self, x: Any, temp: float = 0.0, top_p: float = 1.0) -> Any:
            raise RuntimeError("There is no Stream(cpu, 0) in current thread.")

    class RingMemoryWeightedPartitioningStrategy:
        def partition(self, topology: Any) -> list[Partition]:
            return [Partition(node_id, 0.0, 1.0) for node_id, _ in topology.all_nodes()]

    class ChatGPTAPI:
        def __init__(self, node: Any) -> None:
            self.node = node
            self.token_queues: dict[str, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
            self.response_timeout, self.default_model, self.system_prompt = 20, OTHER, None

        async def handle_post_chat_completions(self, request: Any) -> Any:
            return "exo's own answer"

        async def run(self, host: str = "0.0.0.0", port: int = 52415) -> tuple[str, int]:
            return host, port

    async def resolve_tokenizer(repo_id: Any) -> Any:
        return f"exo's tokenizer of {repo_id}"

    models = _module("exo.models", model_cards={OTHER: {"layers": 16, "repo": {}}}, pretty_name={})

    def get_repo(model_id: str, inference_engine_classname: str) -> Any:
        return models.model_cards[model_id]["repo"].get(inference_engine_classname)

    def get_supported_models(supported_inference_engine_lists: Any = None) -> list[str]:
        return list(models.model_cards)

    models.get_repo, models.get_supported_models = get_repo, get_supported_models
    numpy_as_mx = SimpleNamespace(array=np.array)
    made = [
        _module("exo"),
        models,
        _module("exo.inference.shard", Shard=Shard),
        _module(
            "exo.inference.mlx.sharded_inference_engine", MLXDynamicShardInferenceEngine=MLXDynamicShardInferenceEngine
        ),
        _module("exo.orchestration.node", Node=_node_class()),
        _module(
            "exo.topology.ring_memory_weighted_partitioning_strategy",
            RingMemoryWeightedPartitioningStrategy=RingMemoryWeightedPartitioningStrategy,
        ),
        _module("exo.topology.partitioning_strategy", Partition=Partition),
        _module("exo.topology.topology", PeerConnection=PeerConnection),
        _module("exo.download.new_shard_download", get_supported_models=get_supported_models),
        _module(
            "exo.api.chatgpt_api",
            resolve_tokenizer=resolve_tokenizer,
            ChatGPTAPI=ChatGPTAPI,
            web=SimpleNamespace(json_response=JsonResponse, StreamResponse=StreamResponse),
        ),
        _module("exo.networking.grpc.grpc_peer_handle", mx=numpy_as_mx),
        _module("exo.networking.grpc.grpc_server", mx=numpy_as_mx),
    ]
    return {module.__name__: module for module in made}


def make_main(modules: dict[str, ModuleType], node_id: str) -> ModuleType:
    """`exo.main` as its import leaves it: a node, an API and exo's own hook."""
    engine = modules["exo.inference.mlx.sharded_inference_engine"].MLXDynamicShardInferenceEngine(None)
    strategy = modules["exo.topology.ring_memory_weighted_partitioning_strategy"]
    node = modules["exo.orchestration.node"].Node(
        node_id, engine, strategy.RingMemoryWeightedPartitioningStrategy(), modules
    )
    seen: list[str] = []

    def preemptively_load_shard(request_id: str, opaque_status: str) -> None:
        seen.append(opaque_status)

    node.on_opaque_status.register("preemptively_load_shard").on_next(preemptively_load_shard)
    api = modules["exo.api.chatgpt_api"].ChatGPTAPI(node)
    node.on_token.register("api").on_next(lambda *told: api.token_queues[told[0]].put_nowait(told[1:]))
    return _module(
        "exo.main",
        node=node,
        api=api,
        preemptively_load_shard=preemptively_load_shard,
        resolve_tokenizer=modules["exo.api.chatgpt_api"].resolve_tokenizer,
        run=lambda: None,
        seen=seen,
        argv=list(sys.argv),
    )


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


@dataclass
class JsonResponse:
    """As aiohttp's."""

    body: Any
    status: int = 200


@dataclass
class StreamResponse:
    """As aiohttp's; `after` writes the client is gone."""

    status: int
    reason: str
    headers: dict[str, str]
    written: list[str] = field(default_factory=list)
    after: int | None = None
    ended: bool = False

    async def prepare(self, request: Any) -> None:
        self.after = request.gone_after

    async def write(self, data: bytes) -> None:
        if self.after is not None and len(self.written) >= self.after:
            raise ConnectionResetError("Cannot write to closing transport")
        self.written.append(data.decode())

    async def write_eof(self) -> None:
        self.ended = True


@dataclass
class Request:
    """As aiohttp's."""

    body: Any
    gone_after: int | None = None

    async def json(self) -> Any:
        return json.loads(self.body) if isinstance(self.body, str) else self.body


@dataclass(frozen=True)
class PeerConnection:
    """As exo's."""

    from_id: str
    to_id: str


class _Topology:
    """As a node of exo collects it: what it sees itself, and what its peers say that they see."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def all_nodes(self) -> list[tuple[str, None]]:
        return [(self._node.id, None), *((peer.id(), None) for peer in self._node.peers)]

    @property
    def peer_graph(self) -> dict[str, set[PeerConnection]]:
        nodes = [self._node, *(peer.node for peer in self._node.peers)]
        return {node.id: {PeerConnection(node.id, peer.id()) for peer in node.peers} for node in nodes}


def _node_class() -> type:
    class Node:
        def __init__(self, _id: str, engine: Any, strategy: Any, modules: dict[str, ModuleType]) -> None:
            self.id, self.inference_engine, self.partitioning_strategy = _id, engine, strategy
            self.modules = modules
            self.peers: list[Peer] = []
            self.topology = _Topology(self)
            self.on_token, self.on_opaque_status = Callbacks(), Callbacks()
            self.outstanding_requests: dict[str, str] = {}
            self.buffered: dict[str, list[int]] = defaultdict(list)
            self.max_generate_tokens, self.default_sample_temperature = 5, 0.0
            self.tasks: list[asyncio.Task[Any]] = []

        async def start(self, wait_for_peers: int = 0) -> None:
            self.started = wait_for_peers

        def new_engine(self) -> None:
            """As exo does whenever a peer comes or goes."""
            self.inference_engine = type(self.inference_engine)(None)

        async def process_prompt(
            self, base_shard: Any, prompt: str, request_id: Any = None, inference_state: Any = None
        ) -> None:
            shard = self.get_current_shard(base_shard)
            status = {"type": "node_status", "status": "start_process_prompt", "node_id": self.id, "prompt": prompt}
            told = json.dumps({**status, "shard": shard.to_dict(), "base_shard": base_shard.to_dict()})
            self.tasks.append(asyncio.create_task(self.broadcast_opaque_status(request_id, told)))
            await self._process_prompt(base_shard, prompt, request_id, inference_state)

        async def _process_prompt(
            self, base_shard: Any, prompt: str, request_id: Any = None, inference_state: Any = None
        ) -> Any:
            shard = self.get_current_shard(base_shard)
            if not shard.is_first_layer():
                first = self._peer(0)
                await first.send_prompt(shard, prompt, request_id=request_id, inference_state=inference_state)
                return None
            result, state = await self.inference_engine.infer_tensor(request_id, shard, np.array([[1]]), None)
            await self.process_inference_result(shard, result, request_id, state)
            return result

        async def process_inference_result(
            self, shard: Any, result: Any, request_id: Any = None, inference_state: Any = None
        ) -> None:
            finished, forward = False, result
            if shard.is_last_layer():
                token = await self.inference_engine.sample(result, temp=0.0)
                self.buffered[request_id].append(token.item())
                ended = token.item() == self.inference_engine.tokenizer.eos_token_id
                finished = ended or len(self.buffered[request_id]) >= self.max_generate_tokens
                forward = token.reshape(1, -1)
                self.trigger_on_token_callbacks(request_id, [token.item()], finished)
                self.tasks.append(asyncio.create_task(self.broadcast_result(request_id, [token.item()], finished)))
            if finished:
                self.outstanding_requests.pop(request_id, None)
                return
            following = self.get_partition_index(offset=1)
            self.tasks.append(
                asyncio.create_task(self.forward_tensor(shard, forward, request_id, following, inference_state))
            )

        def trigger_on_token_callbacks(self, request_id: str, tokens: list[int], is_finished: bool) -> None:
            self.on_token.trigger_all(request_id, tokens, is_finished)

        async def broadcast_result(self, request_id: str, result: list[int], is_finished: bool) -> None:
            for peer in self.peers:
                if not peer.frozen:
                    peer.node.on_token.trigger_all(request_id, result, is_finished)

        async def process_tensor(
            self, base_shard: Any, tensor: Any, request_id: Any = None, inference_state: Any = None
        ) -> None:
            shard = self.get_current_shard(base_shard)
            result, state = await self.inference_engine.infer_tensor(request_id, shard, tensor, inference_state)
            await self.process_inference_result(shard, result, request_id, state)

        async def forward_tensor(
            self, base_shard: Any, tensor: Any, request_id: str, target_index: int, inference_state: Any = None
        ) -> None:
            peer = self._peer(target_index)
            shard = self.get_current_shard(base_shard, target_index)
            if peer is None:
                await self.process_tensor(shard, tensor, request_id, inference_state)
            else:
                await peer.send_tensor(shard, tensor, request_id=request_id, inference_state=inference_state)

        def get_partition_index(self, offset: int = 0) -> int:
            ids = [each.node_id for each in self.partitioning_strategy.partition(self.topology)]
            return (ids.index(self.id) + offset) % len(ids)

        def get_current_shard(self, base_shard: Any, index: int | None = None) -> Any:
            pieces = self.partitioning_strategy.partition(self.topology)
            piece = pieces[self.get_partition_index() if index is None else index]
            layers = base_shard.n_layers
            return Shard(base_shard.model_id, int(piece.start * layers), int(piece.end * layers) - 1, layers)

        async def broadcast_opaque_status(self, request_id: str, status: str) -> None:
            for peer in self.peers:
                if not peer.broken:
                    await peer.send_opaque_status(request_id, status)
            self.on_opaque_status.trigger_all(request_id, status)

        def _peer(self, index: int) -> Any:
            wanted = self.partitioning_strategy.partition(self.topology)[index].node_id
            return next((peer for peer in self.peers if peer.id() == wanted), None)

    return Node
