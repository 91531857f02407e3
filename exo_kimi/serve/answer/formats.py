"""The JSON of answers: chat and text completions, whole and in chunks, with log-probabilities and usage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.events import (
    ContentEvent,
    EndEvent,
    ReasoningEvent,
    ReplyEvent,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEvent,
    Usage,
    WholeReply,
)
from exo_kimi.runtime.requests import TokenEvent

LOWEST = -9999.0  # OpenAI's word for a token that is practically impossible; JSON has no infinity


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
    """How one endpoint writes the events of its replies."""

    @property
    def head(self) -> Head:
        """What every object of the answer repeats."""
        ...

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks to send before any event."""
        ...

    def chunk(self, index: int, event: ReplyEvent) -> dict[str, Any] | None:
        """One event as a chunk; None where its chunks were sent already (the whole of a tool call)."""
        ...

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk that follows the last choice when the client asked for usage."""
        ...

    def whole(self, replies: Sequence[WholeReply], usage: Usage) -> dict[str, Any]:
        """The answer in one object; `replies` by choice."""
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

    def chunk(self, index: int, event: ReplyEvent) -> dict[str, Any] | None:
        """One delta, or the finish reason; None for the whole of a call, whose pieces were sent."""
        match event:
            case ContentEvent():
                return self._chunk(index, {"content": event.text}, logprobs=self._logprobs(event.tokens))
            case ReasoningEvent():
                return self._chunk(index, {"reasoning_content": event.text})
            case ToolCallBegin():
                call = ToolCallEvent(event.index, event.id, event.name, "")
                return self._chunk(index, {"tool_calls": [{"index": event.index, **_call(call)}]})
            case ToolCallDelta():
                grown = {"index": event.index, "function": {"arguments": event.arguments}}
                return self._chunk(index, {"tool_calls": [grown]})
            case ToolCallEvent():
                return None
            case EndEvent():
                return self._chunk(index, {}, reason=event.finish_reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """A chunk without choices."""
        return {**self.head.wrap("chat.completion.chunk", []), "usage": _usage(usage)}

    def whole(self, replies: Sequence[WholeReply], usage: Usage) -> dict[str, Any]:
        """One message a choice."""
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        return {**self.head.wrap("chat.completion", choices), "usage": _usage(usage)}

    def _choice(self, index: int, reply: WholeReply) -> dict[str, Any]:
        calls = [_call(call) for call in reply.tool_calls]
        content = reply.content if reply.content or not calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(reply.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.end.finish_reason}

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
        self.head = head
        self._tokenizer = tokenizer
        self._top = top_logprobs
        self._sent: dict[int, int] = {}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Nothing: a text has no role."""
        return []

    def chunk(self, index: int, event: ReplyEvent) -> dict[str, Any] | None:
        """Some text, or the finish reason; a text completion has neither reasoning nor tool calls."""
        if isinstance(event, ContentEvent):
            return self._wrap([self._choice(index, event.text, event.tokens)])
        reason = event.finish_reason if isinstance(event, EndEvent) else None
        return self._wrap([self._choice(index, "", [], reason=reason)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """A chunk without choices."""
        return {**self._wrap([]), "usage": _usage(usage)}

    def whole(self, replies: Sequence[WholeReply], usage: Usage) -> dict[str, Any]:
        """One text a choice."""
        choices = [
            self._choice(index, reply.content, reply.tokens, reason=reply.end.finish_reason)
            for index, reply in enumerate(replies)
        ]
        return {**self._wrap(choices), "usage": _usage(usage)}

    def _choice(self, index: int, text: str, tokens: Sequence[TokenEvent], reason: str | None = None) -> dict[str, Any]:
        logprobs = None
        if self._top is not None and (tokens or not reason):
            offset = self._sent.get(index, 0)
            logprobs = text_logprobs(tokens, self._tokenizer, self._top, offset)
            self._sent[index] = offset + sum(len(token_text(event.token_id, self._tokenizer)) for event in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head.wrap("text_completion", choices)


def _usage(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_drafts,
            "rejected_prediction_tokens": usage.rejected_drafts,
        },
    }


def _call(call: ToolCallEvent) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(tokens: Sequence[TokenEvent], tokenizer: KimiTokenizer, top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer.

    Args:
        tokens: those of the text, not of reasoning or tool calls.
        tokenizer: gives a token's text and bytes.
        top: how many alternatives to show for each.
    """
    content = [
        {
            **_entry(event.token_id, event.logprob, tokenizer),
            "top_logprobs": [_entry(token_id, logprob, tokenizer) for token_id, logprob in event.top_logprobs[:top]],
        }
        for event in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenEvent], tokenizer: KimiTokenizer, top: int, offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion.

    Args:
        tokens: the tokens of some text.
        tokenizer: gives a token's text.
        top: how many alternatives to show for each.
        offset: characters of the answer before this text.
    """
    texts = [token_text(event.token_id, tokenizer) for event in tokens]
    offsets = [offset + sum(map(len, texts[:position])) for position in range(len(texts))]
    tops = [
        {token_text(token_id, tokenizer): _finite(logprob) for token_id, logprob in event.top_logprobs[:top]}
        for event in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(event.logprob) for event in tokens],
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }


def token_text(token_id: int, tokenizer: KimiTokenizer) -> str:
    """A token alone as text; bytes that are no whole character show as the replacement character."""
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def _entry(token_id: int, logprob: float | None, tokenizer: KimiTokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else LOWEST
