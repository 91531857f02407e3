"""Parse generated token ids into reasoning, answer and tool calls, as they stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exo_kimi.chat.events import ContentDelta, OutputEvent, ReasoningDelta, ToolCallBegin, ToolCallEvent
from exo_kimi.chat.family import THINK_CLOSE, THINK_OPEN
from exo_kimi.chat.history import NO_CALLS, CallHistory
from exo_kimi.chat.markers import MarkerScanner, Piece, StopMatcher
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.chat.tool_calls import TOOL_MARKERS, CallItem, ToolCallParser

__all__ = ["ContentDelta", "OutputEvent", "OutputParser", "ReasoningDelta", "ToolCallEvent"]


class OutputParser:
    """Parser of one reply while it streams.

    Think tags and tool markers are acted upon; all other control tokens (ends of turns, padding) mean nothing to a client and
    are not shown. Without tools, tool markers are shown as text, so that nothing is lost. A tag or marker that the vocabulary
    has a control token for counts only as that token; spelled in ordinary tokens it is text, such as a quoted file.

    Args:
        tokenizer: the tokenizer of the model that replies.
        reasoning_open: whether the prompt ended inside reasoning (`Prompt.reasoning_open`).
        tools: the declared tools, OpenAI-shaped; or whether there are any.
        stop: strings that end the answer (not the reasoning); they are not shown.
        history: the calls so far: their ids are not given again, and their count goes on.
        forced: the reply is nothing but calls (`ToolCallParser`).
    """

    def __init__(
        self,
        tokenizer: KimiTokenizer,
        *,
        reasoning_open: bool,
        tools: bool | Sequence[Mapping[str, Any]],
        stop: Sequence[str] = (),
        history: CallHistory = NO_CALLS,
        forced: bool = False,
    ) -> None:
        self._names = {token_id: name for name, token_id in tokenizer.special.items()}
        self._detokenizer = tokenizer.detokenizer()
        spelled = THINK_OPEN not in tokenizer.special
        self._reasoning = ReasoningSplitter(is_open=reasoning_open, spelled=spelled)
        declared = () if isinstance(tools, bool) else tools
        quotable = TOOL_MARKERS - tokenizer.special.keys()
        self._calls = ToolCallParser(declared, history, spelled=quotable, forced=forced) if tools else None
        self._stop = StopMatcher(stop)
        self._events: list[OutputEvent] = []
        self.saw_tool_call = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: the answer is complete and generation can be cancelled."""
        return self._stop.stopped

    @property
    def stop_met(self) -> str | None:
        """The stop string that was met."""
        return self._stop.met

    @property
    def reasoning_open(self) -> bool:
        """Whether the reply so far ends inside its reasoning."""
        return self._reasoning.is_open

    def feed(self, token_id: int) -> list[OutputEvent]:
        """Events that became certain with this token."""
        if self.stopped:
            return []
        name = self._names.get(token_id)
        if name is None:
            self._text(self._detokenizer.feed(token_id))
            return self._take()
        self._text(self._detokenizer.flush())
        if name in (THINK_OPEN, THINK_CLOSE):
            self._tag(name)
        elif name in TOOL_MARKERS:
            self._pieces(self._reasoning.flush())
            self._marker(name)
        return self._take()

    def finish(self) -> list[OutputEvent]:
        """Events that were held back, now that the generation has ended."""
        if self.stopped:
            return []
        self._text(self._detokenizer.flush())
        self._pieces(self._reasoning.flush())
        self._end_calls()
        if not self.stopped:
            self._content(self._stop.flush())
        return self._take()

    def _take(self) -> list[OutputEvent]:
        events, self._events = self._events, []
        return events

    def _text(self, text: str) -> None:
        if text:
            self._pieces(self._reasoning.feed(text))

    def _pieces(self, pieces: Sequence[Any]) -> None:
        for piece in pieces:
            if piece.is_marker:
                self._tag(piece.text)
            else:
                self._plain(piece.text)

    def _tag(self, tag: str) -> None:
        opens = tag == THINK_OPEN
        if opens == self._reasoning.is_open:
            # A tag that repeats what is so already is noise, unless it is part of an argument's text.
            if self._calls is not None and self._calls.in_string:
                self._plain(tag)
            return
        if opens and self._calls is not None and self._calls.in_string:
            self._plain(tag)
            return
        self._end_calls()
        if opens:
            self._content(self._stop.flush())
        self._reasoning.is_open = opens

    def _plain(self, text: str) -> None:
        if self._calls is None:
            self._say(text)
            return
        for item in self._calls.feed(text):
            self._item(item)

    def _marker(self, name: str) -> None:
        if self._calls is None:
            self._say(name)
            return
        for item in self._calls.feed_marker(name):
            self._item(item)

    def _end_calls(self) -> None:
        for item in self._calls.finish() if self._calls is not None else ():
            self._item(item)

    def _item(self, item: CallItem) -> None:
        if isinstance(item, str):
            self._say(item)
        elif not self.stopped:
            if isinstance(item, ToolCallBegin):
                self._content(self._stop.flush())
                # A call inside reasoning that was never closed ends the reasoning.
                self._reasoning.is_open = False
                self.saw_tool_call = True
            self._events.append(item)

    def _say(self, text: str) -> None:
        if self._reasoning.is_open:
            self._events.append(ReasoningDelta(text))
        elif not self.stopped:
            self._content(self._stop.feed(text))

    def _content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))


class ReasoningSplitter:
    """Tell reasoning from answer by the think tags.

    Args:
        is_open: whether the reply begins inside reasoning.
        spelled: whether tags arrive as text, because the vocabulary has no tokens for them. Then `<think>` counts only where
            nothing was answered yet and `</think>` only while reasoning; anywhere else they are what the model wrote.
    """

    def __init__(self, *, is_open: bool, spelled: bool) -> None:
        self.is_open = is_open
        self._answered = False
        self._scanner = MarkerScanner((THINK_OPEN, THINK_CLOSE) if spelled else ())

    def feed(self, text: str) -> list[Piece]:
        """Plain text and the tags that count, as markers; a tag does not yet change `is_open`."""
        return self._judge(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """Text that was held back in case it became a tag."""
        return self._judge(self._scanner.flush())

    def _judge(self, pieces: list[Piece]) -> list[Piece]:
        judged: list[Piece] = []
        is_open = self.is_open
        for piece in pieces:
            counts = piece.is_marker and (is_open if piece.text == THINK_CLOSE else not (is_open or self._answered))
            if counts:
                is_open = piece.text == THINK_OPEN
            elif not is_open and not piece.text.isspace():
                self._answered = True
            judged.append(Piece(piece.text, counts))
        return judged
