"""The routes of the Responses API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from exo_kimi.dialogue.prepare import PreparedRequest, prepare
from exo_kimi.dialogue.request import ConversationRequest, SamplingOverrides
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ContextLengthError, RequestError
from exo_kimi.runtime.requests import TokenEvent
from exo_kimi.serve.answer.formats import Head, chat_logprobs
from exo_kimi.serve.answer.frames import SSE_TYPE
from exo_kimi.serve.body import BodyReader
from exo_kimi.serve.contract import generation_route, json_body, refusals
from exo_kimi.serve.problems import ApiProblem, to_problem
from exo_kimi.serve.request.lenient import known_effort
from exo_kimi.serve.responses.contract import (
    CountedInput,
    DeletedResponse,
    InputItemList,
    ResponseEvent,
    ResponseObject,
)
from exo_kimi.serve.responses.frames import ResponseFrames, ResponseHead
from exo_kimi.serve.responses.items import Lookup, messages_of
from exo_kimi.serve.responses.output import Logprobs, OutputOptions
from exo_kimi.serve.responses.request import ENCRYPTED_REASONING, LOGPROBS, ResponsesRequest, parse_responses
from exo_kimi.serve.responses.store import ResponseStore, StoredResponse
from exo_kimi.serve.responses.tools import ToolBox
from exo_kimi.serve.service import Service

MODELS = (ResponsesRequest, ResponseEvent)  # beside what FastAPI sees in the signatures
PATH = "/v1/responses"


def add_routes(app: FastAPI, service: Service, refused: tuple[int, ...], key: dict[str, Any]) -> None:
    """Every address of the API."""
    door = _ResponsesDoor(service=service)
    example = {"model": service.names.first, "input": "What is the capital of Norway?", "max_output_tokens": 64}
    create = generation_route(
        body=ResponsesRequest,
        answer=ResponseObject,
        events=(ResponseEvent,),
        example=example,
        extra=refused,
        done=False,
    )
    count: Any = {
        "response_model": CountedInput,
        "responses": refusals(404, 413, 415, *refused),
        "openapi_extra": json_body(ResponsesRequest, example),
    }
    kept = refusals(404, *refused)
    app.post(PATH, **create, **key)(door.create)
    app.post(f"{PATH}/input_tokens", **count, **key)(door.count)
    app.get(f"{PATH}/{{response_id}}", response_model=ResponseObject, responses=kept, **key)(door.get)
    app.delete(f"{PATH}/{{response_id}}", response_model=DeletedResponse, responses=kept, **key)(door.delete)
    app.get(f"{PATH}/{{response_id}}/input_items", response_model=InputItemList, responses=kept, **key)(door.items)


async def read_responses(request: Request) -> ResponsesRequest:
    """The body of a Responses request."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, parse_responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A request that was read.

    Args:
        asked: the request.
        history: the conversation without instructions, earlier responses before the new input.
        tools: what the model may call.
        conversation: what to answer.
    """

    asked: ResponsesRequest
    history: list[Mapping[str, Any]]
    tools: ToolBox
    conversation: ConversationRequest

    @classmethod
    def of(cls, asked: ResponsesRequest, earlier: Sequence[Mapping[str, Any]], find: Lookup) -> _Read:
        """Reads the items and tools; `earlier` is the conversation that they go on with, `find` gives kept items.

        Raises:
            RequestError: an item, tool or option that cannot be honoured.
        """
        warnings = asked.not_carried_out()
        history = [*earlier, *messages_of(asked.input, find=find, warnings=warnings)]
        tools = ToolBox.of(asked.tools or ())
        conversation = _conversation(asked, history, tools, warnings)
        return cls(asked=asked, history=history, tools=tools, conversation=conversation)

    def prepare(self, speaker: Speaker, *, context: int) -> PreparedRequest:
        """What to generate. Slow for long prompts."""
        return prepare(self.conversation, speaker, context=context)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResponsesDoor:
    """The handlers, and the responses that are kept."""

    service: Service
    store: ResponseStore = field(default_factory=ResponseStore)

    async def create(self, request: Request, asked: Annotated[ResponsesRequest, Depends(read_responses)]) -> Response:
        """Answer the items of a conversation, whole or as server-sent events."""
        model = self.service.names.resolve(asked.model)
        head = self.service.head("resp", model, separator="_")
        read = await self._read(request, asked)
        write = partial(self._frames, head, read)
        try:
            prepared = await self.service.prepared(request, read.prepare, model=model)
            return self.service.answer(prepared, lambda checked: write(checked.warnings), stream=bool(asked.stream))
        except ContextLengthError as error:
            if not asked.stream:
                raise
            # As OpenAI: in the stream, where Codex looks for it before it shortens the conversation.
            frames = write(read.conversation.warnings)
            return Response(b"".join([*frames.opening(0), *frames.failure(to_problem(error))]), media_type=SSE_TYPE)

    async def count(
        self, request: Request, asked: Annotated[ResponsesRequest, Depends(read_responses)]
    ) -> JSONResponse:
        """Count the tokens that a request would have."""
        model = self.service.names.resolve(asked.model)
        read = await self._read(request, asked)
        prepared = await self.service.prepared(request, read.prepare, model=model)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": prepared.prompt_tokens})

    async def get(self, response_id: str) -> JSONResponse:
        """Give a response that is kept."""
        return JSONResponse(dict(self._kept(response_id).response))

    async def delete(self, response_id: str) -> JSONResponse:
        """Forget a response."""
        self._kept(response_id)
        self.store.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def items(self, response_id: str) -> JSONResponse:
        """List what a kept response was asked with, the latest first."""
        items = [dict(item) for item in reversed(self._kept(response_id).input_items)]
        first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        return JSONResponse({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False})

    async def _read(self, request: Request, asked: ResponsesRequest) -> _Read:
        """In a thread: a long history has many items."""
        earlier = _earlier(asked, self.store)
        return await self.service.workers.run(request, partial(_Read.of, asked, earlier, self.store.find_item))

    def _frames(self, head: Head, read: _Read, warnings: Sequence[str]) -> ResponseFrames:
        asked = read.asked
        options = OutputOptions(
            as_summary=bool(asked.reasoning and asked.reasoning.as_summary),
            encrypted=asked.includes(ENCRYPTED_REASONING),
            logprobs=self._logprobs(asked),
        )
        return ResponseFrames(
            ResponseHead(head=head, request=asked, warnings=warnings),
            read.tools,
            options,
            clock=time.time,
            keep=partial(self._keep, read),
        )

    def _logprobs(self, asked: ResponsesRequest) -> Logprobs | None:
        if not asked.includes(LOGPROBS):
            return None

        def write(tokens: Sequence[TokenEvent]) -> list[dict[str, Any]]:
            told = chat_logprobs(tokens, self.service.speaker.tokenizer, asked.top_logprobs or 0)
            return list(told["content"])

        return write

    def _keep(self, read: _Read, response: dict[str, Any], reply: dict[str, Any]) -> None:
        if read.asked.keeps:
            items = _input_items(read.asked.input)
            self.store.keep(StoredResponse(response=response, input_items=items, messages=(*read.history, reply)))

    def _kept(self, response_id: str) -> StoredResponse:
        stored = self.store.get(response_id)
        if stored is None:
            message = f"Response with id '{response_id[:80]}' not found."
            raise ApiProblem(404, message, param="response_id", code="response_not_found")
        return stored


def _earlier(asked: ResponsesRequest, store: ResponseStore) -> Sequence[Mapping[str, Any]]:
    """The conversation that the request goes on with."""
    if asked.previous_response_id is None:
        return ()
    stored = store.get(asked.previous_response_id)
    if stored is None:
        raise RequestError(
            f"Previous response with id '{asked.previous_response_id[:80]}' not found.",
            fix="send the whole conversation: this server keeps the latest responses only, in memory",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored.messages


def _conversation(
    asked: ResponsesRequest, history: Sequence[Mapping[str, Any]], tools: ToolBox, warnings: Sequence[str]
) -> ConversationRequest:
    """The request in the dialogue's terms."""
    told = [*warnings, *tools.warnings]
    instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    choice = tools.choose(asked.tool_choice, parallel=asked.parallel_tool_calls is not False)
    return ConversationRequest(
        must_show_pictures=False,
        messages=(*instructions, *history) or ({"role": "user", "content": ""},),
        tools=tuple(tools.functions),
        tool_choice=choice,
        thinking=asked.thinking(),
        reasoning_effort=known_effort(asked.reasoning.effort if asked.reasoning else None, told),
        response_format=asked.json_format() if choice.mode != "required" else None,
        sampling=SamplingOverrides.of(
            asked, top_logprobs=(asked.top_logprobs or 0) if asked.includes(LOGPROBS) else None
        ),
        max_tokens=asked.max_output_tokens,
        warnings=tuple(told),
    )


def _input_items(given: str | Sequence[Any] | None) -> list[dict[str, Any]]:
    """The items of a request as they are listed: each with an id."""
    if isinstance(given, str):
        part = {"type": "input_text", "text": given}
        given = [{"type": "message", "role": "user", "content": [part]}]
    return [
        {**item, "id": item["id"] if isinstance(item.get("id"), str) else f"item_{uuid.uuid4().hex}"}
        for item in given or ()
        if isinstance(item, Mapping)
    ]
