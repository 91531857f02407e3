"""POST /tokenize and /detokenize, in vLLM's shape: text or a conversation to token ids, and token ids to text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError
from exo_kimi.serve.answer.formats import token_text
from exo_kimi.serve.body import BodyReader
from exo_kimi.serve.contract import json_body, refusals
from exo_kimi.serve.request.fields import FirstOnly
from exo_kimi.serve.request.lenient import LenientFields, read_fields
from exo_kimi.serve.request.prepare import prepare_chat
from exo_kimi.serve.request.schemas import ChatRequest, parse_chat
from exo_kimi.serve.service import Service


class TokenizeRequest(LenientFields):
    """The body of `POST /tokenize`: a text, or messages with tools, as a chat request has them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(LenientFields):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FirstOnly()]


class TokenizedText(BaseModel):
    """Token ids, and their texts where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(BaseModel):
    """A text; control tokens by their names."""

    prompt: str


MODELS = (TokenizeRequest, DetokenizeRequest)


def add_routes(app: FastAPI, service: Service, refused: tuple[int, ...], key: dict[str, Any]) -> None:
    """Both addresses."""
    door = _TokensDoor(service=service)
    refusing = refusals(404, 413, 415, *refused)
    for path, handler, body, answer, example in (
        ("/tokenize", door.tokenize, TokenizeRequest, TokenizedText, {"prompt": "The capital of Norway is"}),
        ("/detokenize", door.detokenize, DetokenizeRequest, DetokenizedText, {"tokens": [72, 105]}),
    ):
        told: Any = {"response_model": answer, "responses": refusing, "openapi_extra": json_body(body, example)}
        app.post(path, **told, **key)(handler)


async def read_tokenize(request: Request) -> TokenizeRequest:
    """The body of a request for token ids."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(read_fields, TokenizeRequest))


async def read_detokenize(request: Request) -> DetokenizeRequest:
    """The body of a request for text."""
    bodies: BodyReader = request.app.state.bodies
    return await bodies.read(request, partial(read_fields, DetokenizeRequest))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokensDoor:
    service: Service

    async def tokenize(
        self, request: Request, asked: Annotated[TokenizeRequest, Depends(read_tokenize)]
    ) -> JSONResponse:
        """Give the token ids of a text, or of the prompt that a conversation becomes."""
        self.service.names.resolve(asked.model)
        most_tokens = 2 * self.service.context
        ids = await self.service.workers.run(request, partial(_ids, asked, self.service.speaker, most_tokens))
        tokenizer = self.service.speaker.tokenizer
        texts = [token_text(each, tokenizer) for each in ids] if asked.return_token_strs else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": self.service.context, "tokens": ids, "token_strs": texts}
        )

    async def detokenize(
        self, request: Request, asked: Annotated[DetokenizeRequest, Depends(read_detokenize)]
    ) -> JSONResponse:
        """Give the text of token ids."""
        self.service.names.resolve(asked.model)
        tokenizer = self.service.speaker.tokenizer
        wrong = next((each for each in asked.tokens if each >= tokenizer.vocab_size), None)
        if wrong is not None:
            expected = f"token ids from 0 to {tokenizer.vocab_size - 1}"
            raise RequestError("invalid 'tokens'", expected=expected, found=str(wrong)[:40], param="tokens")
        return JSONResponse(
            {"prompt": await self.service.workers.run(request, partial(tokenizer.decode, asked.tokens))}
        )


def _ids(asked: TokenizeRequest, speaker: Speaker, most_tokens: int) -> list[int]:
    """Raises:
    RequestError: neither a text nor messages, or both.
    """
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError("'prompt' or 'messages' is needed, and not both", param="prompt")
    if asked.prompt is not None:
        return list(speaker.tokenizer.encode(asked.prompt, most_tokens=most_tokens))
    names = ("messages", "tools", "chat_template_kwargs")
    fields = {name: value for name in names if (value := getattr(asked, name)) is not None}
    chat: ChatRequest = parse_chat(fields)
    return list(prepare_chat(chat, speaker, context=most_tokens // 2).choices[0].request.prompt_ids)
