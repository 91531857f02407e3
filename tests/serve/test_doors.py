"""What all doors share: cancelling, names, pages of other origins, token ids, and garbage, crowds and slow readers on each."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from exo_kimi.dialogue.events import ToolCallEvent
from exo_kimi.dialogue.prepare import prepare
from exo_kimi.dialogue.request import ConversationRequest
from exo_kimi.runtime.requests import TokenEvent
from exo_kimi.serve.answer.formats import ChatFormat, Head
from exo_kimi.serve.answer.frames import ChunkFrames
from exo_kimi.serve.anthropic.frames import MessageFrames
from exo_kimi.serve.gate import allowed_hosts
from exo_kimi.serve.responses.frames import ResponseFrames, ResponseHead
from exo_kimi.serve.responses.output import OutputOptions
from exo_kimi.serve.responses.request import parse_responses
from exo_kimi.serve.responses.tools import ToolBox

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": ASK,
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {**ASK, "max_tokens": 4000},
    "/api/chat": {**ASK, "model": "tiny-kimi"},
    "/api/generate": {"prompt": "Hi", "model": "tiny-kimi"},
}
NEW_DOORS = [path for path in BODIES if path != "/v1/chat/completions"]


@pytest.mark.parametrize("path", BODIES)
async def test_an_answer_is_cancelled_by_the_name_that_its_client_gave_it(saying, client_of, path):
    engine = saying("Hello there, friend. " * 50, delay_s=0.02)
    async with client_of(engine) as client:
        for stream in (False, True):
            asked = asyncio.ensure_future(
                client.post(path, json={**BODIES[path], "stream": stream}, headers={"x-request-id": "mine"})
            )
            while not engine.open:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            cancelled = await client.post("/v1/cancel/mine")
            assert cancelled.json() == {"id": "mine", "cancelled": True}
            answer = await asked
            assert answer.status_code == (200 if stream else 409)
            assert "cancelled" in answer.text
            await asyncio.sleep(0.05)
            assert not engine.open
        assert len(engine.cancelled) == 2
        assert (await client.post("/v1/cancel/mine")).status_code == 404


def test_an_answer_is_cancelled_by_the_id_of_its_first_event(saying, live):
    engine = saying("Hello there, friend. " * 100, delay_s=0.02)
    url = live(engine).url
    for path, place in (("/v1/chat/completions", ()), ("/v1/responses", ("response",)), ("/v1/messages", ("message",))):
        with httpx.stream(
            "POST", url + path, json={**BODIES[path], "stream": True}, trust_env=False, timeout=60
        ) as answer:
            rest = answer.iter_lines()
            value = json.loads(next(line for line in rest if line.startswith("data: ")).removeprefix("data: "))
            for key in place:
                value = value[key]
            assert httpx.post(f"{url}/v1/cancel/{value['id']}", trust_env=False, timeout=60).status_code == 200
            assert "cancelled" in "".join(rest)
    assert len(engine.cancelled) == 3


async def test_pages_of_other_origins_are_answered_only_where_they_were_named(saying, client_of):
    page = {"host": "localhost", "origin": "https://app.example"}
    preflight = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    hosts = allowed_hosts("127.0.0.1")
    async with client_of(saying(), hosts=hosts, api_key="k", cors_origins=["https://app.example"]) as client:
        asked = await client.options("/v1/chat/completions", headers=preflight)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        answer = await client.post("/v1/chat/completions", json=ASK, headers={**page, "authorization": "Bearer k"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert (await client.post("/v1/chat/completions", json=ASK, headers=page)).status_code == 401
        other = {**page, "origin": "https://evil.example", "authorization": "Bearer k"}
        assert (await client.post("/v1/chat/completions", json=ASK, headers=other)).status_code == 403
        refused = await client.options("/v1/chat/completions", headers={**preflight, "origin": "https://evil.example"})
        assert refused.status_code == 403
    async with client_of(saying(), hosts=hosts) as client:
        assert (await client.post("/v1/chat/completions", json=ASK, headers=page)).status_code == 403
        assert "access-control-allow-origin" not in (await client.get("/health", headers={"host": "localhost"})).headers


async def test_text_and_conversations_become_token_ids_and_back(saying, client_of):
    engine = saying()
    async with client_of(engine) as client:
        text = (await client.post("/tokenize", json={"prompt": "Hello é", "return_token_strs": True})).json()
        assert text["count"] == len(text["tokens"]) == len(text["token_strs"])
        assert (await client.post("/detokenize", json={"tokens": text["tokens"]})).json() == {"prompt": "Hello é"}
        said = (await client.post("/tokenize", json=ASK)).json()
        await client.post("/v1/chat/completions", json=ASK)
        assert tuple(said["tokens"]) == engine.requests[0].prompt_ids
        assert (said["max_model_len"], said["token_strs"]) == (4096, None)
        for path, body in (
            ("/tokenize", {}),
            ("/tokenize", {**ASK, "prompt": "x"}),
            ("/tokenize", {"prompt": 5}),
            ("/tokenize", {"messages": ["Hi"]}),
            ("/detokenize", {"tokens": [10**9]}),
            ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {"tokens": "x"}),
            ("/detokenize", {}),
        ):
            assert (await client.post(path, json=body)).status_code == 400, (path, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.sampled_from(
    ["text", "input_text", "tool_use", "tool_result", "image", "thinking", "document", "function_call"]
)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
            "type": PARTS | st.sampled_from(["message", "reasoning", "function_call_output", "item_reference"]) | JSON,
            "content": st.text(max_size=5)
            | st.lists(
                st.fixed_dictionaries({"type": PARTS}, optional={"text": JSON, "content": JSON, "source": JSON}),
                max_size=3,
            )
            | JSON,
            "call_id": JSON,
            "name": JSON,
            "arguments": JSON,
            "output": JSON,
            "tool_calls": JSON,
            "summary": JSON,
        },
    ),
    max_size=3,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        "tools tool_choice reasoning text thinking system instructions stop_sequences options format stream "
        "max_output_tokens include metadata previous_response_id output_config context_management think".split()
    ),
    JSON
    | st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["function", "custom", "namespace"]) | JSON},
            optional={"name": JSON, "parameters": JSON, "input_schema": JSON, "function": JSON, "tools": JSON},
        ),
        max_size=2,
    ),
    max_size=3,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
async def test_garbage_is_an_answer_or_a_refusal_in_the_door_s_shape_never_a_500(saying, client_of, data):
    async with client_of(saying(obeys=False)) as client:
        for path in NEW_DOORS:
            body = {**BODIES[path], **data.draw(FIELDS)}
            if data.draw(st.booleans()):
                body["input" if path == "/v1/responses" else "messages"] = data.draw(ITEMS | JSON)
            answer = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400, 404), (path, body, answer.text)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert isinstance(error, str) if path.startswith("/api/") else error["message"]
        for path in NEW_DOORS:
            answer = await client.post(path, content=data.draw(st.binary(max_size=30)))
            assert answer.status_code in (400, 415)


@pytest.mark.parametrize("path", NEW_DOORS)
async def test_a_body_over_the_limit_is_refused(saying, client_of, path):
    async with client_of(saying(), max_body_bytes=5000) as client:
        answer = await client.post(path, json={**BODIES[path], "padding": "x" * 6000})
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_sixty_four_at_once_get_what_one_gets(saying, live, path):
    engine = saying("Hello there, friend. " * 5)
    url = live(engine).url

    def ask(stream: bool) -> str:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            answer = client.post(path, json={**BODIES[path], "stream": stream})
            assert answer.status_code == 200
            return answer.text

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, [True, False] * 32))
    assert len({text.count("friend") + text.count("fri") for text in texts[::2]}) == 1
    assert len(engine.finished) == 64 and not engine.open


@pytest.mark.parametrize("path", NEW_DOORS)
def test_a_client_that_leaves_or_does_not_read_ends_its_answer(saying, live, path):
    engine = saying("Hello there, friend. " * 2000)
    server = live(engine)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**BODIES[path], "stream": True}).encode()
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        # It does not read: others are answered meanwhile.
        assert httpx.get(f"{server.url}/v1/models", trust_env=False).status_code == 200
    deadline = time.monotonic() + 10
    while engine.open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not engine.open


TEXT = "def f():\n    return 'é \\\\ \"'\n" * 120


def frames_of(path: str, speaker: Any) -> Any:
    """What a door writes, with a tool `write` and a custom tool `patch`."""
    head = Head(id="x", created=0, model="m", fingerprint="f")
    if path == "/v1/messages":
        return MessageFrames(head, prompt_tokens=1)
    if path == "/v1/responses":
        tools = ToolBox.of([{"type": "function", "name": "write"}, {"type": "custom", "name": "patch"}])
        request = parse_responses({"input": "Hi"})
        options = OutputOptions()
        return ResponseFrames(
            ResponseHead(head=head, request=request), tools, options, clock=time.time, keep=lambda *_: None
        )
    return ChunkFrames(ChatFormat(head=head, tokenizer=speaker.tokenizer), choices=1)


def argument_pieces(frames: list[bytes]) -> list[str]:
    """The pieces of a call's arguments in what a door sent."""
    found = []
    for frame in frames:
        value = json.loads(frame.decode().split("data: ", 1)[1])
        match value.get("type"):
            case "content_block_delta" if value["delta"]["type"] == "input_json_delta":
                found.append(value["delta"]["partial_json"])
            case "response.function_call_arguments.delta" | "response.custom_tool_call_input.delta":
                found.append(value["delta"])
            case None:
                calls = [call for choice in value["choices"] for call in choice["delta"].get("tool_calls") or ()]
                found += [call["function"]["arguments"] for call in calls]
    return [piece for piece in found if piece]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "write"),
        ("/v1/messages", "write"),
        ("/v1/responses", "write"),
        ("/v1/responses", "patch"),
    ],
)
def test_arguments_stream_from_their_first_tokens_on_every_door(voice, path, name):
    declared = [{"type": "function", "function": {"name": each, "parameters": {}}} for each in ("write", "patch")]
    asked = ConversationRequest(messages=({"role": "user", "content": "Hi"},), tools=tuple(declared))
    choice = prepare(asked, voice).choices[0]
    frames = frames_of(path, voice)
    marks = "<|tool_calls_section_begin|><|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>"
    arguments = voice.ids(json.dumps({"input": TEXT}))
    tokens = [*voice.ids(marks.format(name)), *arguments, *voice.ids("<|tool_call_end|><|tool_calls_section_end|>")]
    header = len(voice.ids(marks.format(name)))
    assert len(arguments) > 2000
    events, pieces, first = [], [], None
    for place, token in enumerate(tokens):
        found = choice.decoder.feed(TokenEvent(token_id=token))
        events += found
        new = argument_pieces([frame for event in found for frame in frames.event(0, event)])
        if new and first is None:
            first = place + 1 - header
        pieces += new
    quoted = len(voice.ids('{"input": "'))  # a custom tool's text begins behind it
    assert first is not None and first <= (3 if name == "write" else quoted + 3)
    assert len(pieces) > len(arguments) / 4
    whole = next(event.arguments for event in events if isinstance(event, ToolCallEvent))
    assert "".join(pieces) == (whole if name == "write" else TEXT)
    assert json.loads(whole) == {"input": TEXT}
