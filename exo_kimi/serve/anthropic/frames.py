"""A message on the wire: its content blocks as they grow, and its object.

message_start (content_block_start content_block_delta* content_block_stop)* message_delta message_stop
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from exo_kimi.dialogue.events import (
    ContentEvent,
    EndEvent,
    ReasoningEvent,
    ReplyEvent,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEvent,
    Usage,
)
from exo_kimi.serve.answer.arguments import arguments_object
from exo_kimi.serve.answer.formats import Head
from exo_kimi.serve.answer.frames import SSE_TYPE, sse
from exo_kimi.serve.problems import ApiProblem

# Clients send thinking back only with a signature; this server asks for none.
SIGNATURE = "exo-kimi"

Kind = Literal["text", "thinking", "tool_use"]
_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}


class MessageFrames:
    """Anthropic's events, named.

    Args:
        head: id and model.
        prompt_tokens: of the request.
        warnings: what of the request is not carried out.
    """

    media_type = SSE_TYPE

    def __init__(self, head: Head, *, prompt_tokens: int, warnings: Sequence[str] = ()) -> None:
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._warnings = list(warnings)
        self._blocks: list[dict[str, Any]] = []
        self._open: Kind | None = None
        self._end: EndEvent | None = None

    @property
    def id(self) -> str:
        """`msg_...`"""
        return self._head.id

    def opening(self, cached_tokens: int) -> list[bytes]:
        """message_start."""
        usage = Usage(
            prompt_tokens=self._prompt_tokens, completion_tokens=0, cached_tokens=cached_tokens, reasoning_tokens=0
        )
        return [_event("message_start", message=self._message(usage))]

    def event(self, index: int, event: ReplyEvent) -> list[bytes]:
        """The events of the blocks."""
        return [_event(each.pop("type"), **each) for each in self._write(event)]

    def ping(self) -> bytes:
        """An event of its own."""
        return _event("ping")

    def closing(self, usage: Usage) -> list[bytes]:
        """message_delta and message_stop."""
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [_event("message_delta", delta=delta, usage=_usage(usage)), _event("message_stop")]

    def failure(self, problem: ApiProblem) -> list[bytes]:
        """An error event."""
        return [sse(problem.body("/v1/messages"), event="error")]

    def whole(self, replies: Sequence[Sequence[ReplyEvent]], usage: Usage) -> dict[str, Any]:
        """The message object."""
        for event in replies[0]:
            self._write(event)
        reason, sequence = self._stop()
        return {**self._message(usage), "stop_reason": reason, "stop_sequence": sequence}

    def _message(self, usage: Usage) -> dict[str, Any]:
        told = {"warnings": self._warnings} if self._warnings else {}
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": list(self._blocks),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
            **told,
        }

    def _write(self, event: ReplyEvent) -> list[dict[str, Any]]:
        match event:
            case ContentEvent():
                return self._text("text", event.text)
            case ReasoningEvent():
                return self._text("thinking", event.text)
            case ToolCallBegin():
                block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": event.name, "input": {}}
                return [*self._close(), *self._begin("tool_use", block)]
            case ToolCallDelta():
                return [self._delta({"type": "input_json_delta", "partial_json": event.arguments})]
            case ToolCallEvent():
                self._blocks[-1]["input"] = arguments_object(event.arguments)
                return self._close()
            case EndEvent():
                self._end = event
                return self._close()

    def _text(self, kind: Kind, text: str) -> list[dict[str, Any]]:
        begun: list[dict[str, Any]] = []
        if self._open != kind:
            block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            begun = [*self._close(), *self._begin(kind, block)]
        self._blocks[-1][kind] += text
        return [*begun, self._delta({"type": _DELTAS[kind], kind: text})]

    def _begin(self, kind: Kind, block: dict[str, Any]) -> list[dict[str, Any]]:
        self._open = kind
        self._blocks.append(block)
        return [{"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            self._blocks[-1]["signature"] = SIGNATURE
            events.append(self._delta({"type": "signature_delta", "signature": SIGNATURE}))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _stop(self) -> tuple[str | None, str | None]:
        """`stop_reason` and `stop_sequence`."""
        if self._end is None:
            return None, None
        if self._end.stop_sequence is not None:
            return "stop_sequence", self._end.stop_sequence
        reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
        return reasons[self._end.finish_reason], None


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, event=kind)
