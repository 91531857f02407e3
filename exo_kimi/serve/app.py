"""The HTTP routes: what each reads and may answer, and the steps from a request to its answer."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import exo_kimi
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoKimiError
from exo_kimi.runtime.requests import TextEngine
from exo_kimi.serve.answer.formats import ChatFormat, Format, Head, TextFormat
from exo_kimi.serve.answer.generation import Generation
from exo_kimi.serve.answer.stream import AnswerStream
from exo_kimi.serve.body import MAX_BODY_BYTES, BodyReader, TextBound
from exo_kimi.serve.contract import (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorAnswer,
    HealthReport,
    ModelCard,
    ModelList,
    TextCompletion,
    generation_route,
    openapi_document,
    refusals,
)
from exo_kimi.serve.gate import Gate
from exo_kimi.serve.health import health_report
from exo_kimi.serve.metrics import Metrics
from exo_kimi.serve.problems import ApiProblem, answer_error, answer_http_error
from exo_kimi.serve.request.fields import GenerationFields
from exo_kimi.serve.request.prepare import prepare_chat, prepare_completion
from exo_kimi.serve.request.schemas import ChatRequest, CompletionRequest, parse_chat, parse_completion
from exo_kimi.serve.workers import Workers

PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/docs", "/openapi.json"}
)
LONGEST_CONTEXT = 2**18  # tokens, of every Kimi since K2-Instruct-0905
DOCS_FILES = "/docs-files"  # the page's script and style: nothing is loaded from elsewhere
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    engine: TextEngine,
    speaker: Speaker,
    *,
    model_id: str,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    ping_interval_s: float = 5.0,
    fingerprint: str | None = None,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The API over one engine.

    Args:
        engine: generates tokens; the app never closes it (see `server.run`).
        speaker: of the checkpoint.
        model_id: the one model served.
        api_key: asked of every client when given; /health stays open.
        max_body_bytes: larger bodies get 413.
        ping_interval_s: a silent stream gets a comment this often.
        fingerprint: names the weights; becomes part of `system_fingerprint`.
        hosts: names that this server answers to (`gate.allowed_hosts`); None is all.
    """
    server = _Server(
        engine=engine,
        speaker=speaker,
        metrics=Metrics(engine.snapshot),
        model_id=model_id,
        ping_interval_s=ping_interval_s,
        created=int(time.time()),
        fingerprint=_fingerprint(model_id, fingerprint),
    )
    app = FastAPIOffline(
        title="exo-kimi",
        version=exo_kimi.__version__,
        description=f"OpenAI's chat API, spoken by {model_id}.",
        redoc_url=None,
        static_url=DOCS_FILES,
        generate_unique_id_function=lambda route: route.name,
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.state.bodies = BodyReader(server.workers, server.text_bound, max_bytes=max_body_bytes)
    _add_routes(app, server, guarded=api_key is not None)
    app.openapi = partial(  # type: ignore[method-assign]  # FastAPI's own way to a document of one's own
        openapi_document, app, ChatRequest, CompletionRequest, ChatCompletionChunk
    )
    for kind in (ExoKimiError, ApiProblem, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_middleware(Gate, metrics=server.metrics, paths=PATHS, api_key=api_key, hosts=hosts)
    return app


def _add_routes(app: FastAPI, server: _Server, *, guarded: bool) -> None:
    """Every address, with what it reads and may answer."""
    refused = (401, 403) if guarded else (403,)
    key: Any = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if guarded else []}  # told; `Gate` asks for it
    metrics: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
    }
    unhealthy: dict[int | str, dict[str, Any]] = {
        503: {
            "model": HealthReport | ErrorAnswer,
            "description": "A stage is not ready, and `reason` says which and why; or too many connections.",
        }
    }
    asked = {"model": server.model_id, "max_tokens": 64}
    chat = generation_route(
        body=ChatRequest,
        answer=ChatCompletion,
        chunk=ChatCompletionChunk,
        example={**asked, "messages": [{"role": "user", "content": "What is the capital of Norway?"}]},
        extra=refused,
    )
    text = generation_route(
        body=CompletionRequest,
        answer=TextCompletion,
        chunk=TextCompletion,
        example={**asked, "prompt": "The capital of Norway is"},
        extra=refused,
    )
    app.post("/v1/chat/completions", **chat, **key)(server.chat)
    app.post("/v1/completions", **text, **key)(server.completion)
    app.get("/v1/models", response_model=ModelList, responses=refusals(*refused), **key)(server.models)
    app.get("/v1/models/{model:path}", response_model=ModelCard, responses=refusals(404, *refused), **key)(server.model)
    app.get("/health", response_model=HealthReport, responses={**refusals(403), **unhealthy})(server.health)
    app.get("/metrics", response_class=Response, responses={**metrics, **refusals(*refused)}, **key)(server.prometheus)


async def read_chat(request: Request) -> ChatRequest:
    """The body of a chat request, read and checked by us: FastAPI's reader has no limit and other words."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, parse_chat)


async def read_completion(request: Request) -> CompletionRequest:
    """The body of a text completion request."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, parse_completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """The handlers and what they share."""

    engine: TextEngine
    speaker: Speaker
    metrics: Metrics
    model_id: str
    ping_interval_s: float
    created: int
    fingerprint: str
    workers: Workers = field(default_factory=Workers)

    async def chat(self, request: Request, chat: Annotated[ChatRequest, Depends(read_chat)]) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        self._check_model(chat.model)
        prepared = await self.prepared(request, partial(prepare_chat, chat))
        style = ChatFormat(
            head=self._head("chatcmpl"),
            tokenizer=self.speaker.tokenizer,
            top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )
        return self._answer(chat, prepared, style)

    async def completion(
        self, request: Request, completion: Annotated[CompletionRequest, Depends(read_completion)]
    ) -> Response:
        """Continue one text or several, whole or as server-sent events."""
        self._check_model(completion.model)
        prepared = await self.prepared(request, partial(prepare_completion, completion))
        style = TextFormat(head=self._head("cmpl"), tokenizer=self.speaker.tokenizer, top_logprobs=completion.logprobs)
        return self._answer(completion, prepared, style)

    async def models(self) -> JSONResponse:
        """List the one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, model: str) -> JSONResponse:
        """Tell of one model."""
        if model != self.model_id:
            raise self._unknown_model(model)
        return JSONResponse(self._model_card())

    async def health(self) -> JSONResponse:
        """Tell how the engine and its stages are. Asks for no key."""
        status, report = health_report(self.engine.snapshot(), model=self.model_id, version=exo_kimi.__version__)
        return JSONResponse(report, status_code=status)

    async def prometheus(self) -> Response:
        """Counts and latencies for Prometheus."""
        return Response(self.metrics.text(), headers={"content-type": METRICS_TYPE})

    def text_bound(self) -> TextBound:
        """The most text of a request, as the engine is now."""
        return TextBound(context=self._context(), token_bytes=self.speaker.tokenizer.longest_token_bytes)

    async def prepared(self, request: Request, prepare: Callable[..., PreparedRequest]) -> PreparedRequest:
        """What `prepare(speaker, context=...)` makes of a request, off the event loop and for as long as the client waits."""
        return await self.workers.run(request, partial(prepare, self.speaker, context=self._context()))

    def _context(self) -> int:
        """In tokens; until the stages have told, that of the longest Kimi."""
        return self.engine.snapshot().context or LONGEST_CONTEXT

    def _answer(self, request: GenerationFields, prepared: PreparedRequest, style: Format) -> Response:
        prepared = prepared.checked(self.engine)
        start: Callable[[], Generation] = partial(Generation, self.engine, prepared.choices, self.metrics)
        return AnswerStream(
            start,
            style,
            prepared,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            ping_interval_s=self.ping_interval_s,
        )

    def _check_model(self, asked: str | None) -> None:
        if asked not in (None, "", "default", self.model_id):
            raise self._unknown_model(asked)

    def _unknown_model(self, asked: str) -> ApiProblem:
        message = f"the model '{asked[:200]}' does not exist: this server has '{self.model_id}'"
        return ApiProblem(404, message, param="model", code="model_not_found")

    def _model_card(self) -> dict[str, Any]:
        context = self.engine.snapshot().context
        card = {"id": self.model_id, "object": "model", "created": self.created, "owned_by": "exo-kimi"}
        return {**card, "context_length": context}

    def _head(self, prefix: str) -> Head:
        return Head(
            id=f"{prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.model_id,
            fingerprint=self.fingerprint,
        )


def _fingerprint(model_id: str, weights: str | None) -> str:
    """`system_fingerprint`: equal when the same weights are served by the same version."""
    text = "\0".join((exo_kimi.__version__, model_id, weights or ""))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
