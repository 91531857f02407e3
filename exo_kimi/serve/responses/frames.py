"""A response on the wire: its object, and its events with their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.dialogue.events import EndEvent, ReasoningEvent, ReplyEvent, Usage, WholeReply
from exo_kimi.serve.answer.formats import Head
from exo_kimi.serve.answer.frames import PING, SSE_TYPE, sse
from exo_kimi.serve.problems import ApiProblem
from exo_kimi.serve.responses.output import OutputOptions, OutputWriter
from exo_kimi.serve.responses.request import ResponsesRequest
from exo_kimi.serve.responses.tools import ToolBox

EVENT_EVERY_PINGS = 6  # Codex ends a stream without events after minutes, and does not see comments


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What a response says from its first event on.

    Args:
        head: id, time and model.
        request: what it answers.
        warnings: what of the request is not carried out.
    """

    head: Head
    request: ResponsesRequest
    warnings: Sequence[str] = ()

    def response(self, status: str, output: Sequence[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """The response object."""
        asked = self.request
        effort, summary = (asked.reasoning.effort, asked.reasoning.summary) if asked.reasoning else (None, None)
        text = asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {}
        value: dict[str, Any] = {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "metadata": asked.metadata or {},
            "model": self.head.model,
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": summary},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": asked.keeps,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }
        if self.warnings:
            value["warnings"] = list(self.warnings)
        return {**value, **others}


class ResponseFrames:
    """`response.*` events, numbered.

    Args:
        head: of the response.
        tools: of the request.
        options: how the client wants its items.
        clock: seconds since the epoch.
        keep: given the finished response and the message of the assistant that goes into the conversation.
    """

    media_type = SSE_TYPE

    def __init__(
        self,
        head: ResponseHead,
        tools: ToolBox,
        options: OutputOptions,
        *,
        clock: Callable[[], float],
        keep: Callable[[dict[str, Any], dict[str, Any]], None],
    ) -> None:
        self._head = head
        self._writer = OutputWriter(tools, options)
        self._clock = clock
        self._keep = keep
        self._number = 0
        self._pings = 0
        self._events: list[ReplyEvent] = []

    @property
    def id(self) -> str:
        """`resp_...`"""
        return self._head.head.id

    def opening(self, cached_tokens: int) -> list[bytes]:
        """response.created and response.in_progress."""
        value = self._head.response("in_progress", [])
        return [self._event(f"response.{what}", response=value) for what in ("created", "in_progress")]

    def event(self, index: int, event: ReplyEvent) -> list[bytes]:
        """The events of the items."""
        self._events.append(event)
        return [self._event(each.pop("type"), **each) for each in self._writer.write(event)]

    def ping(self) -> bytes:
        """A comment; from time to time an event, for clients that wait for one."""
        self._pings += 1
        if self._pings % EVENT_EVERY_PINGS:
            return PING
        return self._event("response.in_progress", response=self._head.response("in_progress", self._writer.items))

    def closing(self, usage: Usage) -> list[bytes]:
        """response.completed, or response.incomplete."""
        value = self._finished(usage)
        return [self._event(f"response.{value['status']}", response=value)]

    def failure(self, problem: ApiProblem) -> list[bytes]:
        """response.failed."""
        error = {"code": problem.code or "server_error", "message": problem.message}
        value = self._head.response("failed", self._writer.items, error=error)
        return [self._event("response.failed", response=value)]

    def whole(self, replies: Sequence[Sequence[ReplyEvent]], usage: Usage) -> dict[str, Any]:
        """The response object."""
        for event in replies[0]:
            self._events.append(event)
            self._writer.write(event)
        return self._finished(usage)

    def _finished(self, usage: Usage) -> dict[str, Any]:
        end = next(event for event in self._events if isinstance(event, EndEvent))
        cut = end.finish_reason == "length"
        value = self._head.response(
            "incomplete" if cut else "completed",
            self._writer.items,
            completed_at=None if cut else int(self._clock()),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage=_usage(usage),
        )
        self._keep(value, self._message())
        return value

    def _message(self) -> dict[str, Any]:
        """The reply as a message of the conversation."""
        reply = WholeReply.of(self._events)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if any(isinstance(event, ReasoningEvent) for event in self._events):
            message["reasoning_content"] = reply.reasoning
        if self._writer.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self._writer.calls
            ]
        return message

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, **fields, "sequence_number": self._number}
        self._number += 1
        return sse(value, event=kind)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
