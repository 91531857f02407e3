"""GET /v1/models: the names of the one model and of its adapters, in OpenAI's shape and in Anthropic's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from exo_kimi.serve.contract import AnthropicModelCard, AnthropicModelList, ModelCard, ModelList, refusals
from exo_kimi.serve.problems import ApiProblem
from exo_kimi.serve.service import Service


def add_routes(app: FastAPI, service: Service, refused: tuple[int, ...], key: dict[str, Any]) -> None:
    """The list, and each name by itself."""
    door = _ModelsDoor(service=service)
    listed: Any = {"response_model": ModelList | AnthropicModelList, "responses": refusals(*refused)}
    one: Any = {"response_model": ModelCard | AnthropicModelCard, "responses": refusals(404, *refused)}
    app.get("/v1/models", **listed, **key)(door.models)
    app.get("/v1/models/{model:path}", **one, **key)(door.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelsDoor:
    service: Service

    async def models(self, request: Request) -> JSONResponse:
        """List the names of the model that is served; in Anthropic's shape for clients that send `anthropic-version`."""
        names = self.service.names.names
        cards = [self._card(name, request) for name in names]
        if "anthropic-version" in request.headers:
            return JSONResponse({"data": cards, "has_more": False, "first_id": names[0], "last_id": names[-1]})
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, model: str, request: Request) -> JSONResponse:
        """Tell of one name."""
        names = self.service.names.names
        if model not in names:
            served = ", ".join(f"'{name}'" for name in names)
            message = f"the model '{model[:200]}' does not exist: this server has {served}"
            raise ApiProblem(404, message, param="model", code="model_not_found")
        return JSONResponse(self._card(model, request))

    def _card(self, name: str, request: Request) -> dict[str, Any]:
        context, created = self.service.engine.snapshot().context, self.service.created
        if "anthropic-version" in request.headers:
            return {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "lifecycle": "active",
                "max_input_tokens": context,
                "max_tokens": context,
            }
        card = {"id": name, "object": "model", "created": created, "owned_by": "exo-kimi"}
        if name in self.service.names.adapters:
            card["parent"] = self.service.names.first
        return {**card, "context_length": context, "max_model_len": context}
