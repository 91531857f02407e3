"""The routes of Ollama's API."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from exo_kimi.dialogue.prepare import PreparedRequest, prepare
from exo_kimi.dialogue.request import ConversationRequest, TextRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.serve.body import BodyReader
from exo_kimi.serve.contract import generation_route, json_body, refusals
from exo_kimi.serve.ollama.contract import (
    OllamaChatLine,
    OllamaErrorAnswer,
    OllamaGenerateLine,
    OllamaModelInfo,
    OllamaModels,
    OllamaVersion,
)
from exo_kimi.serve.ollama.frames import JSON_LINES, OllamaFrames, now
from exo_kimi.serve.ollama.request import OllamaChatRequest, OllamaFields, OllamaGenerateRequest, OllamaShowRequest
from exo_kimi.serve.request.lenient import read_fields
from exo_kimi.serve.service import Service

MODELS = (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
    OllamaChatLine,
    OllamaGenerateLine,
    OllamaErrorAnswer,
)
API_VERSION = "0.13.0"  # of Ollama: clients ask for the features of a version
_LATEST = ":latest"
_ARCHITECTURE = "kimi-k2"


def add_routes(app: FastAPI, service: Service, refused: tuple[int, ...], key: dict[str, Any]) -> None:
    """Every address of the API."""
    door = _OllamaDoor(service=service)
    asked = {"model": service.names.first}
    told: Any = {"extra": refused, "error": OllamaErrorAnswer, "done": False, "media_type": JSON_LINES}
    chat = generation_route(
        body=OllamaChatRequest,
        answer=OllamaChatLine,
        events=(OllamaChatLine, OllamaErrorAnswer),
        example={**asked, "messages": [{"role": "user", "content": "What is the capital of Norway?"}]},
        **told,
    )
    generate = generation_route(
        body=OllamaGenerateRequest,
        answer=OllamaGenerateLine,
        events=(OllamaGenerateLine, OllamaErrorAnswer),
        example={**asked, "prompt": "What is the capital of Norway?"},
        **told,
    )
    refusing = refusals(*refused, error=OllamaErrorAnswer)
    show: Any = {
        "response_model": OllamaModelInfo,
        "responses": refusals(404, 413, 415, *refused, error=OllamaErrorAnswer),
        "openapi_extra": json_body(OllamaShowRequest, asked),
    }
    app.post("/api/chat", **chat, **key)(door.ollama_chat)
    app.post("/api/generate", **generate, **key)(door.ollama_generate)
    app.post("/api/show", **show, **key)(door.ollama_show)
    app.get("/api/tags", response_model=OllamaModels, responses=refusing, **key)(door.ollama_tags)
    app.get("/api/ps", response_model=OllamaModels, responses=refusing, **key)(door.ollama_ps)
    app.get("/api/version", response_model=OllamaVersion, responses=refusing, **key)(door.ollama_version)


async def read_ollama_chat(request: Request) -> OllamaChatRequest:
    """The body of a chat request."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(read_fields, OllamaChatRequest))


async def read_ollama_generate(request: Request) -> OllamaGenerateRequest:
    """The body of a generate request."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(read_fields, OllamaGenerateRequest))


async def read_ollama_show(request: Request) -> OllamaShowRequest:
    """The body of a request about a model."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(read_fields, OllamaShowRequest))


