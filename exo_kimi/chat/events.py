"""Events of a reply as it streams: pieces of reasoning, pieces of the answer, whole tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of the reasoning; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of the answer; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """One whole, validated tool call.

    Args:
        index: 0 for the first call of this reply.
        id: to be replayed verbatim in the conversation, `functions.NAME:IDX`.
        name: the function.
        arguments: a JSON object as text.
    """

    index: int
    id: str
    name: str
    arguments: str


OutputEvent = ReasoningDelta | ContentDelta | ToolCallEvent
