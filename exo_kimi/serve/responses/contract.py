"""What the Responses API answers, as /openapi.json tells it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class InputTokenCounts(BaseModel):
    """`usage.input_tokens_details`."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokenCounts(BaseModel):
    """`usage.output_tokens_details`."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of a request and its response."""

    input_tokens: int
    input_tokens_details: InputTokenCounts
    output_tokens: int
    output_tokens_details: OutputTokenCounts
    total_tokens: int


class ResponseFailure(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseItem(BaseModel):
    """An item of the output: a message, reasoning, or a call; its other fields are those of its type."""

    model_config = {"extra": "allow"}

    id: str
    type: Literal["message", "reasoning", "function_call", "custom_tool_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseObject(BaseModel):
    """A response; what the request asked for is repeated in it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: Any
    metadata: Any
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: Any
    reasoning: dict[str, Any]
    safety_identifier: Any
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: Any
    warnings: list[str] = []


class ResponseEvent(BaseModel):
    """One event of a streamed response; its other fields are those of its type."""

    model_config = {"extra": "allow"}

    type: str
    sequence_number: int


class InputItemList(BaseModel):
    """The items that a kept response was asked with."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False]


class DeletedResponse(BaseModel):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class CountedInput(BaseModel):
    """How many tokens a request would have."""

    object: Literal["response.input_tokens"]
    input_tokens: int
