"""What the Messages API answers, as /openapi.json tells it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class AnthropicErrorObject(BaseModel):
    """Why a request failed."""

    type: str
    message: str


class AnthropicErrorAnswer(BaseModel):
    """The body of a refusal, and the last event of a stream that failed."""

    type: Literal["error"]
    error: AnthropicErrorObject


class MessageUsage(BaseModel):
    """Tokens of a request and its message; `input_tokens` are those that no cache held."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int


class MessageBlock(BaseModel):
    """A block of content: text, thinking or tool_use; its other fields are those of its type."""

    model_config = {"extra": "allow"}

    type: Literal["text", "thinking", "tool_use"]


class MessageObject(BaseModel):
    """The answer to a conversation."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    warnings: list[str] = []


class MessageEvent(BaseModel):
    """One event of a streamed message; its other fields are those of its type."""

    model_config = {"extra": "allow"}

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]


class TokenCountAnswer(BaseModel):
    """How many tokens a request would have."""

    input_tokens: int
