"""Events of a reply as it streams: pieces of reasoning, pieces of the answer, tool calls as they grow.

A tool call is announced (ToolCallBegin), its arguments grow (ToolCallDelta, any number), and ToolCallEvent closes it: the same
call, whole. Who streams reads the first two, who does not reads the last.
"""

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
class ToolCallBegin:
    """A tool call begins; its id and name are final.

    Args:
        index: 0 for the first call of this reply.
        id: `functions.NAME:IDX`.
        name: the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a call's arguments; never empty, and never taken back.

    Args:
        index: of the call.
        arguments: text; all pieces of a call join to `ToolCallEvent.arguments`.
    """

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """One whole tool call, after all of its pieces.

    Args:
        index: 0 for the first call of this reply.
        id: to be replayed verbatim in the conversation, `functions.NAME:IDX`.
        name: the function.
        arguments: a JSON object as text; what the model wrote, where that is no JSON and could not be repaired.
    """

    index: int
    id: str
    name: str
    arguments: str


OutputEvent = ReasoningDelta | ContentDelta | ToolCallBegin | ToolCallDelta | ToolCallEvent
