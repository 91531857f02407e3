"""Generated tokens to the events of a reply: text, reasoning, tool calls, stop strings and counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from exo_kimi.chat.events import (
    ContentDelta,
    OutputEvent,
    ReasoningDelta,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEvent,
)
from exo_kimi.chat.markers import StopMatcher
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.events import ContentEvent, EndEvent, EndReason, ReasoningEvent, ReplyEvent
from exo_kimi.runtime.requests import TokenEvent


class ReplyParser(Protocol):
    """Token ids to pieces of a reply: `OutputParser` for conversations, `TextParser` for plain text."""

    def feed(self, token_id: int) -> list[OutputEvent]:
        """What became certain with this token."""
        ...

    def finish(self) -> list[OutputEvent]:
        """What was held back, now that the generation has ended."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        ...

    @property
    def stop_met(self) -> str | None:
        """The stop string that was met."""
        ...


class TextParser:
    """Plain text of a text completion, ended by stop strings; control tokens are shown by their names.

    Args:
        tokenizer: makes the text.
        stop: stop strings; none of them appears in the text.
        prefix: text to put before the first (`echo`).
    """

    def __init__(self, tokenizer: KimiTokenizer, *, stop: Sequence[str] = (), prefix: str = "") -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopMatcher(stop)
        self._prefix = prefix

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stop.stopped

    @property
    def stop_met(self) -> str | None:
        """The stop string that was met."""
        return self._stop.met

    def feed(self, token_id: int) -> list[OutputEvent]:
        """The text that this token completes."""
        return self._say(self._stop.feed(self._detokenizer.feed(token_id)))

    def finish(self) -> list[OutputEvent]:
        """What was held back."""
        return self._say(self._stop.feed(self._detokenizer.flush()) + self._stop.flush())

    def _say(self, text: str) -> list[OutputEvent]:
        text, self._prefix = self._prefix + text, ""
        return [ContentDelta(text)] if text else []


class ReplyDecoder:
    """Turns the tokens of one reply into its events, and counts them.

    A token belongs to the event that its text appears in: the parser may hold a token back (half a character, the begin of
    a stop string), so tokens wait here for the next event. That gives log-probabilities to text, and counts reasoning.

    Args:
        parser: fresh, of this reply.
        stop_ids: token ids that end a turn; the one that ends this reply is counted and not shown.
        not_text: tells token ids that are no text of an answer: control tokens where they are not shown.
        one_call: end the reply after the first tool call.
        clock: seconds; the reply starts when the decoder is made.
    """

    def __init__(
        self,
        parser: ReplyParser,
        *,
        stop_ids: frozenset[int],
        not_text: Callable[[int], bool] = lambda _: False,
        one_call: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parser = parser
        self._stop_ids = stop_ids
        self._not_text = not_text
        self._one_call = one_call
        self._clock = clock
        self._waiting: list[TokenEvent] = []
        self._calls = self._completion_tokens = self._reasoning_tokens = self._cached_tokens = 0
        self._accepted_drafts = self._rejected_drafts = 0
        self._reason: EndReason = "stop"
        self._begun_s = clock()
        self._first_token_s: float | None = None

    @property
    def satisfied(self) -> bool:
        """Whether the reply is complete although the engine would go on: a stop string, or the one call allowed."""
        return self._parser.stopped or (self._one_call and self._calls > 0)

    def feed(self, token: TokenEvent) -> list[ReplyEvent]:
        """The events that this token completes."""
        if self._first_token_s is None:
            self._first_token_s = self._clock()
        self._completion_tokens += 1
        self._cached_tokens = max(self._cached_tokens, token.cached_tokens)
        self._accepted_drafts, self._rejected_drafts = token.accepted_drafts, token.rejected_drafts
        if token.finish_reason is not None:
            self._reason = token.finish_reason
            if token.finish_reason == "stop" and token.token_id in self._stop_ids:
                return []
        self._waiting.append(token)
        return self._events(self._parser.feed(token.token_id))

    def finish(self) -> list[ReplyEvent]:
        """What was held back, then the EndEvent."""
        events = [] if self.satisfied else self._events(self._parser.finish())
        return [*events, self._end()]

    def _events(self, parsed: list[OutputEvent]) -> list[ReplyEvent]:
        events: list[ReplyEvent] = []
        for item in parsed:
            if self._one_call and self._calls:
                break
            tokens, self._waiting = self._waiting, []
            match item:
                case ContentDelta(text=text):
                    shown = tuple(token for token in tokens if not self._not_text(token.token_id))
                    events.append(ContentEvent(text=text, tokens=shown))
                case ReasoningDelta(text=text):
                    self._reasoning_tokens += len(tokens)
                    events.append(ReasoningEvent(text=text, tokens=tuple(tokens)))
                case ToolCallBegin() | ToolCallDelta():
                    events.append(item)
                case ToolCallEvent():
                    self._calls += 1
                    events.append(item)
        return events

    def _end(self) -> EndEvent:
        reason = "stop" if self.satisfied else self._reason
        if self._calls and reason == "stop":
            reason = "tool_calls"
        now_s = self._clock()
        first_s = now_s if self._first_token_s is None else self._first_token_s
        return EndEvent(
            finish_reason=reason,
            completion_tokens=self._completion_tokens,
            reasoning_tokens=self._reasoning_tokens,
            cached_tokens=self._cached_tokens,
            accepted_drafts=self._accepted_drafts,
            rejected_drafts=self._rejected_drafts,
            stop_sequence=self._parser.stop_met,
            ttft_s=first_s - self._begun_s,
            decode_s=now_s - first_s,
        )
