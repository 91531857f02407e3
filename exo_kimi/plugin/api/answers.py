"""Watches the answers of exo's API about Kimis, and answers with our words and a status where exo would with nothing.

What exo b5375f8ce and v1.0.71 do with an error chunk: without streaming they have sent `200 OK` and send no byte; a stream of
`/v1/messages` or `/v1/responses` ends as a perfect empty message; `/ollama/api/generate` ends without words; `/bench` says
`Internal Server Error`. Here the chunk stream ends at the error, what exo writes after that is dropped, and the error is sent in
its place. The head of an answer is held back until the model has begun, so that a refusal still has its status.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from exo_kimi.plugin.api.refusal import INTERNAL, Refusal
from exo_kimi.plugin.api.shapes import ErrorShape, shape_of
from exo_kimi.plugin.control.model_names import names_a_kimi

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HOLD_S = 5.0
"""How long the head of a stream waits for the model to begin; exo sends a comment after 10 s of silence."""
RETRY_AFTER_S = 5
RAW_ARGUMENTS = "raw_arguments"
_STREAMS = (b"text/event-stream", b"application/x-ndjson")


@dataclass(slots=True)
class Answering:
    """What is known of the answer to one HTTP request while exo makes it.

    Args:
        path: of the request.
        command_id: exo's id of the request; None until it is one that a Kimi answers.
        refusal: why there is no answer, or no more of it.
        begun: set once the model has begun, or failed.
    """

    path: str
    command_id: str | None = None
    refusal: Refusal | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, refusal: Refusal) -> None:
        """Keep the reason."""
        self.refusal = refusal
        self.begun.set()


_answering: ContextVar[Answering | None] = ContextVar("exo_kimi_answering", default=None)


class AnswerErrors:
    """ASGI middleware, next to exo's routes.

    Args:
        app: exo's routes.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Hand on what is not a request to a Kimi."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        answering = Answering(scope["path"])
        _answering.set(answering)
        held = _HeldAnswer(answering, shape_of(scope["path"]), send)
        try:
            await self._app(scope, receive, held.send)
            await held.release()
        except Exception as error:
            if answering.command_id is None:
                raise
            if answering.refusal is None:
                logger.exception("exo could not write the answer %s", answering.command_id)
            await held.fail(answering.refusal or _unwritten(error))
        finally:
            held.close()


def watch_chunks(chunk_stream: Callable[[Any, Any], AsyncGenerator[Any, None]]) -> Callable[..., AsyncIterator[Any]]:
    """exo's `API._token_chunk_stream`, which ends where a Kimi's stream holds an error or breaks off, and notes why."""

    @functools.wraps(chunk_stream)
    def _token_chunk_stream(self: Any, command_id: Any) -> AsyncIterator[Any]:
        chunks, answering = chunk_stream(self, command_id), _answering.get()
        if answering is None or answering.command_id != str(command_id):
            return chunks
        return _watched(chunks, answering)

    return _token_chunk_stream


