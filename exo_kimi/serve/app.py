"""The HTTP routes; what happens behind them is in `prepare` (requests), `generation` (tokens) and `stream` (answers)."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import exo_kimi
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoKimiError
from exo_kimi.runtime.requests import TextEngine
from exo_kimi.serve.answer.formats import ChatFormat, Format, Head, TextFormat
from exo_kimi.serve.answer.generation import Generation
from exo_kimi.serve.answer.stream import AnswerStream
from exo_kimi.serve.body import read_json
from exo_kimi.serve.gate import Gate
from exo_kimi.serve.health import health_report
from exo_kimi.serve.metrics import Metrics
from exo_kimi.serve.problems import ApiProblem, answer_error, answer_http_error
from exo_kimi.serve.request.fields import GenerationFields
from exo_kimi.serve.request.prepare import Prepared, prepare_chat, prepare_completion
from exo_kimi.serve.request.schemas import parse_chat, parse_completion

MAX_BODY_BYTES = 64 * 2**20
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"})
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
    """
    server = _Server(
        engine=engine,
        speaker=speaker,
        metrics=Metrics(engine.snapshot),
        model_id=model_id,
        max_body_bytes=max_body_bytes,
        ping_interval_s=ping_interval_s,
        created=int(time.time()),
        fingerprint=_fingerprint(model_id, fingerprint),
    )
    app = FastAPI(title="exo-kimi", version=exo_kimi.__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_api_route("/v1/completions", server.completion, methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", server.model, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.prometheus, methods=["GET"])
    for kind in (ExoKimiError, ApiProblem, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_middleware(Gate, metrics=server.metrics, paths=PATHS, api_key=api_key)
    return app


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """The handlers and what they share."""

    engine: TextEngine
    speaker: Speaker
    metrics: Metrics
    model_id: str
    max_body_bytes: int
    ping_interval_s: float
    created: int
    fingerprint: str

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        chat = parse_chat(await read_json(request, max_bytes=self.max_body_bytes))
        self._check_model(chat.model)
        prepared = await asyncio.to_thread(prepare_chat, chat, self.speaker)
        style = ChatFormat(
            head=self._head("chatcmpl"),
            tokenizer=self.speaker.tokenizer,
            top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )
        return self._answer(chat, prepared, style)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        completion = parse_completion(await read_json(request, max_bytes=self.max_body_bytes))
        self._check_model(completion.model)
        prepared = await asyncio.to_thread(prepare_completion, completion, self.speaker)
        style = TextFormat(head=self._head("cmpl"), tokenizer=self.speaker.tokenizer, top_logprobs=completion.logprobs)
        return self._answer(completion, prepared, style)

    async def models(self) -> JSONResponse:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, model: str) -> JSONResponse:
        """GET /v1/models/{id}."""
        if model != self.model_id:
            raise self._unknown_model(model)
        return JSONResponse(self._model_card())

    async def health(self) -> JSONResponse:
        """GET /health."""
        status, report = health_report(self.engine.snapshot(), model=self.model_id, version=exo_kimi.__version__)
        return JSONResponse(report, status_code=status)

    async def prometheus(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), headers={"content-type": METRICS_TYPE})

    def _answer(self, request: GenerationFields, prepared: Prepared, style: Format) -> Response:
        for choice in prepared.choices:
            self.engine.check(choice.request)
        start: Callable[[], Generation] = partial(Generation, self.engine, prepared.choices, self.metrics)
        return AnswerStream(
            start,
            style,
            prompt_tokens=prepared.prompt_tokens,
            choices=len(prepared.choices),
            choices_per_prompt=prepared.choices_per_prompt,
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
