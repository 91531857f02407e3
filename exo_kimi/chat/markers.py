"""Search for fixed strings (markers, stop strings) in text that arrives in arbitrary pieces."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of plain text, or one whole marker."""

    text: str
    is_marker: bool


class MarkerScanner:
    """Split a stream into plain text and markers, in time that is linear in the text.

    At most a marker's length minus one is held back, and only while it may still become a marker, so the result does not
    depend on where the stream was cut.

    Args:
        markers: the strings to find; where two begin at the same place, the longer one wins.
    """

    def __init__(self, markers: Collection[str]) -> None:
        self._automata = [_Automaton(marker) for marker in dict.fromkeys(markers) if marker]
        first = "".join(re.escape(automaton.marker[0]) for automaton in self._automata)
        self._first = re.compile(f"[{first}]") if first else None
        self._held = ""
        self._found: tuple[int, int] | None = None  # begin and end in what is held; one that begins earlier may follow

    def feed(self, text: str) -> list[Piece]:
        """Pieces completed by `text`; never an empty one."""
        return self._split(text, ended=False)

    def flush(self) -> list[Piece]:
        """The pieces that were held back, now that nothing follows."""
        return self._split("", ended=True)

    def _split(self, text: str, *, ended: bool) -> list[Piece]:
        pieces: list[Piece] = []
        rest, seen = self._held + text, len(self._held)
        while (marker := self._find(rest, seen, ended=ended)) is not None:
            start, end = marker
            if start:
                pieces.append(Piece(rest[:start], False))
            pieces.append(Piece(rest[start:end], True))
            rest, seen = rest[end:], 0
            self._restart()
        shown = len(rest) - (0 if ended else self._longest_begun())
        if shown:
            pieces.append(Piece(rest[:shown], False))
        self._held = rest[shown:]
        if ended:
            self._restart()
        elif self._found is not None:
            self._found = (self._found[0] - shown, self._found[1] - shown)
        return pieces

    def _find(self, text: str, seen: int, *, ended: bool) -> tuple[int, int] | None:
        """Begin and end of the first marker in `text`, of which `seen` characters are known; None while it is not certain."""
        if self._first is None:
            return None
        position = seen
        while position < len(text):
            if self._found is None and not self._longest_begun():
                match = self._first.search(text, position)
                if match is None:
                    return None
                position = match.start()
            for automaton in self._automata:
                if automaton.step(text[position]):
                    start = position + 1 - len(automaton.marker)
                    if self._found is None or (start, -position) < (self._found[0], -self._found[1] + 1):
                        self._found = (start, position + 1)
            position += 1
            if self._found is not None and position - self._longest_begun() > self._found[0]:
                return self._found
        return self._found if ended else None

    def _longest_begun(self) -> int:
        return max((automaton.matched for automaton in self._automata), default=0)

    def _restart(self) -> None:
        self._found = None
        for automaton in self._automata:
            automaton.matched = 0


class _Automaton:
    """Follows one marker: `matched` is the length of its longest begin that the text so far ends with, unless it is whole.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", 1977.
    """

    __slots__ = ("_fallback", "marker", "matched")

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.matched = 0
        self._fallback = _fallbacks(marker)

    def step(self, character: str) -> bool:
        """Takes one character; whether the marker ends with it."""
        matched = self.matched
        while matched and self.marker[matched] != character:
            matched = self._fallback[matched - 1]
        if self.marker[matched] == character:
            matched += 1
        whole = matched == len(self.marker)
        self.matched = self._fallback[matched - 1] if whole else matched
        return whole


@lru_cache(maxsize=256)  # the choices of a request have the same stop strings
def _fallbacks(marker: str) -> Sequence[int]:
    """For each length of a begin of `marker`: of the longest shorter begin that it ends with."""
    fallbacks = array("I", [0]) * len(marker)
    matched = 0
    for index in range(1, len(marker)):
        while matched and marker[matched] != marker[index]:
            matched = fallbacks[matched - 1]
        if marker[matched] == marker[index]:
            matched += 1
        fallbacks[index] = matched
    return fallbacks


class StopMatcher:
    """End a text at the first of some stop strings; the stop string itself is never let through.

    Args:
        stop: the strings; none means that nothing is ever held back.
    """

    def __init__(self, stop: Collection[str]) -> None:
        self._scanner = MarkerScanner(stop)
        self.met: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether the text has ended; `met` is the stop string then."""
        return self.met is not None

    def feed(self, text: str) -> str:
        """The part of the text so far that may be shown and was not shown before."""
        return self._take(self._scanner.feed(text))

    def flush(self) -> str:
        """Text that was held back in case it became a stop string."""
        return self._take(self._scanner.flush())

    def _take(self, pieces: list[Piece]) -> str:
        shown = ""
        for piece in pieces:
            if piece.is_marker and self.met is None:
                self.met = piece.text
            if self.stopped:
                break
            shown += piece.text
        return shown
