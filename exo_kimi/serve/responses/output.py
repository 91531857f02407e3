"""The output items of a response as they grow, and the events that tell of it.

Each item: response.output_item.added, its own events, response.output_item.done.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic_core import from_json

from exo_kimi.dialogue.events import (
    ContentEvent,
    EndEvent,
    ReasoningEvent,
    ReplyEvent,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEvent,
)
from exo_kimi.runtime.requests import TokenEvent
from exo_kimi.serve.responses.items import encode_reasoning
from exo_kimi.serve.responses.tools import CUSTOM_INPUT, OfferedTool, ToolBox

Events = list[dict[str, Any]]
Logprobs = Callable[[Sequence[TokenEvent]], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How a client wants its items.

    Args:
        as_summary: reasoning as a summary, which is what most clients show, rather than as reasoning text.
        encrypted: add the reasoning as opaque text that the client keeps (`include`).
        logprobs: writes log-probabilities of text; None where none were asked for.
    """

    as_summary: bool = False
    encrypted: bool = False
    logprobs: Logprobs | None = None


class _Item(Protocol):
    """One item that grows."""

    value: dict[str, Any]

    def begin(self) -> Events:
        """The events behind output_item.added."""
        ...

    def end(self) -> Events:
        """The events before output_item.done; `value` is whole then."""
        ...


Growing = TypeVar("Growing", bound=_Item)


class OutputWriter:
    """Gathers the items of one reply.

    Args:
        tools: what calls mean.
        options: the client's.
    """

    def __init__(self, tools: ToolBox, options: OutputOptions) -> None:
        self.items: list[dict[str, Any]] = []
        self.calls: list[ToolCallEvent] = []
        self._tools = tools
        self._options = options
        self._open: _Item | None = None

    def write(self, event: ReplyEvent) -> Events:
        """The events of what one event of the reply adds."""
        match event:
            case ReasoningEvent():
                events, reasoning = self._item(_Reasoning, lambda: _Reasoning(self._options))
                return events + self._placed(reasoning.grow(event.text))
            case ContentEvent():
                events, message = self._item(_Message, lambda: _Message(self._options.logprobs))
                return events + self._placed(message.grow(event))
            case ToolCallBegin():
                tool, call_id = self._tools.tool_of(event.name), f"call_{uuid.uuid4().hex}"
                return self._close() + self._begin(
                    _CustomCall(tool, call_id) if tool.kind == "custom" else _FunctionCall(tool, call_id)
                )
            case ToolCallDelta():
                return self._placed(self._open.grow(event.arguments)) if isinstance(self._open, _Call) else []
            case ToolCallEvent():
                if not isinstance(self._open, _Call):
                    return []
                call_id = self._open.value["call_id"]
                self.calls.append(ToolCallEvent(event.index, call_id, event.name, event.arguments))
                return self._close()
            case EndEvent():
                return self._close("incomplete" if event.finish_reason == "length" else "completed")

    def _item(self, kind: type[Growing], make: Callable[[], Growing]) -> tuple[Events, Growing]:
        """The open item, if it is of this kind; else a new one, with the events of the change."""
        if isinstance(self._open, kind):
            return [], self._open
        item = make()
        return self._close() + self._begin(item), item

    def _begin(self, item: _Item) -> Events:
        self._open = item
        added = {"type": "response.output_item.added", "item": dict(item.value)}
        return self._placed([added, *item.begin()])

    def _close(self, status: str = "completed") -> Events:
        if self._open is None:
            return []
        item = self._open
        events = item.end()
        item.value["status"] = "incomplete" if isinstance(item, _FunctionCall) and not item.is_json else status
        events = self._placed([*events, {"type": "response.output_item.done", "item": item.value}])
        self.items.append(item.value)
        self._open = None
        return events

    def _placed(self, events: Events) -> Events:
        """The events with the place of the open item."""
        index = len(self.items)
        item_id = self._open.value["id"] if self._open else ""
        return [
            {**event, "output_index": index} | ({} if "item" in event else {"item_id": item_id}) for event in events
        ]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class _Message:
    def __init__(self, logprobs: Logprobs | None) -> None:
        self._text = ""
        self._logprobs = logprobs
        self._told: list[dict[str, Any]] = []
        self.value: dict[str, Any] = {
            "id": _new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }

    def begin(self) -> Events:
        return [{"type": "response.content_part.added", "content_index": 0, "part": self._part()}]

    def grow(self, event: ContentEvent) -> Events:
        told = self._logprobs(event.tokens) if self._logprobs else []
        self._text += event.text
        self._told += told
        return [
            {"type": "response.output_text.delta", "content_index": 0, "delta": event.text, "logprobs": told},
        ]

    def end(self) -> Events:
        part = self._part()
        self.value["content"] = [part]
        return [
            {"type": "response.output_text.done", "content_index": 0, "text": self._text, "logprobs": self._told},
            {"type": "response.content_part.done", "content_index": 0, "part": part},
        ]

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._told}


