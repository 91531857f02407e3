"""The HTTP routes: what each reads and may answer, and the steps from a request to its answer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import exo_kimi
from exo_kimi.dialogue.prepare import PreparedRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoKimiError
from exo_kimi.page.files import PageFile, page_files, page_routes, root_response
from exo_kimi.planner.plan import Plan
from exo_kimi.runtime.requests import ServedAdapter, TextEngine
from exo_kimi.serve import models, page, tokens
from exo_kimi.serve.answer.formats import ChatFormat, Format, TextFormat
from exo_kimi.serve.answer.frames import ChunkFrames
from exo_kimi.serve.answer.stream import WARNINGS_HEADER
from exo_kimi.serve.anthropic import door as anthropic
from exo_kimi.serve.body import MAX_BODY_BYTES, BodyReader
from exo_kimi.serve.contract import (
    CancelledAnswer,
    ChatCompletion,
    ChatCompletionChunk,
    ErrorAnswer,
    HealthReport,
    HealthStatus,
    TextCompletion,
    generation_route,
    openapi_document,
    refusals,
)
from exo_kimi.serve.gate import HAS_KEY, Gate
from exo_kimi.serve.health import health_report
from exo_kimi.serve.metrics import Metrics
from exo_kimi.serve.ollama import door as ollama
from exo_kimi.serve.problems import ApiProblem, ErrorAnswers, answer_error, answer_http_error
from exo_kimi.serve.request.fields import GenerationFields
from exo_kimi.serve.request.prepare import prepare_chat, prepare_completion
from exo_kimi.serve.request.schemas import ChatRequest, CompletionRequest, parse_chat, parse_completion
from exo_kimi.serve.responses import door as responses
from exo_kimi.serve.service import ServedNames, Service

DOCS_FILES = "/docs-files"  # the page's script and style: nothing is loaded from elsewhere
_ROOT: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "text/html")},
        "description": "It runs.",
    },
    304: {"description": "The browser has the page already."},
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    engine: TextEngine,
    speaker: Speaker,
    *,
    model_id: str,
    further_names: Sequence[str] = (),
    any_model: bool = False,
    adapters: Mapping[str, ServedAdapter] | None = None,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    ping_interval_s: float = 5.0,
    fingerprint: str | None = None,
    hosts: frozenset[str] | None = None,
    cors_origins: Sequence[str] = (),
    strict_api: bool = False,
    plan: Plan | None = None,
    ui: bool = True,
) -> FastAPI:
    """The API over one engine.

    Args:
        engine: generates tokens; the app never closes it (see `server.run`).
        speaker: of the checkpoint.
        model_id: the one model served.
        further_names: under which clients may ask for it, too.
        any_model: take any other name.
        adapters: that the engine's stages hold, by the name under which clients ask for them.
        api_key: asked of every client when given; without it, /health only says whether all is well.
        max_body_bytes: larger bodies get 413.
        ping_interval_s: a silent stream gets a ping this often.
        fingerprint: names the weights; becomes part of `system_fingerprint`.
        hosts: names that this server answers to (`gate.allowed_hosts`); None is all.
        cors_origins: of web pages that may call it from a browser (`https://app.example`); `*` is all.
        strict_api: refuse what a chat or text completion asks for and cannot have, rather than leave it out and say so.
        plan: that the stages follow, for the page to show.
        ui: serve the page.
    """
    service = Service(
        engine=engine,
        speaker=speaker,
        metrics=Metrics(engine.snapshot),
        names=ServedNames(
            names=tuple(dict.fromkeys((model_id, *further_names, *(adapters or {})))),
            any_name=any_model,
            adapters=adapters or {},
        ),
        ping_interval_s=ping_interval_s,
        created=int(time.time()),
        fingerprint=_fingerprint(model_id, fingerprint),
    )
    app = FastAPIOffline(
        title="exo-kimi",
        version=exo_kimi.__version__,
        description=f"The APIs of OpenAI, Anthropic and Ollama, spoken by {model_id}.",
        redoc_url=None,
        static_url=DOCS_FILES,
        generate_unique_id_function=lambda route: route.name,
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.state.strict_api = strict_api
    app.state.bodies = BodyReader(
        service.workers, service.text_bound, max_bytes=max_body_bytes, picture_bytes=service.picture_bytes
    )
    files = page_files() if ui else {}
    _add_routes(app, service, guarded=api_key is not None, index=files.get("index.html"), plan=plan)
    app.router.routes.extend(page_routes(files))
    app.state.metrics = service.metrics
    app.openapi = partial(  # type: ignore[method-assign]  # FastAPI's own way to a document of one's own
        openapi_document,
        app,
        *(ChatRequest, CompletionRequest, ChatCompletionChunk),
        *(model for room in (responses, anthropic, ollama, tokens, page) for model in room.MODELS),
    )
    for kind in (ExoKimiError, ApiProblem):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_middleware(ErrorAnswers)
    origins = frozenset(cors_origins)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[WARNINGS_HEADER, "x-request-id", "request-id"],
        )
    paths = frozenset(route.path for route in app.routes if isinstance(route, APIRoute)) | {"/docs", "/openapi.json"}
    app.add_middleware(Gate, metrics=service.metrics, paths=paths, api_key=api_key, hosts=hosts, origins=origins)
    return app


def _add_routes(app: FastAPI, service: Service, *, guarded: bool, index: PageFile | None, plan: Plan | None) -> None:
    """Every address, with what it reads and may answer."""
    refused = (401, 403) if guarded else (403,)
    key: Any = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if guarded else []}  # told; `Gate` asks for it
    metrics: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
    }
    unhealthy: dict[int | str, dict[str, Any]] = {
        503: {
            "model": HealthReport | HealthStatus | ErrorAnswer,
            "description": "A stage is not ready, and `reason` says which and why; or too many connections.",
        }
    }
    asked = {"model": service.names.first, "max_tokens": 64}
    chat = generation_route(
        body=ChatRequest,
        answer=ChatCompletion,
        events=(ChatCompletionChunk, ErrorAnswer),
        example={**asked, "messages": [{"role": "user", "content": "What is the capital of Norway?"}]},
        extra=refused,
    )
    text = generation_route(
        body=CompletionRequest,
        answer=TextCompletion,
        events=(TextCompletion, ErrorAnswer),
        example={**asked, "prompt": "The capital of Norway is"},
        extra=refused,
    )
    door = _CompletionsDoor(service=service, index=index)
    app.post("/v1/chat/completions", **chat, **key)(door.chat)
    app.post("/v1/completions", **text, **key)(door.completion)
    app.post("/v1/cancel/{id}", response_model=CancelledAnswer, responses=refusals(404, *refused), **key)(door.cancel)
    healthy: Any = HealthReport | HealthStatus if guarded else HealthReport
    app.get("/health", response_model=healthy, responses={**refusals(403), **unhealthy})(door.health)
    app.get("/metrics", response_class=Response, responses={**metrics, **refusals(*refused)}, **key)(door.prometheus)
    app.get("/", response_class=Response, responses={**_ROOT, **refusals(403)})(door.root)
    app.head("/", include_in_schema=False)(door.root)
    models.add_routes(app, service, refused, key)
    responses.add_routes(app, service, refused, key)
    anthropic.add_routes(app, service, refused, key)
    ollama.add_routes(app, service, refused, key)
    tokens.add_routes(app, service, refused, key)
    page.add_routes(app, service, refused, key, plan=plan)


async def read_chat(request: Request) -> ChatRequest:
    """The body of a chat request, read and checked by us: FastAPI's reader has no limit and other words."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(parse_chat, strict=request.app.state.strict_api))


