"""What the API promises, as /openapi.json tells it: the JSON of every answer, every status, and the body of every request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from exo_kimi.serve.request.fields import BOOKKEEPING, HONOURED_VALUES, GenerationFields

REASONS: Mapping[int, str] = {
    400: "The request is wrong, or this server does not support it; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "`Host` or `Origin` is a name that this server was not told to answer to (`--allowed-host`).",
    404: "No such model, or nothing of that id.",
    408: "The headers or the body did not arrive in time; the connection is closed.",
    409: "The answer was cancelled by `POST /v1/cancel/{id}`.",
    413: "The body is larger than this server takes.",
    415: "The body is a form; this server takes JSON.",
    500: "A failure that nobody foresaw.",
    503: "The stages are starting or have failed, or too many requests or connections wait. `Retry-After` says when to return.",
}
CONNECTION_STATUSES = (400, 408, 503)  # of `connections`, before any route is found: every route may give them
GENERATION_STATUSES = (404, 409, 413, 415, 500, *CONNECTION_STATUSES)
_SCHEMAS = "#/components/schemas/"


class ErrorObject(BaseModel):
    """Why a request failed."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer but 200, and the last event of a stream that failed."""

    error: ErrorObject


class PromptTokenCounts(BaseModel):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class CompletionTokenCounts(BaseModel):
    """`usage.completion_tokens_details`."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(BaseModel):
    """Tokens of a request and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenCounts
    completion_tokens_details: CompletionTokenCounts


class CalledFunction(BaseModel):
    """The function of a tool call; `arguments` is JSON in a text."""

    name: str
    arguments: str


class ChatCompletionCall(BaseModel):
    """A tool call of the model."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(BaseModel):
    """The name, in the first chunk of a call, or the next piece of its arguments."""

    name: str | None = None
    arguments: str


class ChatCompletionCallDelta(BaseModel):
    """A call begins (with id, type and name), or its arguments grow."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


class ChatCompletionMessage(BaseModel):
    """What the model answered."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ChatCompletionCall] | None = None


class ChatCompletionDelta(BaseModel):
    """What one chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatCompletionCallDelta] | None = None


class TokenLogprob(BaseModel):
    """A token, how likely it was (natural logarithm), and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenTokenLogprob(TokenLogprob):
    """A token of the answer with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """`logprobs` of a choice."""

    content: list[ChosenTokenLogprob]
    refusal: None


class TextLogprobs(BaseModel):
    """`logprobs` of a choice of a text completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatCompletionChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: ChatCompletionMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletionChunkChoice(BaseModel):
    """One of `n` answers, a piece of it."""

    index: int
    delta: ChatCompletionDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class TextCompletionChoice(BaseModel):
    """One of `n` texts for one prompt, or a piece of it: then `finish_reason` is null but in the last."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionHead(BaseModel):
    """What every answer and chunk begins with; `warnings`, there when something was not carried out as asked, is in the first
    chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    warnings: list[str] = []


class ChatCompletion(CompletionHead):
    """The answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage


