"""Server-sent events of an HTTP response, read by httpx-sse."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from httpx_sse import EventSource


def event_data(response: httpx.Response) -> Iterator[str]:
    """The `data` of each event as it comes; comments, and events without data, are left out.

    CR, LF and CRLF end a line; other line ends, such as U+2028, are part of the text.

    Raises:
        httpx_sse.SSEError: the response is not an event stream. It is an httpx.TransportError.
        httpx.TransportError: the connection broke.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    for event in EventSource(response).iter_sse():
        if event.data:
            yield event.data
