"""How a client of each of exo's routes expects an error: as a whole answer, and in a stream that has begun."""

from __future__ import annotations

import json
from typing import Any, Protocol

from exo_kimi.plugin.api.refusal import CONTEXT, OVERLOADED, Refusal


class ErrorShape(Protocol):
    """The errors of one API."""

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """The JSON of an answer that is nothing but the error."""
        ...

    def event(self, refusal: Refusal, command_id: str, events: int) -> bytes:
        """What ends a stream.

        Args:
            refusal: the error.
            command_id: exo's id of the request, of which it makes the id of the answer.
            events: how many events the stream has already.
        """
        ...


class OpenAiShape:
    """`/v1/chat/completions`, `/bench/chat/completions`: OpenAI's error object, and [DONE] behind it in a stream."""

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
        return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}}

    def event(self, refusal: Refusal, command_id: str, events: int) -> bytes:
        """The error object as an event."""
        return _event(None, self.body(refusal)) + b"data: [DONE]\n\n"


class ResponsesShape(OpenAiShape):
    """`/v1/responses`: OpenAI's error object, and `response.failed` in a stream."""

    def event(self, refusal: Refusal, command_id: str, events: int) -> bytes:
        """The response as failed."""
        failed = {
            "id": f"resp_{command_id}",
            "object": "response",
            "status": "failed",
            "error": {"code": refusal.code, "message": refusal.message},
            "output": [],
        }
        return _event("response.failed", {"type": "response.failed", "sequence_number": events + 1, "response": failed})


class AnthropicShape:
    """`/v1/messages`: Anthropic's error object."""

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """`{"type": "error", "error": {type, message}}`; Claude Code compacts on the words `prompt is too long`."""
        kind = "invalid_request_error" if refusal.status < 500 else "api_error"
        message = f"prompt is too long: {refusal.message}" if refusal.code == CONTEXT else refusal.message
        return {
            "type": "error",
            "error": {"type": "overloaded_error" if refusal.code == OVERLOADED else kind, "message": message},
        }

    def event(self, refusal: Refusal, command_id: str, events: int) -> bytes:
        """An `error` event."""
        return _event("error", self.body(refusal))


class OllamaShape:
    """`/ollama/api/...`: `{"error": text}`, as a line of its own in a stream."""

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """The text alone."""
        return {"error": refusal.message}

    def event(self, refusal: Refusal, command_id: str, events: int) -> bytes:
        """The text alone, in one line."""
        return json.dumps(self.body(refusal)).encode() + b"\n"


def shape_of(path: str) -> ErrorShape:
    """The errors of a route.

    Args:
        path: of the request.
    """
    if path.endswith("/v1/messages"):
        return AnthropicShape()
    if path.endswith("/v1/responses"):
        return ResponsesShape()
    return OllamaShape() if path.startswith("/ollama/api/") else OpenAiShape()


def _event(name: str | None, data: dict[str, Any]) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()
