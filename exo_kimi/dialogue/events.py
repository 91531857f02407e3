"""The events of a reply as it streams, and what it cost in tokens and seconds.

ReasoningEvent* ContentEvent* (ToolCallBegin ToolCallDelta* ToolCallEvent)* ... EndEvent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from exo_kimi.chat.events import ToolCallBegin, ToolCallDelta, ToolCallEvent
from exo_kimi.runtime.requests import TokenEvent

__all__ = [
    "ContentEvent",
    "EndEvent",
    "EndReason",
    "ReasoningEvent",
    "ReplyEvent",
    "ToolCallBegin",
    "ToolCallDelta",
    "ToolCallEvent",
    "Usage",
    "WholeReply",
]

EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentEvent:
    """Some text of the answer, never empty, with the tokens that made it (for log-probabilities)."""

    text: str
    tokens: tuple[TokenEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningEvent:
    """Some text of the reasoning, never empty, with the tokens that made it."""

    text: str
    tokens: tuple[TokenEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndEvent:
    """The last event of a reply: why it ended and what it took.

    Args:
        finish_reason: "tool_calls" when the reply ends with calls and was not cut by its token limit.
        completion_tokens: all that were generated, reasoning and end of turn included.
        reasoning_tokens: those of the reasoning.
        cached_tokens: of the prompt, those that a prefix cache held.
        accepted_drafts, rejected_drafts: guesses that were right, each of which saved a step, and guesses that were not.
        stop_sequence: the stop string that ended it; None where none did.
        ttft_s: seconds from the start to the first token.
        decode_s: seconds from the first token to the end.
    """

    finish_reason: EndReason
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    accepted_drafts: int = field(default=0, compare=False)
    rejected_drafts: int = field(default=0, compare=False)
    stop_sequence: str | None = None
    ttft_s: float = field(default=0.0, compare=False)
    decode_s: float = field(default=0.0, compare=False)


ReplyEvent = ContentEvent | ReasoningEvent | ToolCallBegin | ToolCallDelta | ToolCallEvent | EndEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeReply:
    """All events of a reply in one value; `tokens` are those of the content."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCallEvent, ...]
    tokens: tuple[TokenEvent, ...]
    end: EndEvent

    @classmethod
    def of(cls, events: Sequence[ReplyEvent]) -> WholeReply:
        """From the events of one reply, the EndEvent among them."""
        contents = [event for event in events if isinstance(event, ContentEvent)]
        return cls(
            content="".join(event.text for event in contents),
            reasoning="".join(event.text for event in events if isinstance(event, ReasoningEvent)),
            tool_calls=tuple(event for event in events if isinstance(event, ToolCallEvent)),
            tokens=tuple(token for event in contents for token in event.tokens),
            end=next(event for event in events if isinstance(event, EndEvent)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request and of all its replies."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    accepted_drafts: int = 0
    rejected_drafts: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens
