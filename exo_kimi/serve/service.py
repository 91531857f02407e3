"""What every door of one server shares: the engine, the model's names, and the way from a prepared request to its answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from starlette.requests import Request

from exo_kimi.checkpoint.vision import NoVision
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.runtime.requests import ServedAdapter, TextEngine
from exo_kimi.serve.answer.formats import Head
from exo_kimi.serve.answer.frames import Frames
from exo_kimi.serve.answer.generation import Generation
from exo_kimi.serve.answer.running import RunningAnswers
from exo_kimi.serve.answer.stream import AnswerStream
from exo_kimi.serve.body import PICTURE_BYTES, TextBound
from exo_kimi.serve.gate import REQUEST_ID
from exo_kimi.serve.metrics import Metrics
from exo_kimi.serve.problems import ApiProblem
from exo_kimi.serve.workers import Workers

LONGEST_CONTEXT = 2**18  # tokens, of every Kimi since K2-Instruct-0905


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedNames:
    """The names under which clients may ask for the one model, or for an adapter of it.

    Args:
        names: at least one; the first is the model's own. Adapters' come last.
        any_name: take every other name, too (clients that ask for names of their own).
        adapters: those of `names` that are adapters'.
    """

    names: tuple[str, ...]
    any_name: bool = False
    adapters: Mapping[str, ServedAdapter] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The model's own name."""
        return self.names[0]

    def resolve(self, asked: str | None) -> str:
        """The name that the answer carries.

        Raises:
            ApiProblem: 404, the name is none of this server's.
        """
        if asked in self.names:
            return asked
        if asked in (None, "", "default") or self.any_name:
            return self.first
        served = ", ".join(f"'{name}'" for name in self.names)
        message = f"the model '{asked[:200]}' does not exist: this server has {served}"
        raise ApiProblem(404, message, param="model", code="model_not_found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One engine behind its doors.

    Args:
        created: seconds since the epoch, of the models.
        fingerprint: `system_fingerprint` of the answers.
    """

    engine: TextEngine
    speaker: Speaker
    metrics: Metrics
    names: ServedNames
    ping_interval_s: float
    created: int
    fingerprint: str
    running: RunningAnswers = field(default_factory=RunningAnswers)
    workers: Workers = field(default_factory=Workers)

    @property
    def context(self) -> int:
        """In tokens; until the stages have told, that of the longest Kimi."""
        return self.engine.snapshot().context or LONGEST_CONTEXT

    def text_bound(self) -> TextBound:
        """The most text of a request, as the engine is now."""
        longest = self.speaker.tokenizer.longest_token_bytes
        return TextBound(context=self.context, token_bytes=longest, picture_bytes=self.picture_bytes)

    @property
    def picture_bytes(self) -> int:
        """What a request may hold beside its text."""
        return 0 if isinstance(self.speaker.pictures, NoVision) else PICTURE_BYTES

    async def prepared(
        self, request: Request, prepare: Callable[..., PreparedRequest], *, model: str
    ) -> PreparedRequest:
        """What `prepare(speaker, context=...)` makes of a request, off the event loop and for as long as the client waits; its
        sequences have the answer's `x-request-id`, and the adapter that `model`, a name of `names`, stands for."""
        prepared = await self.workers.run(request, partial(prepare, self.speaker, context=self.context))
        return prepared.named(request.scope[REQUEST_ID]).through(self.names.adapters.get(model))

    def head(self, prefix: str, model: str, *, separator: str = "-") -> Head:
        """A fresh head of an answer; `model` is the name that was asked for."""
        return Head(
            id=f"{prefix}{separator}{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model,
            fingerprint=self.fingerprint,
        )

    def answer(
        self, prepared: PreparedRequest, write: Callable[[PreparedRequest], Frames], *, stream: bool
    ) -> AnswerStream:
        """The response that generates while it is sent.

        Args:
            prepared: what to generate.
            write: makes the door's frames, once the engine has had its say on the request.
            stream: event after event instead of one object.

        Raises:
            ExoKimiError: the engine would not admit it.
        """
        checked = prepared.checked(self.engine)
        start: Callable[[], Generation] = partial(Generation, self.engine, checked.choices, self.metrics)
        return AnswerStream(
            start,
            write(checked),
            checked,
            running=self.running,
            stream=stream,
            ping_interval_s=self.ping_interval_s,
        )
