"""Sends the answer of a generation, whole or as server-sent events, and ends the generation when the client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from exo_kimi.dialogue.events import EndEvent, ReplyEvent, WholeReply
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.errors import ExoKimiError
from exo_kimi.serve.answer.formats import Format
from exo_kimi.serve.answer.generation import Generation
from exo_kimi.serve.problems import to_problem
from exo_kimi.serve.workers import disconnected

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
# Characters that some clients take for the end of a line, and so of an event.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x7f\x85\u2028\u2029"}
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
WARNINGS_HEADER = "x-exo-kimi-warnings"
_WARNINGS_HEADER_CHARACTERS = 2000  # proxies refuse an answer with some 8 KB of headers


class AnswerStream(Response):
    """A response that makes itself while it is sent.

    Args:
        start: begins the generation; called once the response is under way.
        style: writes the events.
        prepared: what is generated.
        stream: server-sent events instead of one object.
        include_usage: end the stream with the usage.
        ping_interval_s: a comment is sent when nothing else was for this long (a long prefill), so that no proxy or
            client takes the silence for a broken connection.
    """

    def __init__(
        self,
        start: Callable[[], Generation],
        style: Format,
        prepared: PreparedRequest,
        *,
        stream: bool = False,
        include_usage: bool = False,
        ping_interval_s: float = 5.0,
    ) -> None:
        super().__init__()
        self._start = start
        self._style = style
        self._prepared = prepared
        self._choices = len(prepared.choices)
        self._stream = stream
        self._include_usage = include_usage
        self._ping_interval_s = ping_interval_s
        self._untold = list(prepared.warnings)  # until the first chunk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; returns early, with the generation closed, when the client disconnects."""
        generation = self._start()
        work = self._send_events if self._stream else self._send_whole

        async def finish(response: Response) -> None:
            await response(scope, receive, send)

        worker = asyncio.ensure_future(work(generation, send, finish))
        watcher = asyncio.ensure_future(disconnected(receive))
        try:
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
        self, generation: Generation, send: Send, finish: Callable[[Response], Awaitable[None]]
    ) -> None:
        events: list[list[ReplyEvent]] = [[] for _ in range(self._choices)]
        try:
            while generation.running:
                index, event = await generation.next()
                events[index].append(event)
        except ExoKimiError as error:
            await finish(to_problem(error).response())
            return
        replies = [WholeReply.of(each) for each in events]
        usage = self._prepared.usage([reply.end for reply in replies])
        told = {"warnings": list(warnings)} if (warnings := self._prepared.warnings) else {}
        await finish(JSONResponse({**self._style.whole(replies, usage), **told}, headers=warning_headers(warnings)))

    async def _send_events(
        self, generation: Generation, send: Send, finish: Callable[[Response], Awaitable[None]]
    ) -> None:
        try:
            first = await self._next(generation)  # so that a failure before the first token still has its HTTP status
        except ExoKimiError as error:
            await finish(to_problem(error).response())
            return
        headers = {**STREAM_HEADERS, **warning_headers(self._prepared.warnings)}
        head = Response(headers=headers, media_type="text/event-stream")
        del head.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": head.raw_headers})

        async def put(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        for chunk in self._style.opening(self._choices):
            await put(self._event(chunk))
        try:
            await self._send_replies(generation, first, put)
        except Exception as error:  # noqa: BLE001  # the edge: the status is sent, so the error goes in the stream
            await put(_data(to_problem(error).body()))
        await put(DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_replies(
        self, generation: Generation, item: tuple[int, ReplyEvent] | None, put: Callable[[bytes], Awaitable[None]]
    ) -> None:
        ends: dict[int, EndEvent] = {}
        while True:
            if item is None:
                await put(PING)
            else:
                index, event = item
                if isinstance(event, EndEvent):
                    ends[index] = event
                if (chunk := self._style.chunk(index, event)) is not None:
                    await put(self._event(chunk))
            if not generation.running:
                break
            item = await self._next(generation)
        if self._include_usage:
            usage = self._prepared.usage([ends[index] for index in range(self._choices)])
            await put(_data(self._style.usage_chunk(usage)))

    async def _next(self, generation: Generation) -> tuple[int, ReplyEvent] | None:
        """The next event, or None when none came for the length of a ping interval."""
        try:
            async with asyncio.timeout(self._ping_interval_s):
                return await generation.next()
        except TimeoutError:
            return None

    def _event(self, chunk: dict[str, Any]) -> bytes:
        if self._untold:
            chunk, self._untold = {**chunk, "warnings": self._untold}, []
        # OpenAI: with usage asked for, every chunk but the last has it as null.
        return _data({**chunk, "usage": None} if self._include_usage else chunk)


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """The header that says what of a request was not carried out: the warnings in one line of ASCII; none without any."""
    if not warnings:
        return {}
    line = " ".join("; ".join(warnings).split()).encode("ascii", "backslashreplace").decode("ascii")
    cut = line[: _WARNINGS_HEADER_CHARACTERS - 3] + "..."
    return {WARNINGS_HEADER: line if len(line) <= _WARNINGS_HEADER_CHARACTERS else cut}


def _data(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_ENDS)}\n\n".encode()
