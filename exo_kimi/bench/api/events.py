"""Named server-sent events, as the Responses and Messages APIs stream them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from httpx_sse import EventSource

from exo_kimi.bench.api.caller import Caller, broken, expect, expect_status

Event = dict[str, Any]


@contextmanager
def open_events(api: Caller, path: str, body: Event) -> Iterator[Iterator[Event]]:
    """The events as they come, each of which is named as its `type`; leaving early closes the connection."""
    with api.http.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            broken(f"HTTP {response.status_code}: {response.read()[:160]!r}")
        kind = response.headers.get("content-type", "")
        expect(kind.startswith("text/event-stream"), f"the content type is {kind!r}")
        yield _events(response)


def _events(response: httpx.Response) -> Iterator[Event]:
    for event in EventSource(response).iter_sse():
        if not event.data:
            continue
        expect(event.data != "[DONE]", "the stream ends with [DONE], which this API does not have")
        value = json.loads(event.data)
        expect(value.get("type") == event.event, f"the event {event.event!r} has the type {value.get('type')!r}")
        yield value


def all_events(api: Caller, path: str, body: Event) -> list[Event]:
    """The events of a whole stream."""
    with open_events(api, path, body) as events:
        return list(events)


def refused_body(api: Caller, path: str, body: Event, status: int = 400) -> Event:
    """The JSON of a refusal; streamed, so that a server that accepts it is not waited for."""
    with api.http.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code == 200:
            broken("accepted with 200")
        expect_status(response.status_code, status)
        value = json.loads(response.read())
    expect(isinstance(value, dict), "the refusal is no JSON object")
    return dict(value)


def kinds(events: Iterable[Event]) -> list[str]:
    """The types in order, each once."""
    return list(dict.fromkeys(str(event["type"]) for event in events))
