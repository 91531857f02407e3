"""The routes of the Messages API."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from exo_kimi.dialogue.prepare import PreparedRequest, prepare
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ContextLengthError
from exo_kimi.serve.anthropic.contract import AnthropicErrorAnswer, MessageEvent, MessageObject, TokenCountAnswer
from exo_kimi.serve.anthropic.conversation import conversation_of_messages
from exo_kimi.serve.anthropic.frames import MessageFrames
from exo_kimi.serve.anthropic.request import CountRequest, MessagesRequest, parse_count, parse_messages
from exo_kimi.serve.body import BodyReader
from exo_kimi.serve.contract import generation_route, json_body, refusals
from exo_kimi.serve.problems import ApiProblem
from exo_kimi.serve.service import Service

MODELS = (MessagesRequest, CountRequest, MessageEvent, AnthropicErrorAnswer)  # beside those of the signatures
PATH = "/v1/messages"


def add_routes(app: FastAPI, service: Service, refused: tuple[int, ...], key: dict[str, Any]) -> None:
    """Every address of the API."""
    door = _MessagesDoor(service=service)
    asked = {
        "model": service.names.first,
        "messages": [{"role": "user", "content": "What is the capital of Norway?"}],
    }
    create = generation_route(
        body=MessagesRequest,
        answer=MessageObject,
        events=(MessageEvent, AnthropicErrorAnswer),
        example={**asked, "max_tokens": 64},
        extra=refused,
        error=AnthropicErrorAnswer,
        done=False,
    )
    count: Any = {
        "response_model": TokenCountAnswer,
        "responses": refusals(404, 413, 415, *refused, error=AnthropicErrorAnswer),
        "openapi_extra": json_body(CountRequest, asked),
    }
    app.post(PATH, **create, **key)(door.message)
    app.post(f"{PATH}/count_tokens", **count, **key)(door.count_tokens)


async def read_messages(request: Request) -> MessagesRequest:
    """The body of a Messages request."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, parse_messages)


async def read_count(request: Request) -> CountRequest:
    """The body of a request for a count."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, parse_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MessagesDoor:
    """The handlers."""

    service: Service

    async def message(self, request: Request, asked: Annotated[MessagesRequest, Depends(read_messages)]) -> Response:
        """Answer a conversation of content blocks, whole or as server-sent events."""
        model = self.service.names.resolve(asked.model)
        head = self.service.head("msg", model, separator="_")
        prepared = await self.service.prepared(request, partial(_prepare, asked), model=model)

        def write(checked: PreparedRequest) -> MessageFrames:
            return MessageFrames(head, prompt_tokens=checked.prompt_tokens, warnings=checked.warnings)

        try:
            return self.service.answer(prepared, write, stream=bool(asked.stream))
        except ContextLengthError as error:
            # With Anthropic's numbers; a prompt that was not even counted gets its words alone (`ApiProblem.body`).
            message = f"prompt is too long: {prepared.prompt_tokens} tokens > {self.service.context} maximum\n{error}"
            raise ApiProblem(400, message, param="messages", code="context_length_exceeded") from error

    async def count_tokens(self, request: Request, asked: Annotated[CountRequest, Depends(read_count)]) -> JSONResponse:
        """Count the tokens that a request would have."""
        model = self.service.names.resolve(asked.model)
        prepared = await self.service.prepared(request, partial(_prepare, asked), model=model)
        return JSONResponse({"input_tokens": prepared.prompt_tokens})


def _prepare(asked: CountRequest, speaker: Speaker, *, context: int) -> PreparedRequest:
    return prepare(conversation_of_messages(asked), speaker, context=context)
