"""Ollama's answers: lines of JSON, the last with counts and nanoseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from exo_kimi.dialogue.events import (
    ContentEvent,
    EndEvent,
    ReasoningEvent,
    ReplyEvent,
    ToolCallEvent,
    Usage,
    WholeReply,
)
from exo_kimi.serve.answer.arguments import arguments_object
from exo_kimi.serve.answer.formats import Head
from exo_kimi.serve.problems import ApiProblem

JSON_LINES = "application/x-ndjson"


class OllamaFrames:
    """Lines of `/api/chat`, or of `/api/generate`.

    Args:
        head: model and id.
        chat: whether the text is in a message; else in `response`.
        warnings: what of the request is not carried out, for the last line.
    """

    media_type = JSON_LINES

    def __init__(self, head: Head, *, chat: bool, warnings: Sequence[str] = ()) -> None:
        self._head = head
        self._chat = chat
        self._warnings = list(warnings)
        self._end: EndEvent | None = None

    @property
    def id(self) -> str:
        """Not in the answer: Ollama has none."""
        return self._head.id

    def opening(self, cached_tokens: int) -> list[bytes]:
        """Nothing."""
        return []

    def event(self, index: int, event: ReplyEvent) -> list[bytes]:
        """A line for some text, or for a whole call: Ollama has no word for the pieces of one."""
        match event:
            case ContentEvent():
                return [self._line(text=event.text)]
            case ReasoningEvent():
                return [self._line(thinking=event.text)]
            case ToolCallEvent():
                return [self._line(calls=[event])] if self._chat else []
            case EndEvent():
                self._end = event
        return []

    def ping(self) -> bytes:
        """A line without text."""
        return self._line()

    def closing(self, usage: Usage) -> list[bytes]:
        """The counts."""
        return [_line({**self._said(), **self._ended(self._end, usage)})] if self._end else []

    def failure(self, problem: ApiProblem) -> list[bytes]:
        """The error in a line."""
        return [_line(problem.body("/api/"))]

    def whole(self, replies: Sequence[Sequence[ReplyEvent]], usage: Usage) -> dict[str, Any]:
        """All of it in one object."""
        reply = WholeReply.of(replies[0])
        said = self._said(text=reply.content, thinking=reply.reasoning, calls=reply.tool_calls)
        return {**said, **self._ended(reply.end, usage)}

    def _line(self, *, text: str = "", thinking: str = "", calls: Sequence[ToolCallEvent] = ()) -> bytes:
        return _line({**self._said(text=text, thinking=thinking, calls=calls), "done": False})

    def _said(self, *, text: str = "", thinking: str = "", calls: Sequence[ToolCallEvent] = ()) -> dict[str, Any]:
        told: dict[str, Any] = {"thinking": thinking} if thinking else {}
        head = {"model": self._head.model, "created_at": now()}
        if not self._chat:
            return {**head, "response": text, **told}
        if calls:
            told["tool_calls"] = [
                {
                    "id": call.id,
                    "function": {
                        "index": call.index,
                        "name": call.name,
                        "arguments": arguments_object(call.arguments),
                    },
                }
                for call in calls
            ]
        return {**head, "message": {"role": "assistant", "content": text, **told}}

    def _ended(self, end: EndEvent, usage: Usage) -> dict[str, Any]:
        prompt_ns, decode_ns = int(end.ttft_s * 1e9), int(end.decode_s * 1e9)
        told = {"warnings": self._warnings} if self._warnings else {}
        return {
            "done": True,
            "done_reason": "length" if end.finish_reason == "length" else "stop",
            "total_duration": prompt_ns + decode_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": prompt_ns,
            "eval_count": usage.completion_tokens,
            "eval_duration": decode_ns,
            **told,
        }


def now(clock: Callable[[Any], datetime] = datetime.now) -> str:
    """`2026-11-27T20:30:00.123456Z`"""
    return clock(UTC).isoformat().replace("+00:00", "Z")


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
