"""A call's arguments as they grow: only text that extends a valid JSON object is let through, and slips are repaired.

A model of few bits writes almost JSON: `\\d` in a string, a raw line end, `True`, a comma too many, a brace too many, a code
fence around it all. Each has one meaning and is repaired where it stands, so that the arguments can be sent while they come. What
goes on in a way that is no JSON is held back; at the end json-repair may mend it, if that changes punctuation alone (no letter or
digit is added or lost) and what was sent stays as it is. Else the rest is handed over as the model wrote it.

What was cut is never completed: half a file must not be written.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any, Literal, Self

from json_repair import repair_json

_BLANKS = re.compile(r"\s*")
_FENCE = re.compile(r"\s*```[A-Za-z0-9_-]*\s*")
_MAYBE_FENCE = re.compile(r"\s*`{0,3}[A-Za-z0-9_-]*\s*\Z")
_HARMLESS_TAIL = re.compile(r"[\s}\]]*(?:```)?\s*\Z")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"[A-Za-z_]+")
_NUMBER_CHARS = re.compile(r"[-+.0-9A-Za-z_]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?\Z")
_HEX = re.compile(r"u[0-9a-fA-F]{4}")
_LITERALS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
# What of a text repairs may not touch: its letters and digits, without the ones of escapes.
_ESCAPE_LETTERS = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)

_State = Literal[
    "lead",
    "key",
    "key_or_end",
    "colon",
    "value",
    "value_or_end",
    "comma_or_end",
    "key_text",
    "value_text",
    "done",
    "broken",
]


class ArgumentsReader:
    """Reader of one call's arguments; the texts of `feed` and `finish` join to the arguments."""

    def __init__(self) -> None:
        self._read: list[str] = []
        self._sent: list[str] = []
        self._text = ""  # what was read last, and how much of that was let through, or stands for what was
        self._at = 0
        self._state: _State = "lead"
        self._stack: list[str] = []

    @property
    def begun(self) -> bool:
        """Whether anything but blanks was read."""
        return self._state != "lead" or (bool(self._text) and not self._text.isspace())

    @property
    def complete(self) -> bool:
        """Whether the object has ended, with nothing behind it that matters."""
        return self._state == "done" and _HARMLESS_TAIL.match(self._text, self._at) is not None

    def copy(self) -> Self:
        """A reader that goes on from here by itself."""
        twin = copy.copy(self)
        twin._stack, twin._read, twin._sent = list(self._stack), list(self._read), list(self._sent)
        return twin

    def feed(self, text: str) -> str:
        """The text that is certain now and was not let through before."""
        self._read.append(text)
        self._text, self._at = self._text[self._at :] + text, 0
        out: list[str] = []
        while (piece := self._step()) is not None:
            out.append(piece)
        let = "".join(out)
        self._sent.append(let)
        return let

    def finish(self, *, delimited: bool) -> tuple[str, bool]:
        """The rest of the arguments, and whether all of them are a JSON object.

        Args:
            delimited: the model ended the call itself. Only then may it be repaired.
        """
        if self.complete:
            return "", True
        if not delimited:
            return self._give(self._text[self._at :]), False
        whole = "".join(self._read)
        if whole.strip() in ("", "null"):
            return self._give("{}"), True
        if self._state == "lead" and (inner := _unwrapped(whole)) is not None:
            return self._give(inner), True
        if self._state == "broken" and (rest := _repaired(whole, self.arguments)) is not None:
            return self._give(rest), True
        return self._give(self._text[self._at :]), False

    @property
    def arguments(self) -> str:
        """All that was let through."""
        return "".join(self._sent)

    def _give(self, rest: str) -> str:
        self._at = len(self._text)
        self._sent.append(rest)
        self._state = "broken"
        return rest

    def _step(self) -> str | None:
        """Read one piece of syntax and return what stands for it; None where more must come, or nothing can."""
        match self._state:
            case "done" | "broken":
                return None
            case "lead":
                return self._lead()
            case "key_text" | "value_text":
                return self._string()
            case _:
                return self._structure()

    def _lead(self) -> str | None:
        fence = _FENCE.match(self._text)
        start = fence.end() if fence is not None else self._after_blanks()
        if start == len(self._text) or (fence is None and _MAYBE_FENCE.match(self._text) is not None):
            return None
        if self._text[start] == "{":
            self._stack.append("}")
            return self._took(start + 1, "{", "key_or_end")
        if self._text[start] != '"':  # an object inside of a string is unwrapped at the end
            self._state = "broken"
        return None

    def _string(self) -> str | None:
        plain = _PLAIN.match(self._text, self._at)
        if plain is not None:
            return self._took(plain.end(), plain.group(), self._state)
        rest = len(self._text) - self._at
        if not rest:
            return None
        char = self._text[self._at]
        if char == "\\":
            if rest == 1:
                return None
            return self._escape(self._text[self._at + 1], rest)
        if char != '"':
            return self._took(self._at + 1, _ESCAPES.get(char) or f"\\u{ord(char):04x}", self._state)
        follows = self._after_blanks(self._at + 1)
        if follows == len(self._text):
            return None  # a quote that nothing of JSON follows does not end a string
        is_key = self._state == "key_text"
        if self._text[follows] not in (":" if is_key else f",{self._stack[-1]}"):
            self._state = "broken"
            return None
        return self._took(self._at + 1, '"', "colon" if is_key else "comma_or_end")

    def _escape(self, char: str, rest: int) -> str | None:
        """A backslash and what it escapes; one that escapes nothing is a backslash."""
        if char == "u":
            if rest < 6 and re.fullmatch(r"u[0-9a-fA-F]*", self._text[self._at + 1 :]):
                return None
            if (code := _HEX.match(self._text, self._at + 1)) is not None:
                return self._took(code.end(), "\\" + code.group(), self._state)
        elif char in '"\\/bfnrt':
            return self._took(self._at + 2, "\\" + char, self._state)
        elif char == "'":
            return self._took(self._at + 2, char, self._state)
        return self._took(self._at + 1, "\\\\", self._state)

    def _structure(self) -> str | None:
        start = self._after_blanks()
        if start == len(self._text):
            return None
        blanks, char = self._text[self._at : start], self._text[start]
        if self._state.endswith("_or_end") and char == self._stack[-1]:
            return self._close(start, blanks)
        match self._state:
            case "key" | "key_or_end":
                if char == '"':
                    return self._took(start + 1, f'{blanks}"', "key_text")
            case "colon":
                if char == ":":
                    return self._took(start + 1, f"{blanks}:", "value")
            case "comma_or_end":
                if char == ",":
                    return self._comma(start, blanks)
            case _:
                return self._value(start, blanks, char)
        self._state = "broken"
        return None

    def _comma(self, start: int, blanks: str) -> str | None:
        follows = self._after_blanks(start + 1)
        if follows == len(self._text):
            return None
        if self._text[follows] == self._stack[-1]:  # a comma before the end means nothing
            return self._close(follows, self._text[start + 1 : follows])
        return self._took(start + 1, f"{blanks},", "key" if self._stack[-1] == "}" else "value")

    def _value(self, start: int, blanks: str, char: str) -> str | None:
        if char == '"':
            return self._took(start + 1, f'{blanks}"', "value_text")
        if char in "{[":
            self._stack.append("}" if char == "{" else "]")
            return self._took(start + 1, blanks + char, "key_or_end" if char == "{" else "value_or_end")
        word = (_WORD if char.isalpha() else _NUMBER_CHARS).match(self._text, start)
        if word is None:
            self._state = "broken"
            return None
        if word.end() == len(self._text):
            return None
        value = _LITERALS.get(word.group()) or (word.group() if _NUMBER.match(word.group()) else None)
        if value is None:
            self._state = "broken"
            return None
        return self._took(word.end(), blanks + value, "comma_or_end")

    def _close(self, at: int, blanks: str) -> str:
        end = self._stack.pop()
        return self._took(at + 1, blanks + end, "comma_or_end" if self._stack else "done")

    def _took(self, at: int, written: str, state: _State) -> str:
        self._at, self._state = at, state
        return written

    def _after_blanks(self, at: int | None = None) -> int:
        match = _BLANKS.match(self._text, self._at if at is None else at)
        return match.end() if match is not None else 0


