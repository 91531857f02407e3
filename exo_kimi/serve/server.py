"""Runs the app on a socket until Ctrl-C, and ends everything in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from exo_kimi.errors import AddressError, EngineStoppedError, ExoKimiError
from exo_kimi.runtime.requests import TextEngine
from exo_kimi.serve.connections import BoundedProtocol, BoundedState, descriptor_limit, quiet_accept_errors
from exo_kimi.serve.progress import show_progress
from exo_kimi.serve.workers import THREADS

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 52415
LEAVE_S = 2  # answers that are still being sent at shutdown get this long
END_S = 4.5  # after the first signal the process ends, whatever runs: a thread that computes cannot be cancelled

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An app and the engine behind it, which the server closes.

    `wait_ready` returns once the weights are loaded for the first time; what it raises ends the server, because a stage
    that was never there is a mistake of the user's, not an outage.
    """

    app: FastAPI
    engine: TextEngine
    wait_ready: Callable[[], Awaitable[None]] | None = None


def run(
    factory: Callable[[], Awaitable[Served]],
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    announce: Callable[[str], None] | None = None,
    progress: bool = True,
) -> None:
    """Serves until Ctrl-C or SIGTERM. Requests in flight then fail with EngineStoppedError and the engine is closed.

    A signal ends it within 5 s whatever runs, a second signal at once.

    Args:
        factory: makes the app inside the event loop; it should return while the weights are still loading, so that
            /health can tell. Called only once the address is ours.
        host: interface to listen on.
        port: 0 takes a free one.
        announce: told the base URL once connections are accepted.
        progress: show loading and long prefills on the terminal.

    Raises:
        AddressError: the address cannot be bound; nothing was loaded.
        ExoKimiError: what the factory, or the first loading of the weights, raised.
    """
    listener = bind(host, port)
    with contextlib.closing(listener), contextlib.suppress(KeyboardInterrupt), _Deadline() as deadline:
        asyncio.run(_serve(listener, factory, announce, progress, deadline))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        AddressError: unknown host, port in use or not allowed.
    """
    where = base_url(host, port)
    if not 0 <= port <= 65535:
        raise AddressError("no such port", expected="0 to 65535", found=port, fix=f"--port {DEFAULT_PORT}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise AddressError("unknown host or port", found=f"{host}:{port} ({error})", fix="--host 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening at once: two sockets that only share an address would both be bound without an error.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"port {port} is in use", where=where, fix="stop the other server, or choose another --port"
            ) from None
        raise AddressError(
            "cannot listen", where=where, found=error.strerror, fix="choose another --host or --port"
        ) from None
    return listener


def base_url(host: str, port: int) -> str:
    """`http://127.0.0.1:52415`, with brackets for IPv6."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _serve(
    listener: socket.socket,
    factory: Callable[[], Awaitable[Served]],
    announce: Callable[[str], None] | None,
    progress: bool,
    deadline: _Deadline,
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="request"))
    quiet_accept_errors(loop)
    served = await factory()
    watcher = asyncio.create_task(show_progress(served.engine)) if progress else None
    host, port = listener.getsockname()[:2]
    url = base_url(host, port)
    server = _Uvicorn(served, lambda: announce and announce(url), deadline)
    first_load = asyncio.create_task(_first_load(served, server))
    try:
        await server.serve(sockets=[listener])
        if first_load.done():
            await first_load
    finally:
        first_load.cancel()
        if watcher is not None:
            watcher.cancel()
        await served.engine.close()


async def _first_load(served: Served, server: uvicorn.Server) -> None:
    try:
        if served.wait_ready is not None:
            await served.wait_ready()
    except EngineStoppedError:
        return  # Ctrl-C came first
    except ExoKimiError:
        server.should_exit = True
        raise


class _Deadline:
    """The end of the process whatever runs: the first signal starts the time, the second ends it at once."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> _Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, former in self._former.items():
            signal.signal(number, former)

    def start(self) -> None:
        """Starts the time, or ends the process if it has been started."""
        if self._timer is not None:
            self._end(1)
        self._timer = threading.Timer(END_S, self._end_late)
        self._timer.daemon = True
        self._timer.start()

    def keep(self, number: int) -> None:
        """Takes a signal over from the loop, which still waits for its threads when it handles no signal any more."""
        if self._timer is not None:
            self._former[number] = signal.signal(number, lambda *_: self._end(1))

    def _end_late(self) -> None:
        log.warning("work that cannot be interrupted still ran %.1f s after the signal: ended without it", END_S)
        self._end(0)

    def _end(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)  # stages end when their socket pair closes


class _Uvicorn(uvicorn.Server):
    """uvicorn, but the engine ends first: it would wait for answers that only the engine can end."""

    def __init__(self, served: Served, announce: Callable[[], object], deadline: _Deadline) -> None:
        state = BoundedState(descriptor_limit())
        config = uvicorn.Config(
            served.app,
            http=BoundedProtocol,
            ws="none",
            backlog=state.backlog,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LEAVE_S,
        )
        super().__init__(config)
        self.server_state = state
        self._served = served
        self._announce = announce
        self._deadline = deadline

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._served.engine.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end `serve` and nothing more: uvicorn itself raises them again when it is done."""
        loop = asyncio.get_running_loop()
        caught = []
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: then signals are not ours
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._leave, number)
                caught.append(number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)
                self._deadline.keep(number)

    def _leave(self, number: int) -> None:
        self._deadline.start()
        self.handle_exit(number, None)
