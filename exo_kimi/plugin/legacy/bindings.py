"""The names of legacy exo that we bind or lean on, checked by signature before anything is bound, and bound so that it can be
taken back.

Source: exo v0.0.15-alpha, read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from exo_kimi.plugin.bindings import Name

TESTED = "exo v0.0.15-alpha"
ENGINE_NAME = "MLXDynamicShardInferenceEngine"
_ENGINE = "exo.inference.mlx.sharded_inference_engine"
_NODE = "exo.orchestration.node"
_API = "exo.api.chatgpt_api"
ENGINE_METHODS = ("ensure_shard", "infer_tensor", "sample")
NODE_METHODS = (
    "get_current_shard",
    "process_prompt",
    "_process_prompt",
    "process_inference_result",
    "process_tensor",
    "forward_tensor",
)
API_METHODS = ("handle_post_chat_completions",)
MAIN_NAMES = ("node", "api", "preemptively_load_shard", "resolve_tokenizer")

_PROMPT = ("self", "base_shard", "prompt", "request_id", "inference_state")
_RESULT = ("self", "shard", "result", "request_id", "inference_state")
NAMES = (
    Name(module="exo.inference.shard", name="Shard", fields=("model_id", "start_layer", "end_layer", "n_layers")),
    Name(module="exo.models", name="model_cards"),
    Name(module="exo.models", name="pretty_name"),
    Name(module="exo.models", name="get_repo", parameters=("model_id", "inference_engine_classname")),
    Name(module=_ENGINE, name=f"{ENGINE_NAME}.__init__", parameters=("self", "shard_downloader")),
    Name(module=_ENGINE, name=f"{ENGINE_NAME}.ensure_shard", parameters=("self", "shard")),
    Name(
        module=_ENGINE,
        name=f"{ENGINE_NAME}.infer_tensor",
        parameters=("self", "request_id", "shard", "input_data", "inference_state"),
    ),
    Name(module=_ENGINE, name=f"{ENGINE_NAME}.sample", parameters=("self", "x", "temp", "top_p")),
    Name(module=_NODE, name="Node.get_current_shard", parameters=("self", "base_shard", "index")),
    Name(module=_NODE, name="Node.get_partition_index", parameters=("self", "offset")),
    Name(module=_NODE, name="Node.process_prompt", parameters=_PROMPT),
    Name(module=_NODE, name="Node._process_prompt", parameters=_PROMPT),
    Name(module=_NODE, name="Node.process_inference_result", parameters=_RESULT),
    Name(
        module=_NODE,
        name="Node.process_tensor",
        parameters=("self", "base_shard", "tensor", "request_id", "inference_state"),
    ),
    Name(
        module=_NODE,
        name="Node.forward_tensor",
        parameters=("self", "base_shard", "tensor", "request_id", "target_index", "inference_state"),
    ),
    Name(module=_NODE, name="Node.broadcast_opaque_status", parameters=("self", "request_id", "status")),
    Name(module=_NODE, name="Node.broadcast_result", parameters=("self", "request_id", "result", "is_finished")),
    Name(
        module=_NODE, name="Node.trigger_on_token_callbacks", parameters=("self", "request_id", "tokens", "is_finished")
    ),
    Name(module=_NODE, name="Node.start", parameters=("self", "wait_for_peers")),
    Name(
        module="exo.topology.ring_memory_weighted_partitioning_strategy",
        name="RingMemoryWeightedPartitioningStrategy.partition",
        parameters=("self", "topology"),
    ),
    Name(module="exo.topology.topology", name="PeerConnection", fields=("from_id", "to_id")),
    Name(module="exo.topology.partitioning_strategy", name="Partition", fields=("node_id", "start", "end")),
    Name(
        module="exo.download.new_shard_download",
        name="get_supported_models",
        parameters=("supported_inference_engine_lists",),
    ),
    Name(module="exo.networking.grpc.grpc_peer_handle", name="mx.array"),
    Name(module="exo.networking.grpc.grpc_server", name="mx.array"),
    Name(module=_API, name="resolve_tokenizer", parameters=("repo_id",)),
    Name(module=_API, name="ChatGPTAPI.run", parameters=("self", "host", "port")),
    Name(module=_API, name="ChatGPTAPI.handle_post_chat_completions", parameters=("self", "request")),
    Name(module=_API, name="web.json_response"),
    Name(module=_API, name="web.StreamResponse"),
)


class Bound:
    """What was bound, so that exo can be left as it was."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Bind an attribute of a module, class or object."""
        had = name in vars(owner)
        old = getattr(owner, name, None)
        self._undo.append(lambda: setattr(owner, name, old) if had else delattr(owner, name))
        setattr(owner, name, value)

    def item(self, owner: MutableMapping[str, Any], name: str, value: Any) -> None:
        """Bind a key of a mapping."""
        old = owner.get(name, self)
        self._undo.append(lambda: owner.pop(name) and None if old is self else owner.update({name: old}))
        owner[name] = value

    def undo(self) -> None:
        """Put back what was there, the last first."""
        while self._undo:
            self._undo.pop()()


