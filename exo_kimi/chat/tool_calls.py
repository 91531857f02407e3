"""Parse the tool calls in a stream of text and markers.

    outside --section begin--> section --call begin--> header --argument begin--> arguments --call end--> section

What is not a valid call comes back as text, marker for marker, so that nothing the model wrote is lost. A marker inside an
unfinished JSON string is taken for text (a model may write about these very markers); when that reading yields no call in the
end, the text is read again from that marker on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from exo_kimi.chat.call_names import PREFIX, DeclaredTools, parse_arguments
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
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] = (),
        history: CallHistory = NO_CALLS,
        *,
        spelled: Collection[str] = TOOL_MARKERS,
    ) -> None:
        self._declared = DeclaredTools(tools)
        self._next_index = history.next_index
        self._used_ids = set(history.used_ids)
        self._calls = 0
        self._scanner = MarkerScanner(spelled)
        self._queue: deque[Piece] = deque()
        self._out: list[CallItem] = []
        self._state: Literal["outside", "section", "header", "arguments"] = "outside"
        # Shown as text only when the section turns out to hold no call: its begin, and blanks between calls.
        self._section_begin = ""
        self._gap = ""
        # Whether the begin was shown, so that the end must be shown too; a call without a section implies one.
        self._section_shown = False
        self._section_implied = False
        # The call being read: its pieces from the begin marker on, where its arguments start among them, and where the
        # first marker stands that was taken for text (0: there is none).
        self._call: list[Piece] = []
        self._header = ""
        self._arguments_at = 0
        self._doubtful_at = 0
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
            self._start_call(piece)
        else:
            self._out.append(piece.text)

    def _section(self, piece: Piece) -> None:
        if not piece.is_marker and piece.text.isspace():
            self._gap += piece.text
        elif piece.is_marker and piece.text == CALL_BEGIN:
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

    def _start_call(self, begin: Piece) -> None:
        self._state = "header"
        self._call = [begin]
        self._header = ""
        self._arguments_at = 0
        self._doubtful_at = 0
        self._doubtful_markers = 0
        self._quoted = self._escaped = False

    def _in_header(self, piece: Piece) -> None:
        if piece.is_marker and piece.text != ARGUMENT_BEGIN:
            self._reject(piece)
            return
        self._call.append(piece)
        if piece.is_marker:
            self._state, self._arguments_at = "arguments", len(self._call)
        else:
            self._header += piece.text
            if len(self._header) > _MAX_HEADER_CHARS:
                self._reject()

    def _in_arguments(self, piece: Piece) -> None:
        if piece.is_marker:
            if self._accept():
                if piece.text != CALL_END:
                    self._queue.appendleft(piece)
                return
            self._doubtful_markers += 1
            if not self._quoted or self._doubtful_markers > _MAX_DOUBTFUL_MARKERS:
                self._reject(piece)
                return
            self._doubtful_at = self._doubtful_at or len(self._call)
        self._call.append(piece)
        for char in piece.text:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = self._quoted
            elif char == '"':
                self._quoted = not self._quoted

    def _accept(self) -> bool:
        """Emit the call if its arguments are complete and its function can be told; False if not."""
        parsed = parse_arguments("".join(piece.text for piece in self._call[self._arguments_at :]))
        if parsed is None:
            return False
        arguments, text = parsed
        resolved = self._declared.resolve(self._header.strip(), arguments)
        if resolved is None:
            return False
        name, index = resolved
        if index is None or f"{PREFIX}{name}:{index}" in self._used_ids:
            index = self._next_index
            while f"{PREFIX}{name}:{index}" in self._used_ids:
                index += 1
        call_id = f"{PREFIX}{name}:{index}"
        self._next_index = max(self._next_index, index + 1)
        number, self._calls = self._calls, self._calls + 1
        self._out += [
            ToolCallBegin(number, call_id, name),
            ToolCallDelta(number, text),
            ToolCallEvent(number, call_id, name, text),
        ]
        self._used_ids.add(call_id)
        self._section_begin = self._gap = ""
        if self._section_implied:
            self._section_shown = False
        self._state = "section"
        return True

    def _arguments_empty(self) -> bool:
        return all(not piece.text or piece.text.isspace() for piece in self._call[self._arguments_at :])

    def _reject(self, ending: Piece | None = None) -> None:
        """Put the call out as text; what followed a doubtful marker is read again."""
        certain = self._doubtful_at or len(self._call)
        following = self._call[certain:] + ([ending] if ending is not None else [])
        self._state = "section"
        self._show("".join(piece.text for piece in self._call[:certain]))
        if following and following[0].text == CALL_END:
            self._show(following.pop(0).text)
        self._queue.extendleft(reversed(following))

    def _show(self, text: str) -> None:
        self._section_shown = self._section_shown or bool(self._section_begin)
        self._out.append(self._section_begin + self._gap + text)
        self._section_begin = self._gap = ""

    def _leave_section(self) -> None:
        self._state, self._section_begin, self._gap = "outside", "", ""

    def _end_of_text(self) -> None:
        """The stream (or the section) ends here: a complete call without an end counts, a cut one is text."""
        if self._state == "arguments" and not self._arguments_empty() and self._accept():
            return
        if self._state in ("header", "arguments"):
            self._reject()
        elif self._state == "section":
            if self._section_begin or self._section_shown:
                self._show("")
            self._leave_section()


def _merged(out: list[CallItem]) -> list[CallItem]:
    """The same with neighbouring texts joined and empty ones dropped."""
    merged: list[CallItem] = []
    for item in out:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        elif item:
            merged.append(item)
    return merged
