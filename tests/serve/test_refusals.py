"""What is refused, and how: always OpenAI's error object, never a 500, never a silent 200."""

from __future__ import annotations

import asyncio
import json
import math

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def error_of(response, status):
    """The error object of a response, after checking that it is one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return error


ALWAYS = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": "x" * 4097}, "stop"),
    ({"stop": ["ok", "é" * 2049]}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"300": 101}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "much"}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream": True, "stream_options": {"include_cost": True}}, "stream_options.include_cost"),
    ({"stream": "yes"}, "stream"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "white space"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": "look"}}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
        "response_format",
    ),
    ({"functions": [{"name": "look"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"best_of": 2}, "best_of"),
    ({"tempratur": 0.5}, "tempratur"),
]
STRICTLY = [
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"thinking": True, "chat_template_kwargs": {"thinking": False}}, "thinking"),
    ({"chat_template_kwargs": {"mood": "good"}}, "chat_template_kwargs.mood"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"verbosity": "low"}, "verbosity"),
    ({"tempratur": None}, "tempratur"),
]


@pytest.mark.parametrize(
    ("fields", "param", "strict"),
    [*((*each, strict) for each in ALWAYS for strict in (False, True)), *((*each, True) for each in STRICTLY)],
)
async def test_what_cannot_be_honoured_is_a_400_that_names_the_field(saying, client_of, fields, param, strict):
    engine = saying()
    async with client_of(engine, strict_api=strict) as client:
        body = {
            key: value for key, value in {"messages": ASK, **fields}.items() if value is not None or key == "tempratur"
        }
        error = error_of(await client.post(CHAT, json=body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize("fields", [fields for fields, _ in STRICTLY])
async def test_what_only_a_strict_api_refuses_is_answered_and_named_where_it_asks_for_something(
    saying, client_of, fields
):
    async with client_of(saying()) as client:
        response = await client.post(CHAT, json={"messages": ASK, **fields})
    assert response.status_code == 200, response.text
    first = json.loads(response.text.removeprefix("data: ").split("\n\n")[0])
    told = first.get("warnings", [])
    assert bool(told) == ("x-exo-kimi-warnings" in response.headers)
    nothing_lost = ({"stream_options": {}}, {"parallel_tool_calls": False}, {"store": 0}, {"tempratur": None})
    silent = fields in nothing_lost or ("messages" in fields and fields["messages"][0]["content"] is None)
    if "stream" not in fields:
        assert bool(told) != silent


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
async def test_content_that_is_not_text_is_refused(saying, client_of, kind):
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "data:,"}}]}
    async with client_of(saying()) as client:
        error = error_of(await client.post(CHAT, json={"messages": [message]}), 400)
    assert kind in error["message"]


async def test_bookkeeping_and_nulls_change_nothing(saying, client_of):
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        **dict.fromkeys(
            ("functions", "audio", "tools", "tool_choice", "stop", "max_tokens", "n", "logit_bias", "stream")
        ),
    }
    engine = saying()
    async with client_of(engine) as client:
        plain = await client.post(CHAT, json={"messages": ASK})
        response = await client.post(CHAT, json={"messages": ASK, **fields})
    assert response.status_code == plain.status_code == 200
    first, second = engine.requests
    assert (first.sampling, first.prompt_ids, first.max_tokens) == (
        second.sampling,
        second.prompt_ids,
        second.max_tokens,
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"messages": NaN}',
        b'{"temperature": 1e999, "messages": []}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\udfff": 1}',
        b"[" * 100_000,
        b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"messages": "' + b"x" * 100_000,
        b'{"model": "m", ' * 7000,
    ],
)
async def test_bodies_that_are_no_usable_json_are_a_400(saying, client_of, body):
    async with client_of(saying()) as client:
        for path in (CHAT, "/v1/completions"):
            error = error_of(await client.post(path, content=body), 400)
            assert error["code"] == "invalid_json"


async def test_a_body_over_the_limit_is_a_413_however_it_is_sent(saying, client_of):
    async def parts():
        for _ in range(8):
            yield b" " * 200

    async with client_of(saying(), max_body_bytes=1000) as client:
        error_of(await client.post(CHAT, content=b" " * 1001), 413)
        error_of(await client.post(CHAT, content=parts()), 413)
        assert (await client.post(CHAT, json={"messages": ASK})).status_code == 200


async def test_what_a_web_page_may_send_unasked_is_a_415(saying, client_of):
    async with client_of(saying()) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            body = json.dumps({"messages": ASK}).encode()
            error_of(await client.post(CHAT, content=body, headers={"content-type": kind}), 415)
        error_of(await client.post(CHAT, content=body, headers={"origin": "https://example.org"}), 415)
        assert (await client.post(CHAT, content=body)).status_code == 200  # a program that names no type


async def test_unknown_urls_and_methods_have_error_objects(saying, client_of):
    async with client_of(saying()) as client:
        assert error_of(await client.get("/v2/chat"), 404)["code"] == "unknown_url"
        response = await client.get(CHAT)
        assert error_of(response, 405)["code"] == "method_not_supported"
        assert response.headers["allow"] == "POST"
        assert error_of(await client.get("/v1/models/other"), 404)["code"] == "model_not_found"
        assert error_of(await client.post(CHAT, json={"messages": ASK, "model": "other"}), 404)["param"] == "model"
        for model in (None, "", "default", "tiny-kimi"):
            assert (await client.post(CHAT, json={"messages": ASK, "model": model})).json()["model"] == "tiny-kimi"


async def test_a_wrong_key_is_a_401_without_work(saying, client_of):
    engine = saying()
    async with client_of(engine, api_key="sécret") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sécret".encode()}):
            error = error_of(await client.post(CHAT, content=b"not even json", headers=headers), 401)
            assert error["code"] == "invalid_api_key"
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/nothing")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        answer = await client.post(CHAT, json={"messages": ASK}, headers={"authorization": "Bearer sécret".encode()})
        assert answer.status_code == 200
    assert len(engine.requests) == 1


async def test_an_unforeseen_failure_is_a_500_without_its_inside(saying, client_of, caplog):
    engine = saying(break_at=1, fault=ZeroDivisionError("secret detail"))
    async with client_of(engine) as client:
        error = error_of(await client.post(CHAT, json={"messages": ASK}), 500)
        assert "secret" not in error["message"]
        streamed = (await client.post(CHAT, json={"messages": ASK, "stream": True})).text
    assert "secret" not in streamed
    assert '"code":"internal_error"' in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"prompt": "a", "messages": ASK}, "messages"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
    ],
)
async def test_text_completions_refuse_by_name_too(saying, client_of, fields, param):
    async with client_of(saying(), strict_api="stream_options" in fields) as client:
        body = {key: value for key, value in fields.items() if value is not None}
        assert error_of(await client.post("/v1/completions", json=body), 400)["param"] == param


async def test_many_wrong_items_are_refused_at_once(saying, client_of):
    wrong = [1.5] * 300_000
    async with client_of(saying()) as client:
        for fields in (
            {"stop": wrong},
            {"tools": wrong},
            {"messages": wrong},
            {"messages": [{"role": "user", "content": wrong}]},
        ):
            async with asyncio.timeout(10):
                error_of(await client.post(CHAT, json={"messages": ASK, **fields}), 400)
        async with asyncio.timeout(10):
            error_of(await client.post("/v1/completions", json={"prompt": wrong}), 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "messages model stream stream_options max_tokens max_completion_tokens n stop temperature top_p top_k min_p seed "
    "presence_penalty frequency_penalty repetition_penalty logit_bias logprobs top_logprobs tools tool_choice "
    "parallel_tool_calls response_format thinking chat_template_kwargs reasoning_effort user store metadata prompt echo "
    "best_of suffix"
).split()
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])},
    optional=dict.fromkeys(("content", "name", "tool_calls", "tool_call_id", "reasoning_content", "refusal"), JSON),
)
BODY = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5).flatmap(
    lambda body: st.fixed_dictionaries(
        {}, optional={"messages": st.lists(MESSAGE, max_size=3), "prompt": st.text(max_size=10)}
    ).map(lambda good: {**body, **good})
)


@pytest.fixture
def post(saying, app_of):
    """`post(path, content)`: the answer of one app, which takes longer to make than to ask."""
    app = app_of(saying("ok"))

    async def ask(path, content):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=content)

    return lambda path, content: asyncio.run(ask(path, content))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODY, path=st.sampled_from([CHAT, "/v1/completions"]))
def test_no_body_at_all_makes_a_500(post, body, path):
    response = post(path, json.dumps(body).encode())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response, response.status_code)
    elif not body.get("stream"):
        assert math.isfinite(response.json()["usage"]["total_tokens"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60), path=st.sampled_from([CHAT, "/v1/completions"]))
def test_no_bytes_at_all_make_a_500(post, body, path):
    error_of(post(path, body), 400)


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        MemoryError(),
        RuntimeError("can't start new thread"),
        SystemError("error return without exception set"),
        OSError(14, "Bad address"),
    ],
)
async def test_what_the_machine_refuses_is_told_as_a_passing_state_and_not_as_a_bug(saying, client_of, error, caplog):
    async with client_of(saying(refusal=error)) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert answer.headers["retry-after"]
    assert "Traceback" not in caplog.text
