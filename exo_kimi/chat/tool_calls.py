"""Parse the tool calls in a stream of text and markers.

    outside --section begin--> section --call begin--> header --argument begin--> arguments --call end--> section

A call is announced as soon as its header names a function and its arguments begin; from then on it is a call, whatever follows:
its arguments are sent as they grow (see `arguments`), and nothing that was sent is taken back. A call whose header says nothing
waits for its arguments, which decide.

What is no call comes back as text, marker for marker, so that nothing the model wrote is lost. A marker inside an unfinished JSON
string is taken for text (a model may write about these very markers); when that reading yields no object in the end, the text is
read again from that marker on. White space around calls is structure, not text.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from exo_kimi.chat.arguments import ArgumentsReader
from exo_kimi.chat.call_names import PREFIX, CallMeaning, DeclaredTools
from exo_kimi.chat.events import ToolCallBegin, ToolCallDelta, ToolCallEvent
from exo_kimi.chat.history import NO_CALLS, CallHistory
from exo_kimi.chat.markers import MarkerScanner, Piece

# Some checkpoints write the singular form.
SECTION_BEGIN = frozenset({"<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"})
SECTION_END = frozenset({"<|tool_calls_section_end|>", "<|tool_call_section_end|>"})
CALL_BEGIN = "<|tool_call_begin|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
TOOL_MARKERS = frozenset({*SECTION_BEGIN, *SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END})
_MAX_HEADER_CHARS = 512
_MAX_DOUBTFUL_MARKERS = 64

CallItem = str | ToolCallBegin | ToolCallDelta | ToolCallEvent


class ToolCallParser:
    """Parser of one reply: text and markers in, text and tool calls out, however the stream is cut.

    Args:
        tools: the declared tools, OpenAI-shaped; they help with headers that name no function.
        history: the calls so far: their ids are not given again, and their count goes on.
        spelled: markers that count where they are spelled in text. None that the vocabulary has a control token for belongs
            here: a model that quotes a call (a file, a page) spells its markers, and what it quotes must not be executed.
        forced: the reply is nothing but calls, so that one which its token limit cut is a call too, however short.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] = (),
        history: CallHistory = NO_CALLS,
        *,
        spelled: Collection[str] = TOOL_MARKERS,
        forced: bool = False,
    ) -> None:
        self._declared = DeclaredTools(tools)
        self._forced = forced
        self._next_index = history.next_index
        self._used_ids = set(history.used_ids)
        self._calls = 0
        self._scanner = MarkerScanner(spelled)
        self._queue: deque[Piece] = deque()
        self._out: list[CallItem] = []
        self._state: Literal["outside", "section", "header", "arguments"] = "outside"
        # White space that is text only if text follows, and is dropped where a call stands beside it.
        self._blanks = ""
        self._after_call = False
        # Shown as text only when the section turns out to hold no call: its begin, and blanks between calls.
        self._section_begin = ""
        self._gap = ""
        # Whether the begin was shown, so that the end must be shown too; a call without a section implies one.
        self._section_shown = False
        self._section_implied = False
        self._start_call()

    def _start_call(self, *begin: Piece) -> None:
        # The call being read: its pieces from the begin marker on, what its header means, and once it is announced, its begin.
        self._call = list(begin)
        self._header = ""
        self._named: CallMeaning | None = None
        self._begun: ToolCallBegin | None = None
        self._reader = ArgumentsReader()
        # The pieces from the first marker on that was taken for text: not read as arguments until that proves right.
        self._doubtful: list[Piece] = []
        self._doubtful_markers = 0
        self._quoted = self._escaped = False

    @property
    def in_string(self) -> bool:
        """Whether the stream stands inside a JSON string of a call's arguments."""
        return self._state == "arguments" and self._quoted

    def feed(self, text: str) -> list[CallItem]:
        """Text and calls that became certain with `text`, in order."""
        return self._run(self._scanner.feed(text))

    def feed_marker(self, name: str) -> list[CallItem]:
        """What became certain with the control token of a marker."""
        return self._run([*self._scanner.flush(), Piece(name, True)])

    def finish(self) -> list[CallItem]:
        """Text and calls that were held back, now that nothing follows; the parser can be used again."""
        out = self._run(self._scanner.flush())
        while self._state != "outside":
            self._end_of_text()
            out += self._run([])
        if self._blanks and not self._after_call:
            out.append(self._blanks)
        self._blanks = ""
        return _merged(out)

    def _run(self, pieces: list[Piece]) -> list[CallItem]:
        self._queue.extend(pieces)
        while self._queue:
            piece = self._queue.popleft()
            match self._state:
                case "outside":
                    self._outside(piece)
                case "section":
                    self._section(piece)
                case "header":
                    self._in_header(piece)
                case "arguments":
                    self._in_arguments(piece)
        out, self._out = self._out, []
        return _merged(out)

    def _outside(self, piece: Piece) -> None:
        if piece.is_marker and piece.text in SECTION_BEGIN:
            self._state, self._section_begin = "section", piece.text
            self._section_implied = self._section_shown = False
        elif piece.is_marker and piece.text == CALL_BEGIN:
            self._section_implied = self._section_shown = True
            self._state = "header"
            self._start_call(piece)
        else:
            self._say(piece.text)

    def _section(self, piece: Piece) -> None:
        if not piece.is_marker and piece.text.isspace():
            self._gap += piece.text
        elif piece.is_marker and piece.text == CALL_BEGIN:
            self._state = "header"
            self._start_call(piece)
        elif piece.is_marker and piece.text in SECTION_END:
            if self._section_shown or self._section_begin:
                self._show(piece.text)
            self._leave_section()
        elif piece.is_marker and piece.text in SECTION_BEGIN:
            self._end_of_text()
            self._queue.appendleft(piece)
        else:
            self._show(piece.text)

    def _in_header(self, piece: Piece) -> None:
        if piece.is_marker and piece.text != ARGUMENT_BEGIN:
            self._reject(piece)
            return
        self._call.append(piece)
        if piece.is_marker:
            self._enter_arguments()
            return
        self._header += piece.text
        name, brace, arguments = self._header.partition("{")
        if brace and name.strip():  # the arguments stand right behind the header
            self._header = name.rstrip().removesuffix("```json").removesuffix("```")
            self._enter_arguments()
            self._argue(brace + arguments)
        elif len(self._header) > _MAX_HEADER_CHARS:
            self._reject()

    def _enter_arguments(self) -> None:
        self._state = "arguments"
        # Where the tools are not known, a header that has the form of a name proves nothing yet.
        self._named = self._declared.named(self._header) if self._declared else None

    def _in_arguments(self, piece: Piece) -> None:
        if not piece.is_marker:
            self._call.append(piece)
            if self._doubtful:
                self._doubtful.append(piece)
                self._follow_quotes(piece.text)
            else:
                self._argue(piece.text)
            return
        if self._believe_doubtful() or not self._quoted or self._reader.complete:
            if self._end_call():
                if piece.text != CALL_END:
                    self._queue.appendleft(piece)
            else:
                self._reject(piece)
            return
        self._doubtful_markers += 1
        if self._doubtful_markers > _MAX_DOUBTFUL_MARKERS:
            self._doubt_no_more(piece)
            return
        self._doubtful.append(piece)
        self._call.append(piece)

    def _argue(self, text: str) -> None:
        """Read more of the arguments, and send what is certain."""
        self._follow_quotes(text)
        let = self._reader.feed(text)
        if self._begun is None and self._named is not None and self._reader.begun:
            self._announce(self._named)
        self._send(let)

    def _follow_quotes(self, text: str) -> None:
        for char in text:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = self._quoted
            elif char == '"':
                self._quoted = not self._quoted

    def _announce(self, meaning: CallMeaning) -> None:
        index = meaning.index
        if index is None or f"{PREFIX}{meaning.name}:{index}" in self._used_ids:
            index = self._next_index
            while f"{PREFIX}{meaning.name}:{index}" in self._used_ids:
                index += 1
        self._begun = ToolCallBegin(self._calls, f"{PREFIX}{meaning.name}:{index}", meaning.name)
        self._next_index = max(self._next_index, index + 1)
        self._used_ids.add(self._begun.id)
        self._calls += 1
        self._out.append(self._begun)
        self._section_begin = self._gap = self._blanks = ""
        self._after_call = True
        if self._section_implied:
            self._section_shown = False

    def _send(self, arguments: str) -> None:
        if self._begun is not None and arguments:
            self._out.append(ToolCallDelta(self._begun.index, arguments))

    def _close(self, arguments: str) -> None:
        if self._begun is not None:
            self._out.append(ToolCallEvent(self._begun.index, self._begun.id, self._begun.name, arguments))
        self._state = "section"

    def _end_call(self, *, delimited: bool = True) -> bool:
        """Close the call that ends here; False if it cannot be told which function it means."""
        if self._begun is None and self._named is not None:
            self._announce(self._named)
        rest, complete = self._reader.finish(delimited=delimited)
        arguments = self._reader.arguments
        if self._begun is None:
            meaning = self._meaning(arguments, complete=complete)
            if meaning is None:
                return False
            if meaning.arguments is not None:
                arguments = meaning.arguments if isinstance(meaning.arguments, str) else _json(meaning.arguments)
            self._announce(meaning)
            rest = arguments
        self._send(rest)
        self._close(arguments)
        return True

    def _meaning(self, arguments: str, *, complete: bool) -> CallMeaning | None:
        if complete:
            return self._declared.meant(self._header, json.loads(arguments))
        return None

    def _believe_doubtful(self) -> bool:
        """Take the doubtful markers for text for good, if that makes the arguments whole."""
        if not self._doubtful:
            return False
        trial = self._reader.copy()
        let = trial.feed("".join(piece.text for piece in self._doubtful))
        if not trial.complete:
            return False
        self._reader, self._doubtful = trial, []
        self._send(let)
        return True

    def _doubt_no_more(self, *ending: Piece) -> None:
        """The first doubtful marker was one after all: the call ended there, and what followed is read again."""
        following = [*self._doubtful, *ending]
        certain = len(self._call) - len(self._doubtful)
        self._doubtful = []
        if self._begun is not None:
            self._end_call()
        else:
            self._state = "section"
            self._show("".join(piece.text for piece in self._call[:certain]))
        if following and following[0].text == CALL_END:
            marker = following.pop(0)
            if self._begun is None:
                self._show(marker.text)
        self._queue.extendleft(reversed(following))

    def _reject(self, ending: Piece | None = None) -> None:
        """Put the call out as text."""
        if self._doubtful:
            self._doubt_no_more(*([ending] if ending is not None else []))
            return
        self._state = "section"
        self._show("".join(piece.text for piece in self._call))
        if ending is not None:
            if ending.text == CALL_END:
                self._show(ending.text)
            else:
                self._queue.appendleft(ending)

    def _say(self, text: str) -> None:
        """Text outside of calls, but for white space at its end, which waits for what follows."""
        text = self._blanks + text
        kept = text.rstrip()
        if kept:
            self._out.append(kept)
            self._after_call = False
        self._blanks = text[len(kept) :]

    def _show(self, text: str) -> None:
        self._section_shown = self._section_shown or bool(self._section_begin)
        self._say(self._section_begin + self._gap + text)
        self._section_begin = self._gap = ""

    def _leave_section(self) -> None:
        self._state, self._section_begin, self._gap = "outside", "", ""

    def _end_of_text(self) -> None:
        """The stream (or the section) ends here: a complete or announced call counts, any other cut one is text."""
        if self._state == "section":
            if (self._section_begin or self._section_shown) and not self._forced:
                self._show("")
            self._leave_section()
            return
        if self._state == "arguments":
            if self._believe_doubtful() or self._reader.complete or (self._begun is not None and not self._doubtful):
                if self._end_call(delimited=False):
                    return
            elif self._doubtful:
                self._doubt_no_more()
                return
        if self._forced:
            self._end_forced()
        else:
            self._reject()

    def _end_forced(self) -> None:
        """A call that had to be made and was cut before its arguments began: what its header says, if that is one function."""
        name = self._declared.only
        meaning = self._declared.named(self._header) or (CallMeaning(name=name) if name is not None else None)
        if meaning is not None:
            self._announce(meaning)
            self._close("")
        self._leave_section()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _merged(out: list[CallItem]) -> list[CallItem]:
    """The same with neighbouring texts joined and empty ones dropped."""
    merged: list[CallItem] = []
    for item in out:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        elif item:
            merged.append(item)
    return merged
