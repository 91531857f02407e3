"""What the API promises, as /openapi.json tells it: the JSON of every answer, every status, and the body of every request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from exo_kimi.serve.request.fields import BOOKKEEPING, HONOURED_VALUES, GenerationFields

REASONS: Mapping[int, str] = {
    400: "The request is wrong, or this server does not support it; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "`Host` or `Origin` is a name that this server was not told to answer to (`--allowed-host`).",
    404: "No such model.",
    408: "The headers or the body did not arrive in time; the connection is closed.",
    413: "The body is larger than this server takes.",
    415: "The body is a form; this server takes JSON.",
    500: "A failure that nobody foresaw.",
    503: "The stages are starting or have failed, or too many requests or connections wait. `Retry-After` says when to return.",
}
CONNECTION_STATUSES = (400, 408, 503)  # of `connections`, before any route is found: every route may give them
GENERATION_STATUSES = (404, 413, 415, 500, *CONNECTION_STATUSES)
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
    """The model that is served; `context_length` in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(BaseModel):
    """Every model of this server: one."""

    object: Literal["list"]
    data: list[ModelCard]


class HealthReport(BaseModel):
    """The engine and its stages; `reason` says what is wrong."""

    status: Literal["ok", "unavailable"]
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


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these statuses and those of the connection, with OpenAI's error object."""
    return {
        status: {"model": ErrorAnswer, "description": REASONS[status]} for status in (*statuses, *CONNECTION_STATUSES)
    }


def generation_route(
    *,
    body: type[GenerationFields],
    answer: type[BaseModel],
    chunk: type[BaseModel],
    example: Mapping[str, Any],
    extra: tuple[int, ...],
) -> dict[str, Any]:
    """What FastAPI is told of a route that generates: its body, its answer whole and streamed, and its refusals.

    Args:
        body: model of the request.
        answer: model of the whole answer.
        chunk: model of one event.
        example: a body that this server answers.
        extra: statuses of the server, such as 401.
    """
    data = {"anyOf": [{"const": "[DONE]"}, _json_text(chunk), _json_text(ErrorAnswer)]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    whole = {
        "description": "The answer, whole or as server-sent events.",
        "content": {"text/event-stream": {"itemSchema": event}},
    }
    content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{body.__name__}"}, "example": example}}
    return {
        "response_model": answer,
        "responses": {200: whole, **refusals(*GENERATION_STATUSES, *extra)},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


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
    content = {"$ref": f"{_SCHEMAS}{model.__name__}"}
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": content}


def _taken_beside_the_model() -> dict[str, Any]:
    """Fields of every generation request that change nothing, and those that must have one value."""
    free: dict[str, Any] = {name: {"description": "Taken and not used."} for name in sorted(BOOKKEEPING)}
    fixed = {name: {"enum": [*values, None]} for name, values in HONOURED_VALUES.items()}
    return free | fixed
