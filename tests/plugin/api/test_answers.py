"""An API in exo's shape over scripted chunks: what its routes do when a chunk is an error, with our names bound.

The routes are as careless as exo's: without streaming an error raises after the head was sent, and a stream ends as a perfect
empty message. `test_real_exo_api` asks exo's own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from exo_kimi.plugin.api import answers
from exo_kimi.plugin.api.answers import watch_chunks, watch_sending, with_answer_errors
from exo_kimi.plugin.api.refusal import Refusal

KIMI = "lab/kimi-k2-tiny"
GONE = Refusal(status=503, code="engine_unavailable", message="stage 1 died")
LONG = Refusal(status=400, code="context_length_exceeded", message="the prompt has 70 tokens")


def token(text: str, reason: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(text=text, finish_reason=reason)


def error(refusal: Refusal) -> SimpleNamespace:
    return SimpleNamespace(error_message=refusal.to_text(), finish_reason="error")


class PlainApi:
    """exo's API, as far as an answer goes."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.chunks: list[Any] = []
        self.finished: list[str] = []
        self._setup_exception_handlers()
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/ollama/api/generate"):
            self.app.post(path, response_model=None)(self.answer)
        self.app.post("/bench/chat/completions", response_model=None)(self.collected)

    def _setup_exception_handlers(self) -> None:
        """exo's own."""

    async def _send_text_generation_with_images(self, task_params: Any) -> Any:
        return SimpleNamespace(command_id="c1")

    async def _token_chunk_stream(self, command_id: Any) -> AsyncGenerator[Any, None]:
        try:
            for chunk in self.chunks:
                if isinstance(chunk, float):
                    await asyncio.sleep(chunk)
                    continue
                yield chunk
                if getattr(chunk, "finish_reason", None) is not None:
                    break
        finally:
            self.finished.append(command_id)

    async def answer(self, body: dict[str, Any]) -> StreamingResponse:
        command = await self._send_text_generation_with_images(SimpleNamespace(model=body["model"]))
        chunks = self._token_chunk_stream(command.command_id)
        if body.get("stream"):
            return StreamingResponse(self._stream(chunks), media_type="text/event-stream")
        return StreamingResponse(self._whole(chunks), media_type="application/json")

    async def collected(self, body: dict[str, Any]) -> Any:
        command = await self._send_text_generation_with_images(SimpleNamespace(model=body["model"]))
        async with asyncio.TaskGroup():
            return json.loads(
                "".join([each async for each in self._whole(self._token_chunk_stream(command.command_id))])
            )

    async def _stream(self, chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
        yield ": keep-alive\n\ndata: begin\n\n"
        async for chunk in chunks:
            if getattr(chunk, "finish_reason", None) == "error":
                break
            if hasattr(chunk, "text"):
                yield f"data: {chunk.text}\n\n"
        yield "data: end\n\n"

    async def _whole(self, chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
        text, model = "", None
        async for chunk in chunks:
            if getattr(chunk, "finish_reason", None) == "error":
                raise ValueError(chunk.error_message)
            model, text = KIMI, text + getattr(chunk, "text", "")
        assert model is not None
        yield json.dumps({"text": text})


class BoundApi(PlainApi):
    """With our names."""

    _setup_exception_handlers = with_answer_errors(PlainApi._setup_exception_handlers)
    _send_text_generation_with_images = watch_sending(PlainApi._send_text_generation_with_images)
    _token_chunk_stream = watch_chunks(PlainApi._token_chunk_stream)  # type: ignore[assignment]


def ask(api: PlainApi, path: str, chunks: list[Any], *, stream: bool = False, model: str = KIMI) -> httpx.Response:
    api.chunks = chunks

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://exo") as client:
            return await client.post(path, json={"model": model, "stream": stream})

    return asyncio.run(post())


PATHS = ("/v1/chat/completions", "/bench/chat/completions", "/v1/messages", "/v1/responses", "/ollama/api/generate")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_refusal_has_its_words_and_its_status_on_every_route(path: str, stream: bool) -> None:
    api = BoundApi()
    answer = ask(api, path, [error(LONG)], stream=stream)
    assert answer.status_code == 400 and LONG.message in answer.text
    assert answer.headers["content-type"] == "application/json" and isinstance(answer.json(), dict)
    assert api.finished == ["c1"]  # exo's master is told


def test_each_api_has_its_own_error_shape() -> None:
    found = {path: ask(BoundApi(), path, [error(LONG)]).json() for path in PATHS}
    openai = {"error": {"message": LONG.message, "type": "invalid_request_error", "param": None, "code": LONG.code}}
    assert found["/v1/chat/completions"] == found["/bench/chat/completions"] == found["/v1/responses"] == openai
    kind = {"type": "invalid_request_error", "message": f"prompt is too long: {LONG.message}"}
    assert found["/v1/messages"] == {"type": "error", "error": kind}
    assert found["/ollama/api/generate"] == {"error": LONG.message}


def test_a_failure_in_a_stream_is_its_last_event_and_nothing_of_exos_ending_follows() -> None:
    late = [token("Hel"), error(GONE)]
    begun = ": keep-alive\n\ndata: begin\n\ndata: Hel\n\n"
    found = {path: ask(BoundApi(), path, late, stream=True) for path in PATHS if not path.startswith("/bench")}
    assert {each.status_code for each in found.values()} == {200}
    last = {path: each.text.removeprefix(begun) for path, each in found.items()}
    chat, _, done = last["/v1/chat/completions"].partition("\n\n")
    assert json.loads(chat.removeprefix("data: "))["error"]["message"] == GONE.message and done == "data: [DONE]\n\n"
    assert last["/v1/messages"].startswith("event: error\ndata: ") and GONE.message in last["/v1/messages"]
    failed = json.loads(last["/v1/responses"].removeprefix("event: response.failed\ndata: "))
    assert failed["response"]["error"] == {"code": GONE.code, "message": GONE.message}
    assert (failed["response"]["id"], failed["sequence_number"]) == ("resp_c1", 3)
    assert json.loads(last["/ollama/api/generate"]) == {"error": GONE.message}


def test_a_failure_without_streaming_is_never_half_an_answer() -> None:
    answer = ask(BoundApi(), "/v1/chat/completions", [token("Hel"), error(GONE)])
    assert answer.status_code == 503 and GONE.message in answer.text and "Hel" not in answer.text
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunks", [[], [token("Hel")]])
def test_an_answer_that_exo_ends_before_the_model_says_so(chunks: list[Any], stream: bool) -> None:
    answer = ask(BoundApi(), "/v1/chat/completions", chunks, stream=stream)
    assert "exo ended the answer before the model did" in answer.text
    assert answer.status_code == (200 if stream and chunks else 503)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_as_exo_writes_it(path: str, stream: bool) -> None:
    chunks = [SimpleNamespace(processed_tokens=1), token("Hel"), token("lo", "stop")]
    plain, bound = (ask(api, path, chunks, stream=stream) for api in (PlainApi(), BoundApi()))
    assert (bound.status_code, bound.text, bound.headers) == (plain.status_code, plain.text, plain.headers)


@pytest.mark.parametrize("stream", [False, True])
def test_other_models_answers_are_exos_own(stream: bool) -> None:
    plain, bound = (
        ask(api, "/v1/chat/completions", [token("Hel"), error(GONE)], stream=stream, model="lab/llama")
        for api in (PlainApi(), BoundApi())
    )
    assert (bound.status_code, bound.text) == (plain.status_code, plain.text)


def test_an_answer_that_exo_cannot_write_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cannot(self: Any, chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
        async for _ in chunks:
            json.loads("{half")
        yield ""

    monkeypatch.setattr(PlainApi, "_whole", cannot)
    answer = ask(BoundApi(), "/v1/messages", [token("Hel"), token("", "stop")])
    assert answer.status_code == 500 and "JSONDecodeError" in answer.json()["error"]["message"]


@dataclass(frozen=True)
class Copied:
    """A record with pydantic's way to change it."""

    arguments: str = ""
    tool_calls: tuple[Copied, ...] = ()
    finish_reason: str = "tool_calls"

    def model_copy(self, *, update: dict[str, Any]) -> Copied:
        return replace(self, **update)


@pytest.mark.parametrize("arguments", ['{"a": 1}', '{"a": ', "[1]", ""])
def test_arguments_are_an_object_where_the_api_wants_one(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def calls(self: Any, chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
        yield json.dumps([call.arguments async for chunk in chunks for call in chunk.tool_calls])

    monkeypatch.setattr(PlainApi, "_whole", calls)
    chunk = Copied(tool_calls=(Copied('{"b": 2}'), Copied(arguments)))
    (kept,) = ask(BoundApi(), "/v1/chat/completions", [chunk]).json()[1:]
    first, second = (json.loads(each) for each in ask(BoundApi(), "/v1/messages", [chunk]).json())
    assert (kept, first) == (arguments, {"b": 2})
    assert second == ({"a": 1} if arguments == '{"a": 1}' else {"raw_arguments": arguments})


def test_a_stream_is_not_held_back_for_longer_than_its_clients_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "HOLD_S", 0.05)
    api = BoundApi()
    begun_s = time.monotonic()
    answer = ask(api, "/v1/chat/completions", [0.3, error(GONE)], stream=True)
    assert time.monotonic() - begun_s < 5
    assert answer.status_code == 200 and answer.text.startswith(": keep-alive") and GONE.message in answer.text