class _Reasoning:
    def __init__(self, options: OutputOptions) -> None:
        self._text = ""
        self._summary = options.as_summary
        self._encrypted = options.encrypted
        self.value: dict[str, Any] = {"id": _new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": []}

    def begin(self) -> Events:
        return [self._part_event("added")]

    def grow(self, text: str) -> Events:
        self._text += text
        return [self._text_event("delta", delta=text)]

    def end(self) -> Events:
        key = "summary" if self._summary else "content"
        self.value[key] = [self._part()]
        if self._encrypted:
            self.value["encrypted_content"] = encode_reasoning(self._text)
        return [self._text_event("done", text=self._text), self._part_event("done")]

    def _part(self) -> dict[str, Any]:
        return {"type": "summary_text" if self._summary else "reasoning_text", "text": self._text}

    def _part_event(self, what: str) -> dict[str, Any]:
        if self._summary:
            return {"type": f"response.reasoning_summary_part.{what}", "summary_index": 0, "part": self._part()}
        return {"type": f"response.content_part.{what}", "content_index": 0, "part": self._part()}

    def _text_event(self, what: str, **fields: str) -> dict[str, Any]:
        if self._summary:
            return {"type": f"response.reasoning_summary_text.{what}", "summary_index": 0, **fields}
        return {"type": f"response.reasoning_text.{what}", "content_index": 0, **fields}


class _Call:
    """A tool call; `_text` is what the model wrote of its arguments so far."""

    def __init__(self, tool: OfferedTool, call_id: str, *, prefix: str, kind: str, field: str) -> None:
        self._text = ""
        self._field = field
        self.value: dict[str, Any] = {
            "id": _new_id(prefix),
            "type": kind,
            "status": "in_progress",
            "call_id": call_id,
            "name": tool.name,
            field: "",
        }
        if tool.namespace is not None:
            self.value["namespace"] = tool.namespace

    def begin(self) -> Events:
        return []

    def grow(self, text: str) -> Events:
        raise NotImplementedError

    def end(self) -> Events:
        raise NotImplementedError


class _FunctionCall(_Call):
    def __init__(self, tool: OfferedTool, call_id: str) -> None:
        super().__init__(tool, call_id, prefix="fc", kind="function_call", field="arguments")

    @property
    def is_json(self) -> bool:
        """Whether the arguments are whole: not cut by the token limit, nor beyond repair."""
        try:
            json.loads(self._text or "{}")
        except ValueError:
            return False
        return True

    def grow(self, text: str) -> Events:
        self._text += text
        return [{"type": "response.function_call_arguments.delta", "delta": text}]

    def end(self) -> Events:
        self.value["arguments"] = self._text
        name = self.value["name"]
        return [{"type": "response.function_call_arguments.done", "name": name, "arguments": self._text}]


class _CustomCall(_Call):
    """The model writes `{"input": "..."}`; the client reads the text inside, as it grows."""

    def __init__(self, tool: OfferedTool, call_id: str) -> None:
        super().__init__(tool, call_id, prefix="ctc", kind="custom_tool_call", field="input")
        self._sent = ""

    def grow(self, text: str) -> Events:
        self._text += text
        return self._send(_partial_input(self._text))

    def end(self) -> Events:
        whole = _partial_input(self._text)
        events = self._send(self._text if whole is None else whole)
        self.value["input"] = self._sent
        return [*events, {"type": "response.custom_tool_call_input.done", "input": self._sent}]

    def _send(self, text: str | None) -> Events:
        if text is None or len(text) <= len(self._sent) or not text.startswith(self._sent):
            return []
        delta, self._sent = text[len(self._sent) :], text
        return [{"type": "response.custom_tool_call_input.delta", "delta": delta}]


def _partial_input(arguments: str) -> str | None:
    """The `input` that arguments hold so far; None where they are no such object."""
    try:
        value = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return None
    text = value.get(CUSTOM_INPUT, "") if isinstance(value, dict) else None
    return text if isinstance(text, str) else None
