"""The names of exo that our engine binds or leans on, checked by signature before anything is bound.

Source: exo b5375f8ce and v1.0.71, read. An exo that differs from both is left as it is, and the reason is said.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A name of exo and what it must look like.

    Args:
        module: where it lives.
        name: of the function or class, or `Class.method`.
        parameters: of the function or constructor, `self` left out, or of the method with it; None when it is never called by
            us or for us.
        abstract: methods that a subclass must have, all of them.
        fields: fields that a model must have, among others.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None = None
    abstract: tuple[str, ...] | None = None
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exo:
    """One exo that our engine runs in.

    Args:
        tested: its name for users.
        entrypoint: what a runner process runs, bound in the node.
        refresh_cards: fills its cache of model cards, bound in the node.
        node_names: what a node's process needs, `entrypoint` and `PLAN` included.
        runner_names: what a runner's process needs.
    """

    tested: str
    entrypoint: Name
    refresh_cards: Name
    node_names: tuple[Name, ...]
    runner_names: tuple[Name, ...]


_ENTRY = ("bound_instance", "event_sender", "task_receiver", "cancel_receiver", "_logger")
_PLAN = (
    "node_id",
    "runners",
    "global_download_status",
    "instances",
    "all_runners",
    "tasks",
    "input_chunk_buffer",
    "image_cache",
    "instance_backoff",
    "download_backoff",
)
PLAN = Name(module="exo.worker.main", name="plan", parameters=_PLAN)
CHUNK_STREAM = Name(module="exo.api.main", name="API._token_chunk_stream", parameters=("self", "command_id"))
SEND_GENERATION = Name(
    module="exo.api.main", name="API._send_text_generation_with_images", parameters=("self", "task_params")
)
GET_MODELS = Name(module="exo.api.main", name="API.get_models", parameters=("self", "status"))
SHOW_MODEL = Name(module="exo.api.main", name="API.ollama_show", parameters=("self", "request"))
_CARDS = "exo.shared.models.model_cards"
FETCH_CARD = Name(module=_CARDS, name="ModelCard.fetch_from_hf", parameters=("model_id",))
API_SETUP = Name(module="exo.api.main", name="API._setup_exception_handlers", parameters=("self",))
API_RESET = Name(module="exo.api.main", name="API.reset", parameters=("self", "result_clock", "event_receiver"))
API_ROUTES = Name(module="exo.api.main", name="API._setup_routes", parameters=("self",))
_NODE = (
    Name(module="exo.worker.runner.bootstrap", name="entrypoint", parameters=_ENTRY),
    PLAN,
    CHUNK_STREAM,
    SEND_GENERATION,
    API_SETUP,
    API_ROUTES,
    API_RESET,
    GET_MODELS,
    SHOW_MODEL,
    FETCH_CARD,
    Name(module="exo.utils.keyed_backoff", name="KeyedBackoff.attempts", parameters=("self", "key")),
    Name(module="exo.utils.keyed_backoff", name="KeyedBackoff.reset", parameters=("self", "key")),
    Name(module="exo.shared.types.tasks", name="CancelTask", fields=("instance_id", "cancelled_task_id", "runner_id")),
    Name(module=_CARDS, name="ModelCard", fields=("model_id", "family", "context_length", "sampling_defaults")),
    Name(module="exo.main", name="main", parameters=()),
)

_API = "exo.api.main"
CHOOSE_PLACEMENT = Name(module=_API, name="get_instance_placements")
# What our planner binds in a node's API, and what it makes there.
PLACING = (
    CHOOSE_PLACEMENT,
    Name(module=_API, name="API.place_instance", parameters=("self", "payload")),
    Name(
        module=_API,
        name="API.get_placement",
        parameters=("self", "model_id", "sharding", "instance_meta", "min_nodes"),
    ),
    Name(module=_API, name="API.get_placement_previews", parameters=("self", "model_id", "node_ids")),
    Name(module=_API, name="API._send", parameters=("self", "command")),
    Name(module=_API, name="ModelCard.load", parameters=("model_id",)),
    Name(module=_API, name="PlaceInstance", fields=("model_card", "sharding", "instance_meta", "min_nodes")),
    Name(module=_API, name="CreateInstance", fields=("instance",)),
    Name(module=_API, name="CreateInstanceParams", fields=("instance",)),
    Name(module=_API, name="CreateInstanceResponse", fields=("message", "command_id", "model_card")),
)

_TYPES = "exo.shared.types"
_RUNNER = (
    Name(module=f"{_TYPES}.worker.instances", name="MlxRingInstance", fields=("hosts_by_node", "shard_assignments")),
    Name(
        module=f"{_TYPES}.worker.shards",
        name="PipelineShardMetadata",
        fields=("model_card", "device_rank", "world_size", "start_layer", "end_layer", "n_layers"),
    ),
    Name(module=f"{_TYPES}.chunks", name="TokenChunk", fields=("model", "text", "token_id", "usage", "finish_reason")),
    Name(module=f"{_TYPES}.chunks", name="TokenChunk", fields=("stats", "logprob", "top_logprobs", "is_thinking")),
    Name(module=f"{_TYPES}.chunks", name="ToolCallChunk", fields=("model", "tool_calls", "usage", "stats")),
    Name(module=f"{_TYPES}.chunks", name="ErrorChunk", fields=("model", "error_message")),
    Name(module=f"{_TYPES}.events", name="ChunkGenerated", fields=("command_id", "chunk")),
    Name(module=f"{_TYPES}.events", name="RunnerStatusUpdated", fields=("runner_id", "runner_status")),
    Name(module=f"{_TYPES}.worker.runners", name="RunnerWarmingUp"),
    Name(module=f"{_TYPES}.chunks", name="PrefillProgressChunk", fields=("model", "processed_tokens", "total_tokens")),
    Name(
        module=f"{_TYPES}.text_generation",
        name="TextGenerationTaskParams",
        fields=("input", "instructions", "chat_template_messages", "tools", "max_output_tokens", "stop", "images"),
    ),
    Name(
        module=f"{_TYPES}.text_generation",
        name="TextGenerationTaskParams",
        fields=("bench", "use_prefix_cache", "enable_thinking", "reasoning_effort", "repetition_context_size"),
    ),
    Name(module="exo.api.types", name="GenerationStats", fields=("prompt_tps", "prefix_cache_hit")),
    Name(module=f"{_TYPES}.worker.runner_response", name="ModelLoadingResponse", fields=("layers_loaded", "total")),
    Name(module=f"{_TYPES}.tasks", name="CANCEL_ALL_TASKS"),
    Name(module="exo.download.download_utils", name="resolve_existing_model", parameters=("model_id", "card")),
)
_BUILT_FROM = ("model_id", "event_sender", "cancel_receiver")

_HEAD_REFRESH = Name(module=_CARDS, name="_CardCache.refresh", parameters=("self",))
_HEAD_ENTRYPOINT = Name(module="exo.worker.runner.supervisor", name="entrypoint", parameters=_ENTRY)
BUILDER = Name(module="exo.worker.engines.mlx.builder", name="MlxBuilder", fields=_BUILT_FROM)
_ENGINE_METHODS = ("close", "serve_prefill", "step", "submit", "warmup")
HEAD = Exo(
    tested="exo b5375f8ce",
    entrypoint=_HEAD_ENTRYPOINT,
    refresh_cards=_HEAD_REFRESH,
    node_names=(_HEAD_ENTRYPOINT, _HEAD_REFRESH, *_NODE),
    runner_names=(
        Name(module="exo.worker.engines.base", name="Builder", abstract=("build", "close", "connect", "load")),
        Name(module="exo.worker.engines.base", name="Engine", abstract=_ENGINE_METHODS),
        *_RUNNER,
        Name(module=f"{_TYPES}.worker.runner_response", name="FinishedResponse"),
        Name(module=f"{_TYPES}.worker.runner_response", name="CancelledResponse"),
        BUILDER,
    ),
)

_V71_REFRESH = Name(module=_CARDS, name="_refresh_card_cache", parameters=())
_V71_ENTRYPOINT = Name(module="exo.worker.runner.runner_supervisor", name="entrypoint", parameters=_ENTRY)
_V71_RUNNER = "exo.worker.runner.llm_inference.runner"
V71_BUILDER = Name(
    module=_V71_RUNNER,
    name="Builder",
    fields=(*_BUILT_FROM, "inference_model", "tokenizer", "group", "vision_processor"),
)
V71_CONNECT = Name(module=_V71_RUNNER, name="initialize_mlx", parameters=("bound_instance",))
V71_LOAD = Name(module=_V71_RUNNER, name="load_mlx_items", parameters=("bound_instance", "group"))
V71_ENGINE = Name(
    module=_V71_RUNNER, name="InferenceGenerator", abstract=tuple(m for m in _ENGINE_METHODS if m != "serve_prefill")
)
V71_FINISHED = Name(module=_V71_RUNNER, name="Finished")
V71_CANCELLED = Name(module=_V71_RUNNER, name="Cancelled")
V71 = Exo(
    tested="exo v1.0.71",
    entrypoint=_V71_ENTRYPOINT,
    refresh_cards=_V71_REFRESH,
    node_names=(
        _V71_ENTRYPOINT,
        _V71_REFRESH,
        Name(module=_CARDS, name="get_card", parameters=("model_id",)),
        Name(module=_CARDS, name="add_to_card_cache", parameters=("card",)),
        *_NODE,
    ),
    runner_names=(*_RUNNER, V71_BUILDER, V71_CONNECT, V71_LOAD, V71_ENGINE, V71_FINISHED, V71_CANCELLED),
)


def nearest(find: Callable[[str], Any] = importlib.import_module) -> Exo:
    """The tested exo that the one around us is like: the later one, unless only the earlier one's runners are found."""
    return V71 if not _is_there(HEAD, find) and _is_there(V71, find) else HEAD


