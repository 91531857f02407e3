"""Connections that cannot wear the server out: deadlines for heads and bodies, a bound on their number, a quiet log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from exo_kimi.errors import machine_error
from exo_kimi.runtime.descriptors import descriptor_limit
from exo_kimi.serve.gate import REQUEST_ID, REQUEST_ID_HEADERS, new_request_id
from exo_kimi.serve.problems import ApiProblem

HEAD_S = 10.0  # from the first byte (or the connection) to the end of the headers
BODY_S = 30.0  # for a body, beside what its bytes need at the least rate
BODY_BYTES_PER_S = 32 * 2**10
WRITE_S = 60.0  # in which a client takes some of what waits for it
MAX_CONNECTIONS = 2048
BACKLOG = 2048
# asyncio accepts so many before any is counted. And where no descriptor is left, up to Python 3.13 it fails as often at once, and
# sets a timer at each failure: with a backlog of 1,024, three seconds of that were 88,000 failures and 6 MB.
ACCEPTED_AT_ONCE = 1
LOG_EVERY_S = 60.0

ClosedReason = Literal["headers_timeout", "body_timeout", "silent", "unread", "gave_way", "too_many", "invalid_http"]
"""Why a connection was closed: too slow with its request, never said a word, never read its answer, made room for another,
found none, did not speak HTTP."""

log = logging.getLogger(__name__)


class BoundedState(ServerState):
    """uvicorn's state of a server, with the connections whose request is not whole yet, oldest first.

    Args:
        descriptors: the process' soft limit; half of it may be connections.
        closed: told why a connection was closed before its request reached the app, or its answer the client.
    """

    def __init__(self, descriptors: int, closed: Callable[[ClosedReason], None] = lambda _: None) -> None:
        super().__init__()
        self.closed = closed
        self.max_connections = max(8, min(MAX_CONNECTIONS, descriptors // 2))
        self.half_open: dict[BoundedProtocol, None] = {}
        self.uploads: dict[BoundedProtocol, None] = {}
        self.full = RareLog("the server had its %d connections; the oldest unfinished requests were closed")

    def most_dispensable(self) -> BoundedProtocol | None:
        """The connection that gives way to a new one: the oldest without its headers, else the upload that is furthest
        behind the rate that is asked of it. An honest upload, however long, is ahead of it."""
        oldest = next(iter(self.half_open), None)
        return oldest or min(self.uploads, key=BoundedProtocol.credit_bytes, default=None)


class RareLog:
    """A warning that is written at once, and then at most every minute with a count.

    Args:
        message: has one `%d`.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._count = 0
        self._next_s = 0.0

    def __call__(self, value: int) -> None:
        """Counts, and writes when it is time."""
        self._count += 1
        if time.monotonic() >= self._next_s:
            log.warning(self._message + " (%d times)", value, self._count)
            self._count, self._next_s = 0, time.monotonic() + LOG_EVERY_S


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting: a head or body that is too slow gets 408 and its connection is closed.

    When all connections are taken, a new one takes the place of one whose request is not whole. Answers have no deadline: a
    stream lasts as long as it is read, waits in a bounded buffer while it is not, and ends when nothing of it was taken for a
    minute. Every refusal has a request id, and is counted by its reason.
    """

    server_state: BoundedState

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._awaited: tuple[object, object] | None = None
        self._since_s = 0.0
        self._received_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Makes room for the connection and begins to wait for a head."""
        super().connection_made(transport)
        state = self.server_state
        if len(self.connections) > state.max_connections:
            state.full(state.max_connections)
            dispensable = state.most_dispensable()
            if dispensable is None:
                problem = ApiProblem(503, "too many connections", kind="server_error", code="overloaded")
                self._refuse(problem, "too_many")
                return
            dispensable.end("gave_way")
        self._follow(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting."""
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it after an error

    def data_received(self, data: bytes) -> None:
        """Takes bytes, and sees whether the request is whole."""
        super().data_received(data)
        self._follow(len(data))

    def on_response_complete(self) -> None:
        """Goes on with what came behind the request."""
        super().on_response_complete()
        self._follow(0)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP as every other refusal is answered."""
        self._refuse(ApiProblem(400, msg, code="invalid_http"), "invalid_http")

    def pause_writing(self) -> None:
        """The client does not read: begins to watch whether it will."""
        super().pause_writing()
        self._watch_reader(None)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop_watching()
        super().resume_writing()

    def credit_bytes(self) -> float:
        """How far an upload is ahead of the least rate; negative behind it."""
        return self._received_bytes - BODY_BYTES_PER_S * (self.loop.time() - self._since_s)

    def end(self, reason: ClosedReason) -> None:
        """Closes without an answer and without waiting for the client."""
        self.server_state.closed(reason)
        self._stop_waiting()
        self.connections.discard(self)
        self.transport.abort()

    def _follow(self, count: int) -> None:
        awaited = self._what_is_awaited()
        if awaited is None:
            self._stop_waiting()
            return
        self._received_bytes += count
        if awaited != self._awaited:
            self._stop_waiting()
            self._awaited, self._since_s, self._received_bytes = awaited, self.loop.time(), 0
            state = self.server_state
            waiting = state.uploads if self.conn.their_state is h11.SEND_BODY else state.half_open
            waiting[self] = None
            self._check_deadline()

    def _what_is_awaited(self) -> tuple[object, object] | None:
        """`(h11's state, the cycle)` while bytes of a request are missing."""
        state = self.conn.their_state
        begun = self.cycle is None or bool(self.conn.trailing_data[0])  # else it is idle, which uvicorn ends
        if self.transport.is_closing() or not (state is h11.SEND_BODY or (state is h11.IDLE and begun)):
            return None
        return state, self.cycle

    def _check_deadline(self) -> None:
        body = self.conn.their_state is h11.SEND_BODY
        allowed_s = BODY_S + self._received_bytes / BODY_BYTES_PER_S if body else HEAD_S
        left_s = self._since_s + allowed_s - self.loop.time()
        if body and self.flow.read_paused:
            left_s = max(left_s, 1.0)  # it is us who do not read
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._check_deadline)
        elif not body and not self.conn.trailing_data[0]:
            self.end("silent")  # never said a word
        else:
            what = "body" if body else "headers"
            problem = ApiProblem(408, f"the {what} of the request did not arrive in time", code="request_timeout")
            self._refuse(problem, "body_timeout" if body else "headers_timeout")

    def _watch_reader(self, left_bytes: int | None) -> None:
        """Ends a connection of whose answer nothing was taken since the last look, when so much was left."""
        now_bytes = self.transport.get_write_buffer_size()
        if left_bytes is not None and now_bytes >= left_bytes:
            self.end("unread")
            return
        self._unread = self.loop.call_later(WRITE_S, self._watch_reader, now_bytes)

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _unsupported_upgrade_warning(self) -> None:
        """A request to speak another protocol is answered in this one, and is no news for the log."""

    def _refuse(self, problem: ApiProblem, reason: ClosedReason) -> None:
        """Answers if nothing has been answered yet, and closes; the app, if it reads, sees the client gone."""
        self.server_state.closed(reason)
        self._stop_waiting()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            data = json.dumps(problem.body()).encode()
            reading = self.cycle is not None and not self.cycle.response_complete
            request_id = str(self.cycle.scope.get(REQUEST_ID, "") if reading else "") or new_request_id()
            log.debug("%s %d %s", request_id, problem.status, problem.message)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(data)).encode()),
                (b"connection", b"close"),
                *((name, request_id.encode()) for name in REQUEST_ID_HEADERS),
            ]
            phrase = STATUS_PHRASES[problem.status]
            response = h11.Response(status_code=problem.status, headers=headers, reason=phrase)
            for event in (response, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _stop_waiting(self) -> None:
        self.server_state.half_open.pop(self, None)
        self.server_state.uploads.pop(self, None)
        self._awaited = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def quiet_accept_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log that no descriptor is left for a connection rarely, with a count; asyncio itself waits a second each time."""
    out = RareLog("no descriptor is left for new connections (the limit is %d)")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" in context.get("message", ""):
            out(descriptor_limit())
        elif (known := machine_error(context.get("exception") or Exception())) is not None:
            log.warning("the machine refused a callback of the loop: %s", known.what)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