@dataclass(frozen=True, slots=True, kw_only=True)
class _OllamaDoor:
    """The handlers."""

    service: Service

    async def ollama_chat(
        self, request: Request, asked: Annotated[OllamaChatRequest, Depends(read_ollama_chat)]
    ) -> Response:
        """Answer a conversation, as lines of JSON unless `stream` is false."""
        model = self._name(asked.model)
        if not asked.messages:
            message = {"role": "assistant", "content": ""}
            return JSONResponse({**_loaded(model), "message": message})
        return await self._answer(request, asked, partial(_prepare_chat, asked), model, chat=True)

    async def ollama_generate(
        self, request: Request, asked: Annotated[OllamaGenerateRequest, Depends(read_ollama_generate)]
    ) -> Response:
        """Answer one prompt, as lines of JSON unless `stream` is false."""
        model = self._name(asked.model)
        if not asked.prompt:
            return JSONResponse({**_loaded(model), "response": ""})
        return await self._answer(request, asked, partial(_prepare_generate, asked), model, chat=False)

    async def ollama_show(
        self, request: Request, asked: Annotated[OllamaShowRequest, Depends(read_ollama_show)]
    ) -> JSONResponse:
        """Tell of the model."""
        self._name(asked.model or asked.name)
        info = {"general.architecture": _ARCHITECTURE, f"{_ARCHITECTURE}.context_length": self.service.context}
        thinks = await self.service.workers.run(request, self._thinks)
        return JSONResponse(
            {
                "modelfile": "",
                "parameters": "",
                "template": "",
                "details": _details(),
                "model_info": info,
                "capabilities": ["completion", "tools", *(["thinking"] if thinks else [])],
                "modified_at": self._since(),
            }
        )

    async def ollama_tags(self) -> JSONResponse:
        """List the names of the model."""
        return JSONResponse({"models": [self._card(name) for name in self.service.names.names]})

    async def ollama_ps(self) -> JSONResponse:
        """List the names of the model, which is always loaded."""
        more = {"expires_at": "9999-12-31T23:59:59Z", "context_length": self.service.context}
        cards = [self._card(name) for name in self.service.names.names]
        return JSONResponse({"models": [{**card, **more, "size_vram": card["size"]} for card in cards]})

    async def ollama_version(self) -> JSONResponse:
        """Tell which Ollama's API this is."""
        return JSONResponse({"version": API_VERSION})

    async def _answer(
        self, request: Request, asked: OllamaFields, prepare_it: Any, model: str, *, chat: bool
    ) -> Response:
        prepared = await self.service.prepared(request, prepare_it, model=self._resolved(model))
        head = self.service.head("ollama", model)

        def write(checked: PreparedRequest) -> OllamaFrames:
            return OllamaFrames(head, chat=chat, warnings=checked.warnings)

        return self.service.answer(prepared, write, stream=asked.stream is not False)

    def _name(self, asked: str | None) -> str:
        """Clients of Ollama add its tag to names."""
        self._resolved(asked)
        return asked or self.service.names.first

    def _resolved(self, asked: str | None) -> str:
        names = self.service.names
        known = asked is None or asked in names.names or not asked.endswith(_LATEST)
        return names.resolve(asked if known or asked is None else asked.removesuffix(_LATEST))

    def _thinks(self) -> bool:
        prompt = self.service.speaker.template.render([{"role": "user", "content": "Hi"}])
        return prompt.reasoning != "none"

    def _since(self) -> str:
        return datetime.fromtimestamp(self.service.created, UTC).isoformat().replace("+00:00", "Z")

    def _card(self, name: str) -> dict[str, Any]:
        stages = self.service.engine.snapshot().stages
        return {
            "name": name,
            "model": name,
            "modified_at": self._since(),
            "size": sum(stage.weights_bytes for stage in stages),
            "digest": hashlib.sha256(self.service.fingerprint.encode()).hexdigest(),
            "details": _details(),
        }


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": _ARCHITECTURE,
        "families": [_ARCHITECTURE],
        "parameter_size": "",
        "quantization_level": "",
    }


def _loaded(model: str) -> dict[str, Any]:
    """The answer to a request without a prompt, by which clients have a model loaded."""
    return {"model": model, "created_at": now(), "done": True, "done_reason": "load"}


def _prepare_chat(asked: OllamaChatRequest, speaker: Speaker, *, context: int) -> PreparedRequest:
    return prepare(asked.conversation(), speaker, context=context)


def _prepare_generate(asked: OllamaGenerateRequest, speaker: Speaker, *, context: int) -> PreparedRequest:
    conversation: ConversationRequest | TextRequest = asked.conversation()
    return prepare(conversation, speaker, context=context)