def _is_there(exo: Exo, find: Callable[[str], Any]) -> bool:
    try:
        find(exo.entrypoint.module)
    except ImportError:
        return False
    return True


def mismatches(names: Iterable[Name], find: Callable[[str], Any] = importlib.import_module) -> tuple[str, ...]:
    """What is not as it was in the exo that this project was tested with, one sentence each.

    Args:
        names: what to look at; their modules are imported.
        find: gives a module by name.
    """
    return tuple(found for name in names if (found := _mismatch(name, find)) is not None)


def _mismatch(name: Name, find: Callable[[str], Any]) -> str | None:
    try:
        module = find(name.module)
    except ImportError as error:
        return f"{name.module} cannot be imported: {error}"
    thing: Any = module
    for part in name.name.split("."):
        thing = getattr(thing, part, None)
    if thing is None:
        return f"{name} does not exist"
    if name.parameters is not None:
        found = tuple(inspect.signature(thing).parameters)
        if found != name.parameters:
            return f"{name} takes ({', '.join(found)}), not ({', '.join(name.parameters)})"
    if name.abstract is not None:
        methods = tuple(sorted(getattr(thing, "__abstractmethods__", ())))
        if methods != name.abstract:
            return f"{name} wants {', '.join(methods) or 'nothing'}, not {', '.join(name.abstract)}"
    known = getattr(thing, "model_fields", None) or getattr(thing, "__dataclass_fields__", {})
    lacking = [field for field in name.fields if field not in known]
    return f"{name} has no {', '.join(lacking)}" if lacking else None