def watch_sending(send_generation: Callable[[Any, Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """exo's `API._send_text_generation_with_images`, which tells of requests that a Kimi answers."""

    @functools.wraps(send_generation)
    async def _send_text_generation_with_images(self: Any, task_params: Any) -> Any:
        command, answering = await send_generation(self, task_params), _answering.get()
        if answering is not None and names_a_kimi(str(task_params.model)):
            answering.command_id = str(command.command_id)
        return command

    return _send_text_generation_with_images


def with_answer_errors(setup: Callable[[Any], None]) -> Callable[[Any], None]:
    """exo's `API._setup_exception_handlers`, with our middleware next to the routes."""

    @functools.wraps(setup)
    def _setup_exception_handlers(self: Any) -> None:
        from starlette.middleware import Middleware

        setup(self)
        self.app.user_middleware.append(Middleware(AnswerErrors))  # innermost: exo's own never see the exception

    return _setup_exception_handlers


async def _watched(chunks: AsyncGenerator[Any, None], answering: Answering) -> AsyncGenerator[Any, None]:
    complete = False
    async with aclosing(chunks):  # exo's generator tells its master in the end
        async for chunk in chunks:
            reason = getattr(chunk, "finish_reason", None)
            if reason == "error":
                # Not raised: in exo's keep-alive an exception would cancel the task that sends the answer.
                answering.fail(Refusal.from_text(str(chunk.error_message or "")))
                return
            complete = complete or reason is not None
            answering.begun.set()
            yield _with_object_arguments(chunk) if answering.path.endswith("/v1/messages") else chunk
    if not complete:
        message = (
            "exo ended the answer before the model did: the request was cancelled, its instance deleted, or exo stops"
        )
        answering.fail(Refusal(status=503, code="answer_broken_off", message=message))


def _with_object_arguments(chunk: Any) -> Any:
    """Anthropic's tool input is an object, and exo's adapter fails at what is none: a call whose arguments the model wrote wrong,
    or could not finish, has them as one text, so that the client can say what is wrong with them."""
    calls = getattr(chunk, "tool_calls", None)
    if not calls or all(_is_object(call.arguments) for call in calls):
        return chunk
    kept = [
        call
        if _is_object(call.arguments)
        else call.model_copy(update={"arguments": json.dumps({RAW_ARGUMENTS: call.arguments})})
        for call in calls
    ]
    return chunk.model_copy(update={"tool_calls": kept})


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _unwritten(error: Exception) -> Refusal:
    return Refusal(
        status=500, code=INTERNAL, message=f"exo could not write the model's answer: {type(error).__name__}: {error}"
    )


class _HeldAnswer:
    """The messages of one HTTP answer: the first wait until it is known whether there will be an answer.

    Args:
        answering: tells whether the model has begun.
        shape: of an error on this route.
        send: where messages go.
    """

    def __init__(self, answering: Answering, shape: ErrorShape, send: Send) -> None:
        self._answering = answering
        self._shape = shape
        self._send = send
        self._held: list[Message] = []
        self._streams = self._released = self._complete = False
        self._events = 0
        self._in_order = asyncio.Lock()
        self._timer: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        """Send, or keep until `release`."""
        if self._answering.command_id is None:  # not an answer of a Kimi
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            self._streams = dict(message["headers"]).get(b"content-type", b"").split(b";")[0] in _STREAMS
            if self._streams:
                self._timer = asyncio.create_task(self._release_when_begun())
        body = message.get("body", b"")
        if (refusal := self._answering.refusal) is not None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self.fail(refusal)
            return
        self._events += body.count(b"data: ")
        self._held.append(message)
        # Without streaming, the body comes in one piece, at the end.
        if self._released or (self._answering.begun.is_set() if self._streams else body):
            await self.release()

    async def release(self) -> None:
        """Send what was kept, and from now on everything at once."""
        async with self._in_order:
            self._released = self._released or bool(self._held)
            while self._held:
                message = self._held.pop(0)
                await self._send(message)
                self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def fail(self, refusal: Refusal) -> None:
        """Answer with the error: as a whole with its status, or as the last event of a stream."""
        if self._complete:
            return
        if not self._released:
            self._complete = True
            self._held.clear()
            await self._send_whole(refusal)
            return
        await self.release()
        self._complete = True
        event = self._shape.event(refusal, self._answering.command_id or "", self._events)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    def close(self) -> None:
        """Nothing is to come."""
        if self._timer is not None:
            self._timer.cancel()

    async def _send_whole(self, refusal: Refusal) -> None:
        body = json.dumps(self._shape.body(refusal)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.status == 503:
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _release_when_begun(self) -> None:
        try:
            async with asyncio.timeout(HOLD_S):
                await self._answering.begun.wait()
        except TimeoutError:
            pass
        if self._answering.refusal is None:
            await self.release()