def _unwrapped(text: str) -> str | None:
    """An object that was written as a JSON string, as text."""
    try:
        inner = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(inner, str) or not inner.lstrip().startswith("{"):
        return None
    reader = ArgumentsReader()
    reader.feed(inner)
    return reader.arguments if reader.complete else None


def _repaired(text: str, sent: str) -> str | None:
    """The rest of an object whose begin was sent, or None where no repair is certain."""
    body = text.strip().removesuffix("```").rstrip()
    quotes = _ESCAPE_LETTERS.sub("", body).count('"')
    if not body.endswith("}") or quotes % 2 or any(body.count(a) != body.count(b) for a, b in ("{}", "[]")):
        return None  # it may have been cut
    try:
        value = repair_json(body, return_objects=True)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError, TypeError):
        return None
    body = body[body.find("{") :]
    if not isinstance(value, dict) or _substance(_values(value)) != _substance(body):
        return None
    # An empty text, object or list leaves no letter: none may come out of nothing.
    if written.count('""') > body.count('""') + body.count("''") or any(
        written.count(a) != body.count(a) for a in "{["
    ):
        return None
    return _extension(sent, written)


def _values(value: Any) -> str:
    """Keys and values in order, with the blanks and escapes of text taken out."""
    if isinstance(value, dict):
        return "".join(f"{_plain(key)}{_values(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "".join(map(_values, value))
    return _plain(value) if isinstance(value, str) else json.dumps(value)


def _plain(text: str) -> str:
    return text.replace("\\", "\\\\")


def _substance(text: str) -> str:
    """Letters and digits, the same for Python's literals and JSON's."""
    text = re.sub(r"\bNone\b", "null", re.sub(r"\bTrue\b", "true", re.sub(r"\bFalse\b", "false", text)))
    return "".join(char for char in _ESCAPE_LETTERS.sub("", text) if char.isalnum())


def _extension(sent: str, written: str) -> str | None:
    """What of `written` follows `sent`, blanks between tokens aside; None where it is no continuation."""
    at = 0
    quoted = escaped = False
    for char in sent:
        if not quoted and char.isspace():
            continue
        while not quoted and at < len(written) and written[at].isspace():
            at += 1
        if at == len(written) or written[at] != char:
            return None
        at += 1
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = quoted
        elif char == '"':
            quoted = not quoted
    return written[at:]
