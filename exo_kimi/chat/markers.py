"""Search for fixed strings (markers, stop strings) in text that arrives in arbitrary pieces."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of plain text, or one whole marker."""

    text: str
    is_marker: bool


class MarkerScanner:
    """Split a stream into plain text and markers.

    At most a marker's length minus one is held back, and only while it may still become a marker, so the result does not
    depend on where the stream was cut.

    Args:
        markers: the strings to find; where two begin at the same place, the longer one wins.
    """

    def __init__(self, markers: Collection[str]) -> None:
        ordered = sorted(filter(None, markers), key=len, reverse=True)
        self._markers = ordered
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        """Pieces completed by `text`; never an empty one."""
        if self._pattern is None:
            return [Piece(text, False)] if text else []
        rest = self._held + text
        pieces: list[Piece] = []
        while True:
            hold = len(rest) - self._partial(rest)
            match = self._pattern.search(rest)
            # A match behind the start of what may still become a marker waits for that one to be decided.
            if match is None or match.start() >= hold:
                break
            if match.start():
                pieces.append(Piece(rest[: match.start()], False))
            pieces.append(Piece(match.group(), True))
            rest = rest[match.end() :]
        if hold:
            pieces.append(Piece(rest[:hold], False))
        self._held = rest[hold:]
        return pieces

    def flush(self) -> list[Piece]:
        """The pieces that were held back, now that nothing follows."""
        text, self._held = self._held, ""
        pieces: list[Piece] = []
        while text:
            match = self._pattern.search(text) if self._pattern is not None else None
            end = match.start() if match is not None else len(text)
            if end:
                pieces.append(Piece(text[:end], False))
            if match is not None:
                pieces.append(Piece(match.group(), True))
                end = match.end()
            text = text[end:]
        return pieces

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a marker without being one."""
        longest = min(len(text), len(self._markers[0]) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(len(marker) > length and marker.startswith(tail) for marker in self._markers):
                return length
        return 0


class StopMatcher:
    """End a text at the first of some stop strings; the stop string itself is never let through.

    Args:
        stop: the strings; none means that nothing is ever held back.
    """

    def __init__(self, stop: Collection[str]) -> None:
        self._scanner = MarkerScanner(stop)
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of the text so far that may be shown and was not shown before."""
        return self._take(self._scanner.feed(text))

    def flush(self) -> str:
        """Text that was held back in case it became a stop string."""
        return self._take(self._scanner.flush())

    def _take(self, pieces: list[Piece]) -> str:
        shown = ""
        for piece in pieces:
            self.stopped = self.stopped or piece.is_marker
            if self.stopped:
                break
            shown += piece.text
        return shown