async def read_completion(request: Request) -> CompletionRequest:
    """The body of a text completion request."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(parse_completion, strict=request.app.state.strict_api))


@dataclass(frozen=True, slots=True, kw_only=True)
class _CompletionsDoor:
    """OpenAI's completions, the models, and what the server tells of itself."""

    service: Service
    index: PageFile | None

    async def chat(self, request: Request, chat: Annotated[ChatRequest, Depends(read_chat)]) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        model = self.service.names.resolve(chat.model)
        prepared = await self.service.prepared(request, partial(prepare_chat, chat), model=model)
        style = ChatFormat(
            head=self.service.head("chatcmpl", model),
            tokenizer=self.service.speaker.tokenizer,
            top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )
        return self._answer(chat, prepared, style)

    async def completion(
        self, request: Request, completion: Annotated[CompletionRequest, Depends(read_completion)]
    ) -> Response:
        """Continue one text or several, whole or as server-sent events."""
        model = self.service.names.resolve(completion.model)
        prepared = await self.service.prepared(request, partial(prepare_completion, completion), model=model)
        style = TextFormat(
            head=self.service.head("cmpl", model),
            tokenizer=self.service.speaker.tokenizer,
            top_logprobs=completion.logprobs,
        )
        return self._answer(completion, prepared, style)

    async def health(self, request: Request) -> JSONResponse:
        """Tell how the engine and its stages are; without the key, where there is one, only whether all is well."""
        model, snapshot = self.service.names.first, self.service.engine.snapshot()
        status, report = health_report(snapshot, model=model, version=exo_kimi.__version__)
        if not request.scope[HAS_KEY]:
            report = {"status": report["status"]}
        return JSONResponse(report, status_code=status)

    async def prometheus(self) -> Response:
        """Counts and latencies for Prometheus."""
        return Response(self.service.metrics.text(), headers={"content-type": METRICS_TYPE})

    async def cancel(self, id: str) -> JSONResponse:
        """End an answer that is being made, by its id or by the `x-request-id` that its client sent."""
        if not self.service.running.cancel(id):
            raise ApiProblem(404, f"no answer with the id '{id[:200]}' is being made", param="id", code="not_found")
        return JSONResponse({"id": id, "cancelled": True})

    async def root(self, request: Request) -> Response:
        """The page for a browser, else a line that tells that the server is there. Asks for no key."""
        return root_response(request, self.index)

    def _answer(self, request: GenerationFields, prepared: PreparedRequest, style: Format) -> Response:
        def write(checked: PreparedRequest) -> ChunkFrames:
            count = len(checked.choices)
            return ChunkFrames(style, choices=count, include_usage=request.include_usage, warnings=checked.warnings)

        return self.service.answer(prepared, write, stream=bool(request.stream))


def _fingerprint(model_id: str, weights: str | None) -> str:
    """`system_fingerprint`: equal when the same weights are served by the same version."""
    text = "\0".join((exo_kimi.__version__, model_id, weights or ""))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
