"""Connections that cannot wear the server out: deadlines for heads and bodies, a bound on their number, a quiet log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from exo_kimi.runtime.descriptors import descriptor_limit
from exo_kimi.serve.problems import ApiProblem

HEAD_S = 10.0  # from the first byte (or the connection) to the end of the headers
BODY_S = 30.0  # for a body, beside what its bytes need at the least rate
BODY_BYTES_PER_S = 32 * 2**10
MAX_CONNECTIONS = 2048
MAX_BACKLOG = 1024
LOG_EVERY_S = 60.0

log = logging.getLogger(__name__)


class BoundedState(ServerState):
    """uvicorn's state of a server, with the connections whose request is not whole yet, oldest first.

    Args:
        descriptors: the process' soft limit; half of it may be connections.
    """

    def __init__(self, descriptors: int) -> None:
        super().__init__()
        self.max_connections = max(8, min(MAX_CONNECTIONS, descriptors // 2))
        # So many are accepted at once before the first is counted: they must fit beside those that are there.
        self.backlog = max(8, min(MAX_BACKLOG, descriptors // 4))
        self.half_open: dict[BoundedProtocol, None] = {}
        self.full = RareLog("the server had its %d connections; the oldest unfinished requests were closed")


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

    When all connections are taken, a new one takes the place of the oldest whose request is not whole. Answers have no
    deadline: a stream lasts as long as it is read, and waits in a bounded buffer while it is not.
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Makes room for the connection and begins to wait for a head."""
        super().connection_made(transport)
        state = self.server_state
        if len(self.connections) > state.max_connections:
            state.full(state.max_connections)
            oldest = next(iter(state.half_open), None)
            if oldest is None:
                self._refuse(ApiProblem(503, "too many connections", kind="server_error", code="overloaded"))
                return
            oldest.end()
        self._follow(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting."""
        self._stop_waiting()
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
        self._refuse(ApiProblem(400, msg, code="invalid_http"))

    def end(self) -> None:
        """Closes without an answer and without waiting for the client."""
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
            self.server_state.half_open[self] = None
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
            self.end()  # never said a word
        else:
            what = "body" if body else "headers"
            self._refuse(ApiProblem(408, f"the {what} of the request did not arrive in time", code="request_timeout"))

    def _refuse(self, problem: ApiProblem) -> None:
        """Answers if nothing has been answered yet, and closes; the app, if it reads, sees the client gone."""
        self._stop_waiting()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            data = json.dumps(problem.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(data)).encode()),
                (b"connection", b"close"),
            ]
            reason = STATUS_PHRASES[problem.status]
            response = h11.Response(status_code=problem.status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _stop_waiting(self) -> None:
        self.server_state.half_open.pop(self, None)
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
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
