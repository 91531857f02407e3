"""What one choice yields on its way to a client, and its counts; the noun between token decoding and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from exo_kimi.runtime.requests import GenerationRequest, TokenEvent

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """Some text of the answer, with the tokens that made it (for log-probabilities)."""

    text: str
    tokens: tuple[TokenEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningPiece:
    """Some text of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallPiece:
    """One whole tool call; `arguments` is JSON."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPiece:
    """The last piece of a choice: why it ended and what it cost, in tokens."""

    reason: Reason
    generated_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0


Piece = TextPiece | ReasoningPiece | ToolCallPiece | EndPiece


class Decoder(Protocol):
    """Turns the tokens of one choice into pieces."""

    def feed(self, event: TokenEvent) -> list[Piece]:
        """The pieces that this token completes."""
        ...

    def finish(self) -> list[Piece]:
        """What was held back, then the EndPiece."""
        ...

    @property
    def satisfied(self) -> bool:
        """Whether the answer is complete although the engine would go on: a stop string, or the one call allowed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sequence to generate and the decoder of its tokens."""

    request: GenerationRequest
    decoder: Decoder
