"""The JSON of answers: chat and text completions, whole and in chunks; it knows nothing of how they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.pieces import EndPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece
from exo_kimi.runtime.requests import TokenEvent
from exo_kimi.serve.answer.logprobs import chat_logprobs, text_logprobs, token_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str

    def wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An answer object or chunk around its choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        }


class Format(Protocol):
    """How one endpoint writes pieces."""

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks to send before any piece."""
        ...

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One piece as a chunk."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk that follows the last choice when the client asked for usage."""
        ...

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one object; `pieces` by choice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """`chat.completion` and `chat.completion.chunk`. `top_logprobs` None: no log-probabilities were asked for."""

    head: Head
    tokenizer: KimiTokenizer
    top_logprobs: int | None = None

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The role of each choice."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One delta, or the finish reason."""
        match piece:
            case TextPiece():
                return self._chunk(index, {"content": piece.text}, logprobs=self._logprobs(piece.tokens))
            case ReasoningPiece():
                return self._chunk(index, {"reasoning_content": piece.text})
            case ToolCallPiece():
                return self._chunk(index, {"tool_calls": [{"index": piece.index, **_call(piece)}]})
            case EndPiece():
                return self._chunk(index, {}, reason=piece.reason)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """A chunk without choices."""
        return {**self.head.wrap("chat.completion.chunk", []), "usage": usage}

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """One message a choice."""
        choices = [self._choice(index, parts) for index, parts in enumerate(pieces)]
        return {**self.head.wrap("chat.completion", choices), "usage": usage}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
        calls = [_call(piece) for piece in pieces if isinstance(piece, ToolCallPiece)]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(_tokens(pieces))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _end(pieces).reason}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        return None if self.top_logprobs is None else chat_logprobs(tokens, self.tokenizer, self.top_logprobs)

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.head.wrap("chat.completion.chunk", [choice])


class TextFormat:
    """`text_completion`, whole and in chunks.

    Args:
        head: as `ChatFormat`.
        tokenizer: as `ChatFormat`.
        top_logprobs: alternatives to show for each token; None: no log-probabilities were asked for.
    """

    def __init__(self, *, head: Head, tokenizer: KimiTokenizer, top_logprobs: int | None = None) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._top = top_logprobs
        self._sent: dict[int, int] = {}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Nothing: a text has no role."""
        return []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Some text, or the finish reason."""
        if isinstance(piece, EndPiece):
            return self._wrap([self._choice(index, "", [], reason=piece.reason)])
        assert isinstance(piece, TextPiece), "a text completion has neither reasoning nor tool calls"
        return self._wrap([self._choice(index, piece.text, piece.tokens)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """A chunk without choices."""
        return {**self._wrap([]), "usage": usage}

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """One text a choice."""
        choices = [
            self._choice(
                index,
                "".join(piece.text for piece in parts if isinstance(piece, TextPiece)),
                _tokens(parts),
                reason=_end(parts).reason,
            )
            for index, parts in enumerate(pieces)
        ]
        return {**self._wrap(choices), "usage": usage}

    def _choice(self, index: int, text: str, tokens: Sequence[TokenEvent], reason: str | None = None) -> dict[str, Any]:
        logprobs = None
        if self._top is not None and (tokens or not reason):
            offset = self._sent.get(index, 0)
            logprobs = text_logprobs(tokens, self._tokenizer, self._top, offset)
            self._sent[index] = offset + sum(len(token_text(event.token_id, self._tokenizer)) for event in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head.wrap("text_completion", choices)


def usage_of(prompt_tokens: int, ends: Sequence[EndPiece], *, choices_per_prompt: int) -> dict[str, Any]:
    """OpenAI's `usage`. The choices of one prompt share it: it is counted once, and as cached as far as it was for all of
    them, since what one choice took from another was computed for this request.

    Args:
        prompt_tokens: of all prompts together.
        ends: the end of every choice, by choice index.
        choices_per_prompt: `n`.
    """
    generated = sum(end.generated_tokens for end in ends)
    groups = [ends[begin : begin + choices_per_prompt] for begin in range(0, len(ends), choices_per_prompt)]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(min(end.cached_tokens for end in group) for group in groups)},
        "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ends)},
    }


def _call(piece: ToolCallPiece) -> dict[str, Any]:
    return {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}


def _tokens(pieces: Sequence[Piece]) -> list[TokenEvent]:
    return [event for piece in pieces if isinstance(piece, TextPiece) for event in piece.tokens]


def _end(pieces: Sequence[Piece]) -> EndPiece:
    end = pieces[-1]
    assert isinstance(end, EndPiece), "a choice ends with its EndPiece"
    return end
