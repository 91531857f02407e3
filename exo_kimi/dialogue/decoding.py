"""Decoders from generated tokens to pieces of a chat answer or of a plain text; they know nothing of HTTP."""

from __future__ import annotations

from exo_kimi.chat.markers import StopMatcher
from exo_kimi.chat.output import ContentDelta, OutputEvent, OutputParser, ReasoningDelta, ToolCallEvent
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.pieces import EndPiece, Piece, Reason, ReasoningPiece, TextPiece, ToolCallPiece
from exo_kimi.runtime.requests import TokenEvent


class ChatDecoder:
    """Splits an answer into reasoning, text and tool calls.

    A token belongs to the piece that its text appears in: the parser may hold a token back (half a character, the begin of
    a stop string), so tokens wait here for the next piece. That gives log-probabilities to text only, and counts reasoning.

    Args:
        parser: fresh, used by this decoder only.
        tokenizer: tells control tokens, which are no text.
        one_call: end the answer after the first tool call.
    """

    def __init__(self, parser: OutputParser, tokenizer: KimiTokenizer, *, one_call: bool = False) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._one_call = one_call
        self._waiting: list[TokenEvent] = []
        self._calls = 0
        self._counts = _Counts()

    @property
    def satisfied(self) -> bool:
        """Whether a stop string was met or the one allowed call was made."""
        return self._parser.stopped or (self._one_call and self._calls > 0)

    def feed(self, event: TokenEvent) -> list[Piece]:
        """The pieces that this token completes. The token that ends a turn has no text and is only counted."""
        self._counts.add(event)
        if event.finish_reason == "stop" and event.token_id in self._tokenizer.stop_ids:
            return []
        self._waiting.append(event)
        return self._pieces(self._parser.feed(event.token_id))

    def finish(self) -> list[Piece]:
        """What was held back, then the end."""
        pieces = [] if self.satisfied else self._pieces(self._parser.finish())
        reason: Reason = self._counts.reason
        if self._calls and (reason == "stop" or self.satisfied):
            reason = "tool_calls"
        elif self.satisfied:
            reason = "stop"
        return [*pieces, self._counts.end(reason)]

    def _pieces(self, events: list[OutputEvent]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            if self._one_call and self._calls:
                break
            match event:
                case ContentDelta(text=text):
                    pieces.append(TextPiece(text=text, tokens=self._take_text_tokens()))
                case ReasoningDelta(text=text):
                    self._counts.reasoning += len(self._waiting)
                    self._waiting.clear()
                    pieces.append(ReasoningPiece(text=text))
                case ToolCallEvent(index=index, id=id_, name=name, arguments=arguments):
                    self._calls += 1
                    self._waiting.clear()
                    pieces.append(ToolCallPiece(index=index, id=id_, name=name, arguments=arguments))
        return pieces

    def _take_text_tokens(self) -> tuple[TokenEvent, ...]:
        tokens = tuple(event for event in self._waiting if not self._tokenizer.is_special(event.token_id))
        self._waiting.clear()
        return tokens


class TextDecoder:
    """Plain text of a text completion, ended by stop strings.

    Args:
        tokenizer: makes the text.
        stops: stop strings; none of them appears in the text.
        prefix: text to put before the first (`echo`).
    """

    def __init__(self, tokenizer: KimiTokenizer, *, stops: tuple[str, ...] = (), prefix: str = "") -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopMatcher(stops)
        self._prefix = prefix
        self._waiting: list[TokenEvent] = []
        self._counts = _Counts()

    @property
    def satisfied(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.stopped

    def feed(self, event: TokenEvent) -> list[Piece]:
        """The text that this token completes."""
        self._counts.add(event)
        if event.finish_reason == "stop" and event.token_id in self._tokenizer.stop_ids:
            return []
        self._waiting.append(event)
        return self._pieces(self._stops.feed(self._detokenizer.feed(event.token_id)))

    def finish(self) -> list[Piece]:
        """What was held back, then the end."""
        pieces: list[Piece] = []
        if not self.satisfied:
            pieces = self._pieces(self._stops.feed(self._detokenizer.flush()) + self._stops.flush())
        return [*pieces, self._counts.end("stop" if self.satisfied else self._counts.reason)]

    def _pieces(self, text: str) -> list[Piece]:
        text, self._prefix = self._prefix + text, ""
        if not text:
            return []
        tokens = tuple(self._waiting)
        self._waiting.clear()
        return [TextPiece(text=text, tokens=tokens)]


class _Counts:
    """Tokens of one choice."""

    def __init__(self) -> None:
        self.generated = 0
        self.reasoning = 0
        self.cached = 0
        self.reason: Reason = "stop"

    def add(self, event: TokenEvent) -> None:
        self.generated += 1
        self.cached = max(self.cached, event.cached_tokens)
        if event.finish_reason is not None:
            self.reason = event.finish_reason

    def end(self, reason: Reason) -> EndPiece:
        return EndPiece(
            reason=reason,
            generated_tokens=self.generated,
            reasoning_tokens=self.reasoning,
            cached_tokens=self.cached,
        )
