"""Runs the app on a socket until Ctrl-C, and ends everything in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from exo_kimi.errors import AddressError, EngineStoppedError
from exo_kimi.runtime.descriptors import descriptor_limit
from exo_kimi.runtime.end_signals import EndSignals
from exo_kimi.runtime.requests import TextEngine
from exo_kimi.serve.connections import (
    ACCEPTED_AT_ONCE,
    BACKLOG,
    BoundedProtocol,
    BoundedState,
    quiet_accept_errors,
)
from exo_kimi.serve.loop_watch import LoopWatch
from exo_kimi.serve.progress import show_progress
from exo_kimi.serve.workers import THREADS

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 52415
LEAVE_S = 2  # answers that are still being sent at shutdown get this long

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An app and the engine behind it, which the server closes.

    `wait_failed` waits for what no waiting mends, and raises it: stages that were never there, which is a mistake of the user's
    and not an outage, or an engine that has broken. The server ends with it, for it is up or it is gone, and never in between.
    `connection_closed` is told why the server closed a connection (`connections.ClosedReason`).
    """

    app: FastAPI
    engine: TextEngine
    wait_failed: Callable[[], Awaitable[None]] | None = None
    connection_closed: Callable[[str], None] = lambda _: None


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
        ExoKimiError: what the factory or `wait_failed` raised.
    """
    listener = bind(host, port)
    with (
        contextlib.closing(listener),
        contextlib.suppress(asyncio.CancelledError),
        EndSignals() as signals,
        _runner() as runner,
    ):
        runner.run(_serve(listener, factory, announce, progress, signals))


def _runner() -> asyncio.Runner:
    """One that has its loop."""
    runner = asyncio.Runner()
    try:
        runner.get_loop()
    except OSError as error:
        # No descriptor was left: asyncio's half-made loop would say on the terminal that it cannot be closed.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        traceback.clear_frames(error.__traceback__)
        sys.unraisablehook = hook
        raise
    return runner


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
        listener.listen(BACKLOG)
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
    signals: EndSignals,
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="request"))
    quiet_accept_errors(loop)
    leave = _Leave(asyncio.current_task())
    signals.on_first(lambda: loop.call_soon_threadsafe(leave))
    served = await factory()
    watcher = asyncio.create_task(show_progress(served.engine)) if progress else None
    host, port = listener.getsockname()[:2]
    url = base_url(host, port)
    server = leave.server = _Uvicorn(served, url, announce)
    failing = asyncio.create_task(_watch(served, server, signals))
    try:
        with LoopWatch(loop):
            await server.serve(sockets=[listener])
        if failing.done():
            await failing
    finally:
        failing.cancel()
        if watcher is not None:
            watcher.cancel()
        await served.engine.close()


async def _watch(served: Served, server: uvicorn.Server, signals: EndSignals) -> None:
    try:
        if served.wait_failed is not None:
            await served.wait_failed()
    except EngineStoppedError:
        return  # Ctrl-C came first
    except Exception as error:
        server.should_exit = True
        signals.start(str(error))
        raise


class _Leave:
    """What a signal asks for: the end of serving, or of the start that leads there."""

    def __init__(self, starting: asyncio.Task[None] | None) -> None:
        self.server: uvicorn.Server | None = None
        self._starting = starting

    def __call__(self) -> None:
        if self.server is not None:
            self.server.should_exit = True
        elif self._starting is not None:
            self._starting.cancel()


class _Uvicorn(uvicorn.Server):
    """uvicorn, but the engine ends first: it would wait for answers that only the engine can end."""

    def __init__(self, served: Served, url: str, announce: Callable[[str], None] | None) -> None:
        state = BoundedState(descriptor_limit(), served.connection_closed)
        config = uvicorn.Config(
            served.app,
            http=BoundedProtocol,
            ws="none",
            backlog=ACCEPTED_AT_ONCE,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LEAVE_S,
        )
        super().__init__(config)
        self.server_state = state
        self._served = served
        self._url = url
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)  # asyncio has made it as short as what it accepts at once
        try:
            if self._announce is not None:
                self._announce(self._url)
        except OSError as error:  # standard output is a file on a full disk, or its reader is gone
            log.warning("serving at %s, which could not be printed: %s", self._url, error)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._served.engine.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run`, which hears them whatever this loop does."""
        yield
