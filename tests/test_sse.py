"""Server-sent events: every line end of the standard, no other, in any pieces."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from httpx_sse import SSEError
from hypothesis import given
from hypothesis import strategies as st

from exo_kimi.sse import event_data

NOT_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


class Pieces(httpx.SyncByteStream):
    """A body that arrives in these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces


def read(*pieces: bytes, kind: str = "text/event-stream") -> list[str]:
    return list(event_data(httpx.Response(200, stream=Pieces(list(pieces)), headers={"content-type": kind})))


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("other", NOT_LINE_ENDS)
def test_only_the_line_ends_of_the_standard_end_a_line(end: str, other: str) -> None:
    text = f": ping{end}{end}data: a{other}b{end}{end}data:c{end}data: d{end}{end}"
    assert read(text.encode()) == [f"a{other}b", "c\nd"]


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
    size=st.integers(1, 9),
)
def test_texts_come_through_in_any_pieces(texts: list[str], end: str, size: int) -> None:
    """Pieces cut through characters and through CRLF."""
    body = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    assert read(*(body[start : start + size] for start in range(0, len(body), size))) == texts


def test_comments_and_events_without_data_are_left_out() -> None:
    assert read(b"retry: 3000\n\nid: 7\n\nevent: ping\n\n: comment\n\ndata: x\n\ndata: [DONE]\n\n") == ["x", "[DONE]"]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert read(b"data: a\xffb\n\n") == ["a\ufffdb"]


def test_what_is_not_an_event_stream_is_said() -> None:
    with pytest.raises(SSEError, match="application/json"):
        read(b"{}", kind="application/json")