def bind_engine(bound: Bound, make: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Give exo's engine class our methods; `make` gets its own."""
    _bind_class(bound, getattr(importlib.import_module(_ENGINE), ENGINE_NAME), ENGINE_METHODS, make)


def bind_node(bound: Bound, make: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Give exo's Node class our methods; `make` gets its own."""
    _bind_class(bound, importlib.import_module(_NODE).Node, NODE_METHODS, make)


def bind_api(bound: Bound, make: Callable[[Mapping[str, Any], Any], Mapping[str, Any]]) -> None:
    """Give exo's API class our methods; `make` gets its own, and aiohttp's `web`."""
    module = importlib.import_module(_API)
    _bind_class(bound, module.ChatGPTAPI, API_METHODS, lambda own: make(own, module.web))


def bind_partition(bound: Bound, pieces: Callable[[set[str]], list[tuple[str, float, float]]]) -> None:
    """Let the plan cut every model; `pieces` gets the ids of the nodes that exo sees."""
    strategy = importlib.import_module("exo.topology.ring_memory_weighted_partitioning_strategy")
    partition_of = importlib.import_module("exo.topology.partitioning_strategy").Partition

    def partition(self: Any, topology: Any) -> list[Any]:
        return [partition_of(*piece) for piece in pieces({node_id for node_id, _ in topology.all_nodes()})]

    bound.attribute(strategy.RingMemoryWeightedPartitioningStrategy, "partition", partition)


def bind_card(bound: Bound, name: str, *, layers: int, repo: str) -> None:
    """Make the model known to exo's API, and keep it out of exo's downloads: its files are here."""
    models = importlib.import_module("exo.models")
    bound.item(models.model_cards, name, {"layers": layers, "repo": {ENGINE_NAME: repo}})
    bound.item(models.pretty_name, name, f"{name} (exo-kimi)")
    downloads = importlib.import_module("exo.download.new_shard_download")
    known = downloads.get_supported_models

    def get_supported_models(supported_inference_engine_lists: Any = None) -> list[str]:
        return [each for each in known(supported_inference_engine_lists) if each != name]

    bound.attribute(downloads, "get_supported_models", get_supported_models)


def bind_tokenizer(bound: Bound, owner: MutableMapping[str, Any], repo: str, make: Callable[[], Any]) -> None:
    """Give our tokenizer to whoever asks for our model's; `owner` is the asking module's names."""
    own = owner["resolve_tokenizer"]

    async def resolve_tokenizer(repo_id: Any) -> Any:
        return make() if str(repo_id) == repo else await own(repo_id)

    bound.item(owner, "resolve_tokenizer", resolve_tokenizer)


def bind_arrays(bound: Bound) -> None:
    """Off Macs, exo's gRPC code calls numpy `mx`, and fails on every `inference_state` that is not empty."""
    for name in ("grpc_peer_handle", "grpc_server"):
        module = importlib.import_module(f"exo.networking.grpc.{name}")
        if not isinstance(module.mx.array, type):
            bound.attribute(module, "mx", importlib.import_module("mlx.core"))


def rename_loader() -> None:
    """mlx-lm calls its tokenizer's loader `load` now; legacy exo imports the old name and does not use it for our model."""
    utils = importlib.import_module("mlx_lm.tokenizer_utils")
    if not hasattr(utils, "load_tokenizer") and hasattr(utils, "load"):
        utils.load_tokenizer = utils.load  # type: ignore[attr-defined]


def _bind_class(
    bound: Bound, owner: type, names: tuple[str, ...], make: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> None:
    methods = make({name: getattr(owner, name) for name in names})
    for name in names:
        bound.attribute(owner, name, methods[name])
