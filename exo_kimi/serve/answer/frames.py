"""How a door puts the events of a reply on the wire: the bytes of each, and the one object of an answer that is not streamed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from exo_kimi.dialogue.events import ReplyEvent, Usage, WholeReply
from exo_kimi.serve.answer.formats import Format
from exo_kimi.serve.problems import ApiProblem

SSE_TYPE = "text/event-stream"
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
# Characters that some clients take for the end of a line, and so of an event.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x7f\x85\u2028\u2029"}


class Frames(Protocol):
    """What one door writes of one answer, in this order: opening, events (with pings between), closing or failure."""

    @property
    def id(self) -> str:
        """The answer's id, by which it can be cancelled."""
        ...

    @property
    def media_type(self) -> str:
        """Content type of a stream."""
        ...

    def opening(self, cached_tokens: int) -> list[bytes]:
        """What comes before any event.

        Args:
            cached_tokens: of the prompt, those that a cache holds, as far as it is known by then.
        """
        ...

    def event(self, index: int, event: ReplyEvent) -> list[bytes]:
        """One event of choice `index`; nothing where the door has said it already."""
        ...

    def ping(self) -> bytes:
        """What is sent when nothing else was for a while."""
        ...

    def closing(self, usage: Usage) -> list[bytes]:
        """What follows the last event."""
        ...

    def failure(self, problem: ApiProblem) -> list[bytes]:
        """The end of a stream that broke."""
        ...

    def whole(self, replies: Sequence[Sequence[ReplyEvent]], usage: Usage) -> dict[str, Any]:
        """The answer in one object, from the events of each choice."""
        ...


class ChunkFrames:
    """OpenAI's chunks of chat and text completions as server-sent events, ended by `[DONE]`.

    Args:
        style: writes the chunks.
        choices: how many replies there are.
        include_usage: end the stream with the usage.
        warnings: what of the request is not carried out, for the first chunk.
    """

    media_type = SSE_TYPE

    def __init__(
        self, style: Format, *, choices: int, include_usage: bool = False, warnings: Sequence[str] = ()
    ) -> None:
        self._style = style
        self._choices = choices
        self._include_usage = include_usage
        self._warnings = list(warnings)
        self._untold = list(warnings)  # until the first chunk

    @property
    def id(self) -> str:
        """As every chunk has it."""
        return self._style.head.id

    def opening(self, cached_tokens: int) -> list[bytes]:
        """The roles."""
        return [self._chunk(chunk) for chunk in self._style.opening(self._choices)]

    def event(self, index: int, event: ReplyEvent) -> list[bytes]:
        """One chunk."""
        chunk = self._style.chunk(index, event)
        return [] if chunk is None else [self._chunk(chunk)]

    def ping(self) -> bytes:
        """A comment: chunks have no place for it."""
        return PING

    def closing(self, usage: Usage) -> list[bytes]:
        """The usage where it was asked for, then `[DONE]`."""
        return [*([sse(self._style.usage_chunk(usage))] if self._include_usage else []), DONE]

    def failure(self, problem: ApiProblem) -> list[bytes]:
        """The error object in place of a chunk, then `[DONE]`."""
        return [sse(problem.body()), DONE]

    def whole(self, replies: Sequence[Sequence[ReplyEvent]], usage: Usage) -> dict[str, Any]:
        """The completion object."""
        told = {"warnings": self._warnings} if self._warnings else {}
        return {**self._style.whole([WholeReply.of(each) for each in replies], usage), **told}

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        if self._untold:
            chunk, self._untold = {**chunk, "warnings": self._untold}, []
        # OpenAI: with usage asked for, every chunk but the last has it as null.
        return sse({**chunk, "usage": None} if self._include_usage else chunk)


def sse(value: Mapping[str, Any], *, event: str | None = None) -> bytes:
    """A server-sent event of JSON, with its name where a door names them."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text.translate(_LINE_ENDS)}\n\n".encode()