class ChatCompletionChunk(CompletionHead):
    """One event of a streamed answer; `usage` is in the last one, where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatCompletionChunkChoice]
    usage: CompletionUsage | None = None


class TextCompletion(CompletionHead):
    """The texts that continue the prompts, or a piece of them in a stream, where `usage` is in the last event if asked for."""

    object: Literal["text_completion"]
    choices: list[TextCompletionChoice]
    usage: CompletionUsage | None = None


class ModelCard(BaseModel):
    """A name of the model that is served, or of an adapter, whose `parent` the model is (vLLM's word); `context_length` and
    `max_model_len` (vLLM's too) are its context in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int
    parent: str | None = None


class ModelList(BaseModel):
    """Every name of the one model."""

    object: Literal["list"]
    data: list[ModelCard]


class AnthropicModelCard(BaseModel):
    """A name of the model, for clients that send `anthropic-version`."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class AnthropicModelList(BaseModel):
    """Every name of the one model, for clients that send `anthropic-version`; there is one page."""

    data: list[AnthropicModelCard]
    has_more: Literal[False]
    first_id: str
    last_id: str


class CancelledAnswer(BaseModel):
    """What was cancelled."""

    id: str
    cancelled: Literal[True]


class HealthStatus(BaseModel):
    """What everybody may know of a server that has an API key."""

    status: Literal["ok", "unavailable"]


class HealthReport(HealthStatus):
    """The engine and its stages; `reason` says what is wrong."""

    reason: str | None
    model: str
    version: str
    stages: list[dict[str, Any]]
    requests: dict[str, int]
    context: int
    kv_capacity_tokens: int
    kv_reserved_tokens: int
    restarts: int
    events: list[Any]


def refusals(*statuses: int, error: type[BaseModel] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these statuses and those of the connection.

    Args:
        statuses: of the route.
        error: model of its error object. What the connection refuses before any route is found has OpenAI's.
    """
    either: Any = error if error is ErrorAnswer else error | ErrorAnswer
    models = dict.fromkeys(statuses, error) | dict.fromkeys(CONNECTION_STATUSES, either)
    return {status: {"model": model, "description": REASONS[status]} for status, model in models.items()}


def generation_route(
    *,
    body: type[BaseModel],
    answer: type[BaseModel],
    events: Sequence[type[BaseModel]],
    example: Mapping[str, Any],
    extra: tuple[int, ...],
    error: type[BaseModel] = ErrorAnswer,
    done: bool = True,
    media_type: str = "text/event-stream",
) -> dict[str, Any]:
    """What FastAPI is told of a route that generates: its body, its answer whole and streamed, and its refusals.

    Args:
        body: model of the request.
        answer: model of the whole answer.
        events: models of the events of a stream, its error among them.
        example: a body that this server answers.
        extra: statuses of the server, such as 401.
        error: model of a refusal.
        done: whether a stream ends with `[DONE]`.
        media_type: of a stream; what is not server-sent events is a line of JSON an event.
    """
    ends: list[dict[str, Any]] = [{"const": "[DONE]"}] if done else []
    if media_type == "text/event-stream":
        data = {"anyOf": [*ends, *map(_json_text, events)]}
        item: dict[str, Any] = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    else:
        item = {"anyOf": [_reference(model) for model in events]}
    whole = {
        "description": "The answer, whole or as a stream of events.",
        "content": {media_type: {"itemSchema": item}},
    }
    return {
        "response_model": answer,
        "responses": {200: whole, **refusals(*GENERATION_STATUSES, *extra, error=error)},
        "openapi_extra": json_body(body, example),
    }


def json_body(body: type[BaseModel], example: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenAPI is told of a body that a route reads itself."""
    content = {"application/json": {"schema": _reference(body), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def openapi_document(app: FastAPI, *models: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI document of an app, made once.

    Args:
        app: whose routes are told.
        models: what routes read (`generation_route`) or stream, beside what FastAPI sees in their signatures.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document["components"]["schemas"]
        for model in models:
            schema = model.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
            schemas |= schema.pop("$defs", {})
            if issubclass(model, GenerationFields):
                schema["properties"] |= _taken_beside_the_model()
            schemas[model.__name__] = schema
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own refusal: ours is 400
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _json_text(model: type[BaseModel]) -> dict[str, Any]:
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(model)}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"{_SCHEMAS}{model.__name__}"}


def _taken_beside_the_model() -> dict[str, Any]:
    """Fields of every generation request that change nothing, and those that must have one value."""
    free: dict[str, Any] = {name: {"description": "Taken and not used."} for name in sorted(BOOKKEEPING)}
    fixed = {name: {"enum": [*values, None]} for name, values in HONOURED_VALUES.items()}
    return free | fixed
