"""The threads that read and prepare requests, so that the event loop only ever does small pieces of work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive

from exo_kimi.serve.problems import ApiProblem

THREADS = 32  # for the loop's own pool: many wait (for a template's process), few compute
SMALL_BYTES = 2**16  # bodies up to this size take no turns and count towards no bound but the connections'
LARGE_BYTES = 2**20  # requests with larger bodies take turns, because each may take ten times its size in memory

Result = TypeVar("Result")


class Workers:
    """Threads of one server. Work that a client waits for is given up when the client leaves."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def run(self, request: Request, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, computed in a thread.

        Every piece of work must end by itself: a thread that has begun cannot be stopped, only its result is dropped.

        Args:
            request: whose body has been read; tells when its client leaves.
            work: may take long, and holds the GIL only for fractions of a second at a time.

        Raises:
            ApiProblem: 408, which nobody reads: the client left first. The work, if it waited for its turn, is not begun.
        """
        worker = asyncio.ensure_future(self._run(work, large=body_bytes(request) > LARGE_BYTES))
        watcher = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not worker.done():
                raise ApiProblem(408, "the client left before its request was prepared", code="request_timeout")
            return worker.result()
        finally:
            worker.cancel()
            watcher.cancel()

    async def _run(self, work: Callable[[], Result], *, large: bool) -> Result:
        async with self._turn if large else contextlib.nullcontext():
            return await self._finished(asyncio.get_running_loop().run_in_executor(None, work))

    @staticmethod
    async def _finished(future: asyncio.Future[Result]) -> Result:
        """Waits for the thread also when the client is gone: its turn lasts as long as its memory is taken."""
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.gather(future, return_exceptions=True)
            raise


class HeldBytes:
    """The bytes of all bodies that are being read, beside small ones: a bound for the server as a whole.

    Args:
        limit: most bytes together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @contextlib.asynccontextmanager
    async def counting(self) -> AsyncIterator[Callable[[int], None]]:
        """A function that is told how many bytes one body has so far; they are given back at the end.

        It raises ApiProblem (503) when all bodies together have too many.
        """
        own = 0

        def grow(size: int) -> None:
            nonlocal own
            more = max(0, size - SMALL_BYTES) - own
            if self._held + more > self._limit:
                raise ApiProblem(503, "too many large requests at once", kind="server_error", code="overloaded")
            own += more
            self._held += more

        try:
            yield grow
        finally:
            self._held -= own


def body_bytes(request: Request) -> int:
    """Bytes of the body that `body` has read."""
    return int(getattr(request.state, "body_bytes", 0))


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; to be awaited when the whole body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
