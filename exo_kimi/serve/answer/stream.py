"""Sends the answer of a generation, whole or as a stream, and ends the generation when the client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from exo_kimi.dialogue.events import EndEvent, ReplyEvent
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.errors import ExoKimiError
from exo_kimi.serve.answer.frames import Frames
from exo_kimi.serve.answer.generation import Generation
from exo_kimi.serve.answer.running import RunningAnswers
from exo_kimi.serve.problems import ApiProblem, to_problem
from exo_kimi.serve.workers import disconnected

log = logging.getLogger(__name__)

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
WARNINGS_HEADER = "x-exo-kimi-warnings"
# A name of the client's own for its request, under which it can be cancelled before anything was answered.
CLIENT_ID_HEADERS = ("x-request-id", "x-client-request-id")
_WARNINGS_HEADER_CHARACTERS = 2000  # proxies refuse an answer with some 8 KB of headers


class AnswerStream(Response):
    """A response that makes itself while it is sent.

    Args:
        start: begins the generation; called once the response is under way.
        frames: writes the events.
        prepared: what is generated.
        running: lists the generation while it runs.
        stream: event after event instead of one object.
        ping_interval_s: a ping is sent when nothing else was for this long (a long prefill), so that no proxy or client
            takes the silence for a broken connection.
    """

    def __init__(
        self,
        start: Callable[[], Generation],
        frames: Frames,
        prepared: PreparedRequest,
        *,
        running: RunningAnswers,
        stream: bool = False,
        ping_interval_s: float = 5.0,
    ) -> None:
        super().__init__()
        self._start = start
        self._frames = frames
        self._prepared = prepared
        self._choices = len(prepared.choices)
        self._running = running
        self._stream = stream
        self._ping_interval_s = ping_interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; returns early, with the generation closed, when the client disconnects."""
        generation = self._start()
        work = self._send_events if self._stream else self._send_whole
        headers = Headers(scope=scope)
        names = (self._frames.id, *(headers.get(name, "") for name in CLIENT_ID_HEADERS))

        async def finish(response: Response) -> None:
            await response(scope, receive, send)

        async def refuse(error: Exception) -> None:
            await finish(to_problem(error).response(scope["path"]))

        worker = asyncio.ensure_future(work(generation, send, finish, refuse))
        watcher = asyncio.ensure_future(disconnected(receive))
        try:
            with self._running.listed(generation, names):
                await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
                if worker.done():
                    worker.result()
        except OSError as error:
            log.info("the client went away while the answer was sent: %s", error)
        finally:
            generation.close()
            worker.cancel()
            watcher.cancel()

    async def _send_whole(
        self,
        generation: Generation,
        send: Send,
        finish: Callable[[Response], Awaitable[None]],
        refuse: Callable[[Exception], Awaitable[None]],
    ) -> None:
        events: list[list[ReplyEvent]] = [[] for _ in range(self._choices)]
        try:
            while generation.running:
                index, event = await generation.next()
                events[index].append(event)
        except (ExoKimiError, ApiProblem) as error:
            await refuse(error)
            return
        usage = self._prepared.usage([_end(each) for each in events])
        headers = warning_headers(self._prepared.warnings)
        await finish(JSONResponse(self._frames.whole(events, usage), headers=headers))

    async def _send_events(
        self,
        generation: Generation,
        send: Send,
        finish: Callable[[Response], Awaitable[None]],
        refuse: Callable[[Exception], Awaitable[None]],
    ) -> None:
        try:
            first = await self._next(generation)  # so that a failure before the first token still has its HTTP status
        except (ExoKimiError, ApiProblem) as error:
            await refuse(error)
            return
        headers = {**STREAM_HEADERS, **warning_headers(self._prepared.warnings)}
        head = Response(headers=headers, media_type=self._frames.media_type)
        del head.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": head.raw_headers})

        async def put(frames: Sequence[bytes]) -> None:
            for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})

        await put(self._frames.opening(generation.cached_tokens))
        try:
            await self._send_replies(generation, first, put)
        except Exception as error:  # noqa: BLE001  # the edge: the status is sent, so the error goes in the stream
            await put(self._frames.failure(to_problem(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_replies(
        self,
        generation: Generation,
        item: tuple[int, ReplyEvent] | None,
        put: Callable[[Sequence[bytes]], Awaitable[None]],
    ) -> None:
        ends: dict[int, EndEvent] = {}
        while True:
            if item is None:
                await put([self._frames.ping()])
            else:
                index, event = item
                if isinstance(event, EndEvent):
                    ends[index] = event
                await put(self._frames.event(index, event))
            if not generation.running:
                break
            item = await self._next(generation)
        await put(self._frames.closing(self._prepared.usage([ends[index] for index in range(self._choices)])))

    async def _next(self, generation: Generation) -> tuple[int, ReplyEvent] | None:
        """The next event, or None when none came for the length of a ping interval."""
        try:
            async with asyncio.timeout(self._ping_interval_s):
                return await generation.next()
        except TimeoutError:
            return None


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """The header that says what of a request was not carried out: the warnings in one line of ASCII; none without any."""
    if not warnings:
        return {}
    line = " ".join("; ".join(warnings).split()).encode("ascii", "backslashreplace").decode("ascii")
    cut = line[: _WARNINGS_HEADER_CHARACTERS - 3] + "..."
    return {WARNINGS_HEADER: line if len(line) <= _WARNINGS_HEADER_CHARACTERS else cut}


def _end(events: Sequence[ReplyEvent]) -> EndEvent:
    return next(event for event in events if isinstance(event, EndEvent))
