"""/openapi.json is true: every answer has the declared shape, every body that is taken is declared; /docs needs no other host.

That every status is declared is checked wherever a test calls the app (`client_of`).
"""

from __future__ import annotations

import json
import re

import httpx
import pytest
from pydantic import BaseModel

from exo_kimi.serve.contract import (
    CONNECTION_STATUSES,
    REASONS,
    ChatCompletion,
    ChatCompletionChunk,
    ErrorAnswer,
    HealthReport,
    HealthStatus,
    ModelCard,
    ModelList,
    TextCompletion,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)


def assert_declared(answer: object, model: type[BaseModel]) -> None:
    """The model holds the answer, whole: nothing is missing, of another type, or beside it."""
    assert model.model_validate_json(json.dumps(answer), strict=True).model_dump(exclude_unset=True) == answer


def events(response: httpx.Response) -> list[object]:
    blocks = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block.startswith("data: ")]
    assert blocks.pop() == "[DONE]"
    return [json.loads(block) for block in blocks]


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("Hello.", {}),
        ("Hello.", {"n": 2, "logprobs": True, "top_logprobs": 2}),
        (f"Let me look. {CALL}", {"tools": [WEATHER]}),
        ("Hello there, friend.", {"max_tokens": 1}),
    ],
)
async def test_a_chat_answer_is_as_declared(saying, client_of, said, fields):
    async with client_of(saying(said)) as client:
        assert_declared((await client.post(CHAT, json={**ASK, **fields})).json(), ChatCompletion)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for event in events(await client.post(CHAT, json={**ASK, **fields, **options})):
            assert_declared(event, ChatCompletionChunk)


async def test_reasoning_is_as_declared(saying, thinker, client_of):
    async with client_of(saying("Hm.</think>Yes.", by=thinker)) as client:
        answer = (await client.post(CHAT, json=ASK)).json()
        assert answer["choices"][0]["message"]["reasoning_content"] == "Hm."
        assert_declared(answer, ChatCompletion)
        for event in events(await client.post(CHAT, json={**ASK, "stream": True})):
            assert_declared(event, ChatCompletionChunk)


@pytest.mark.parametrize("fields", [{}, {"n": 2, "logprobs": 2}, {"prompt": ["a", "b"], "echo": True}])
async def test_a_text_answer_is_as_declared(saying, client_of, fields):
    async with client_of(saying()) as client:
        assert_declared((await client.post(TEXT, json={"prompt": "a", **fields})).json(), TextCompletion)
        for event in events(await client.post(TEXT, json={"prompt": "a", "stream": True, **fields})):
            assert_declared(event, TextCompletion)


async def test_what_the_server_tells_of_itself_is_as_declared(saying, client_of):
    async with client_of(saying(stage_states=("ready", "dead"), ready=False)) as client:
        assert_declared((await client.get("/health")).json(), HealthReport)
        models = (await client.get("/v1/models")).json()
        assert_declared(models, ModelList)
        assert_declared((await client.get(f"/v1/models/{models['data'][0]['id']}")).json(), ModelCard)


async def test_without_the_key_health_tells_only_whether_all_is_well(saying, client_of):
    """Layers, bytes, addresses and errors are for who has the key; what watches the server from outside has none."""
    key = {"authorization": "Bearer secret"}
    async with client_of(saying(), api_key="secret") as client:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert_declared((await client.get("/health", headers=key)).json(), HealthReport)
    async with client_of(saying(stage_states=("ready", "dead"), ready=False), api_key="secret") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = await client.get("/health", headers=headers)
            assert (answer.status_code, answer.json()) == (503, {"status": "unavailable"})
            assert_declared(answer.json(), HealthStatus)
        assert "exit code 137" in (await client.get("/health", headers=key)).json()["reason"]


async def test_a_refusal_is_as_declared(saying, client_of):
    async with client_of(saying(), api_key="secret") as client:
        assert_declared((await client.post(CHAT, json=ASK)).json(), ErrorAnswer)
        client.headers["authorization"] = "Bearer secret"
        for body in ({}, {**ASK, "model": "other"}, {**ASK, "temperature": 9}, {**ASK, "audio": {}}):
            assert_declared((await client.post(CHAT, json=body)).json(), ErrorAnswer)


@pytest.mark.parametrize("key", [None, "secret"])
async def test_the_document_has_every_route_and_asks_for_a_key_only_where_one_is_needed(saying, client_of, key):
    async with client_of(saying(), api_key=key) as client:
        document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) >= {CHAT, TEXT, "/v1/models", "/v1/models/{model}", "/health", "/metrics"}
    assert set(document["paths"]) >= {"/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/cancel/{id}"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            guarded = key is not None and path not in ("/", "/health")
            assert ("401" in statuses, bool(operation.get("security"))) == (guarded, guarded), path
            assert statuses - ({"304"} if path == "/" else set()) <= {"200", *map(str, REASONS)}
            assert ("422" in statuses) is False


async def test_the_document_names_nothing_that_it_does_not_hold(saying, client_of):
    async with client_of(saying()) as client:
        document = (await client.get("/openapi.json")).json()
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named <= set(document["components"]["schemas"])


async def test_the_example_bodies_are_answered(saying, client_of):
    async with client_of(saying()) as client:
        document = (await client.get("/openapi.json")).json()
        for path in (CHAT, TEXT):
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
            assert (await client.post(path, json=body)).status_code == 200


async def test_every_declared_field_is_known_and_no_other_is_taken(saying, client_of):
    async with client_of(saying()) as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
        for path, name, base in ((CHAT, "ChatRequest", ASK), (TEXT, "CompletionRequest", {"prompt": "a"})):
            assert schemas[name]["additionalProperties"] is False
            for field in schemas[name]["properties"].keys() - base.keys():
                assert (await client.post(path, json={**base, field: None})).status_code == 200, field
            refused = await client.post(path, json={**base, "no_such_field": 1})
            assert refused.json()["error"]["code"] == "unknown_parameter"


async def test_the_docs_page_loads_only_what_this_server_has(saying, client_of):
    """With a key, too: a browser that opens the page has none."""
    async with client_of(saying(), api_key="secret") as client:
        page = await client.get("/docs")
        assert page.status_code == 200
        loaded = re.findall(r'(?:src|href)="([^"]*)"', page.text)
        assert len(loaded) >= 3
        assert "//" not in "".join(loaded)
        assert "url: '/openapi.json'" in page.text
        for path in ("/openapi.json", *loaded):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/docs-files/../v1/models")).status_code == 401
        assert (await client.get("/docs-files/%2e%2e/%2e%2e/consts.py")).status_code == 404


async def test_every_route_declares_what_the_connection_may_answer(saying, client_of):
    async with client_of(saying()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            for status in CONNECTION_STATUSES:
                assert "ErrorAnswer" in json.dumps(operation["responses"][str(status)]), (path, status)
