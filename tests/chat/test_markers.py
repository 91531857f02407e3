"""Markers are found in any cut of a stream, and nothing is held back for longer than needed."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.chat.markers import MarkerScanner, Piece, StopMatcher

texts = st.text(st.sampled_from("ab<"), max_size=24)
markers = st.lists(st.text(st.sampled_from("ab<"), min_size=1, max_size=5), max_size=4)


def normalised(pieces: list[Piece]) -> list[tuple[str, bool]]:
    grouped = itertools.groupby(pieces, key=lambda piece: piece.is_marker)
    found: list[tuple[str, bool]] = []
    for is_marker, group in grouped:
        found += [(piece.text, True) for piece in group] if is_marker else [("".join(p.text for p in group), False)]
    return found


@given(text=texts, names=markers, data=st.data())
def test_pieces_do_not_depend_on_the_cuts(text: str, names: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    whole, cut = MarkerScanner(names), MarkerScanner(names)
    expected = normalised(whole.feed(text) + whole.flush())
    found: list[Piece] = []
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        found += cut.feed(text[start:end])
    assert normalised(found + cut.flush()) == expected
    assert "".join(piece for piece, _ in expected) == text


@given(text=texts, names=markers)
def test_what_is_held_back_may_still_become_a_marker(text: str, names: list[str]) -> None:
    scanner = MarkerScanner(names)
    shown = "".join(piece.text for piece in scanner.feed(text))
    held = text[len(shown) :]
    assert not held or any(len(name) > len(held) and name.startswith(held) for name in names)


@given(text=texts, names=markers)
def test_the_first_and_longest_marker_wins_as_in_one_search_of_the_whole(text: str, names: list[str]) -> None:
    """The slow oracle: a regular expression over the whole text."""
    scanner = MarkerScanner(names)
    found = normalised(scanner.feed(text) + scanner.flush())
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pieces = [
        Piece(part, bool(number % 2)) for number, part in enumerate(re.split(f"({pattern})" if names else "$^", text))
    ]
    assert found == normalised([piece for piece in pieces if piece.text])


@pytest.mark.timeout(120)
def test_long_stop_strings_cost_linear_time() -> None:
    """Sixteen stop strings of 4096 characters that the text nearly is, again and again: once minutes."""
    matcher = StopMatcher(["a" * 4095 + chr(0x62 + index) for index in range(16)])
    shown = "".join(matcher.feed("a" * 4) for _ in range(20_000))
    assert shown == "a" * (80_000 - 4095)
    assert matcher.flush() == "a" * 4095
