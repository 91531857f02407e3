"""The choices of one API request on the engine, all at once, stopped when nobody listens any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

from exo_kimi.dialogue.events import EndEvent, ReplyEvent
from exo_kimi.dialogue.prepare import Choice
from exo_kimi.errors import RequestError
from exo_kimi.runtime.requests import TextEngine, TokenEvent
from exo_kimi.serve.problems import ApiProblem

MOST_BEHIND_EVENTS = 4096  # each may hold 20 logprobs, some 4 KB


class Observer(Protocol):
    """Hears of the moments that latencies are made of."""

    def first_token(self, seconds: float) -> None:
        """The first token of a request came after this time."""
        ...

    def queued(self, seconds: float) -> None:
        """A sequence waited for its first step for so long."""
        ...

    def between_tokens(self, seconds: float) -> None:
        """A token of a sequence came so long after the one before it."""
        ...

    def finished(self, outcome: str, seconds: float) -> None:
        """The request ended as `ok`, `failed` or `cancelled`, this long after it began."""
        ...


class Generation:
    """The choices of one request in flight.

    Each choice runs in a task of its own, outside of the task of the HTTP response: a response is cancelled in a way that
    does not let it wait, and the engine's generator must be closed with waiting.

    Args:
        engine: makes the tokens.
        choices: the sequences, by choice index.
        observer: told of the first token and of the end.
    """

    def __init__(self, engine: TextEngine, choices: Sequence[Choice], observer: Observer) -> None:
        self._engine = engine
        self._observer = observer
        self._begun_s = time.monotonic()
        self._open = len(choices)
        self._names = frozenset(choice.request.request_id for choice in choices)
        self._cached_tokens: int | None = None
        self._closed = False
        self._queue: asyncio.Queue[tuple[int, ReplyEvent] | BaseException] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._run(index, choice)) for index, choice in enumerate(choices)]
        for task in self._tasks:
            task.add_done_callback(self._hand_over)

    async def next(self) -> tuple[int, ReplyEvent]:
        """The next event of any choice; to be called while `running`. May be cancelled without losing an event.

        Raises:
            ExoKimiError: what the engine raised; the other choices are cancelled.
            ApiProblem: what `fail` was given.
        """
        item = await self._queue.get()
        if isinstance(item, BaseException):
            self.close("cancelled" if isinstance(item, ApiProblem) else "failed")
            raise item
        if isinstance(item[1], EndEvent):
            self._open -= 1
            if not self._open:
                self.close("ok")
        return item

    @property
    def running(self) -> bool:
        """Whether more events are to come."""
        return self._open > 0

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, those that a cache holds, as far as it is known yet: exactly, from the first token on."""
        if self._cached_tokens is not None:
            return self._cached_tokens
        under_way = (each for each in self._engine.snapshot().requests if each.request_id in self._names)
        return min((each.cached_tokens for each in under_way), default=0)

    def fail(self, error: Exception) -> None:
        """End all choices; whoever awaits `next` raises the error."""
        self._queue.put_nowait(error)

    def close(self, outcome: str = "cancelled") -> None:
        """Cancel what still runs, on every stage; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._observer.finished(outcome, time.monotonic() - self._begun_s)
        if outcome != "ok":
            for task in self._tasks:
                task.cancel()

    async def _run(self, index: int, choice: Choice) -> None:
        before_s: float | None = None
        async with aclosing(choice.generate(self._engine)) as steps:
            async for token, events in steps:
                if token is not None:
                    before_s = self._observe(token, before_s)
                if token is not None and self._cached_tokens is None:
                    self._cached_tokens = token.cached_tokens
                    self._observer.first_token(time.monotonic() - self._begun_s)
                for event in events:
                    self._queue.put_nowait((index, event))
                if self._queue.qsize() > MOST_BEHIND_EVENTS:
                    raise _not_read()

    def _observe(self, token: TokenEvent, before_s: float | None) -> float:
        """Tell the latencies of a token; when it came."""
        now_s = time.monotonic()
        if before_s is None:
            self._observer.queued(token.queue_s)
        else:
            self._observer.between_tokens(now_s - before_s)
        return now_s

    def _hand_over(self, task: asyncio.Task[None]) -> None:
        """A choice that failed: whoever awaits `next` raises the error."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._queue.put_nowait(error)


def _not_read() -> RequestError:
    return RequestError(
        "the stream was ended: its client did not read it",
        code="stream_not_read",
        expected=f"at most {MOST_BEHIND_EVENTS} events waiting for it",
    )
