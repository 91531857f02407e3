"""The Messages API: its objects and events, its blocks both ways, its errors, and the anthropic client on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from exo_kimi.dialogue.events import EndEvent, ToolCallBegin, ToolCallDelta, ToolCallEvent, Usage
from exo_kimi.errors import ContextLengthError, OverloadedError
from exo_kimi.serve.answer.formats import Head
from exo_kimi.serve.anthropic.contract import AnthropicErrorAnswer, MessageEvent, MessageObject
from exo_kimi.serve.anthropic.conversation import conversation_of_messages
from exo_kimi.serve.anthropic.frames import MessageFrames
from exo_kimi.serve.anthropic.request import parse_messages

MESSAGES = "/v1/messages"
ASK = {"max_tokens": 500, "messages": [{"role": "user", "content": "Hi"}]}
WEATHER = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def call(name: str, arguments: str, number: int = 0) -> str:
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>"
        f"{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    )


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        if value["type"] != "error":
            assert MessageEvent.model_validate_json(json.dumps(value), strict=True)
        found.append(value)
    return found


def message_of(streamed: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events of a stream add up to, by Anthropic's documentation."""
    streamed = [each for each in streamed if each["type"] != "ping"]
    message = streamed[0]["message"]
    grown: dict[int, str] = {}
    for each in streamed[1:]:
        match each["type"]:
            case "content_block_start":
                assert each["index"] == len(message["content"])
                message["content"].append(each["content_block"])
            case "content_block_delta":
                block, delta = message["content"][each["index"]], each["delta"]
                if delta["type"] == "input_json_delta":
                    grown[each["index"]] = grown.get(each["index"], "") + delta["partial_json"]
                else:
                    key = delta["type"].removesuffix("_delta")
                    block[key] += delta[key]
            case "content_block_stop":
                if each["index"] in grown:
                    message["content"][each["index"]]["input"] = json.loads(grown[each["index"]])
            case "message_delta":
                message |= each["delta"]
                message["usage"] |= each["usage"]
    assert [each["type"] for each in streamed[-2:]] == ["message_delta", "message_stop"]
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**{key: value for key, value in message.items() if key != "id"}, "content": content}


@pytest.mark.parametrize(
    ("said", "fields", "reason"),
    [
        ("I think.</think>Hello.", {}, "end_turn"),
        ("I think.</think>Hello, all of you.", {"max_tokens": 8}, "max_tokens"),
        ("I think.</think>Hello STOP there.", {"stop_sequences": ["never", "STOP"]}, "stop_sequence"),
        ("I think.</think>So." + call("get_weather", '{"city": "Oslo"}'), {"tools": [WEATHER]}, "tool_use"),
        (
            "I think.</think>" + call("get_weather", '{"city": "A"}') + call("get_weather", '{"city": "B"}', 1),
            {"tools": [WEATHER]},
            "tool_use",
        ),
    ],
)
async def test_the_events_add_up_to_the_message(saying, thinker, client_of, said, fields, reason):
    async with client_of(saying(said, by=thinker, cached_tokens=3)) as client:
        whole = (await client.post(MESSAGES, json={**ASK, **fields})).json()
        streamed = events((await client.post(MESSAGES, json={**ASK, **fields, "stream": True})).text)
    assert MessageObject.model_validate_json(json.dumps(whole), strict=True)
    usage = streamed[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] == whole["usage"]["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] == whole["usage"]["input_tokens"]
    assert without_ids(message_of(streamed)) == without_ids(whole)
    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == ("STOP" if reason == "stop_sequence" else None)
    assert whole["content"][0]["type"] == "thinking" and whole["content"][0]["signature"]


async def test_what_the_cache_held_is_no_input(saying, client_of):
    async with client_of(saying(cached_tokens=7)) as client:
        counted = (await client.post(f"{MESSAGES}/count_tokens", json={"messages": ASK["messages"]})).json()
        usage = (await client.post(MESSAGES, json=ASK)).json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]


async def test_a_silent_stream_has_a_start_and_pings(saying, client_of):
    async with client_of(saying(first_delay_s=0.4), ping_interval_s=0.03) as client:
        kinds = [each["type"] for each in events((await client.post(MESSAGES, json={**ASK, "stream": True})).text)]
    assert kinds[0] == "message_start"
    assert kinds[1:5] == ["ping"] * 4


def test_arguments_that_are_no_json_reach_the_client_as_a_call_that_it_can_refuse():
    frames = MessageFrames(Head(id="msg_1", created=0, model="m", fingerprint="f"), prompt_tokens=1)
    text = '{"city": Oslo, or so'
    reply = [
        ToolCallBegin(0, "functions.get_weather:0", "get_weather"),
        ToolCallDelta(0, text),
        ToolCallEvent(0, "functions.get_weather:0", "get_weather", text),
        EndEvent(finish_reason="tool_calls", completion_tokens=5),
    ]
    usage = Usage(prompt_tokens=1, completion_tokens=5, cached_tokens=0, reasoning_tokens=0)
    message = frames.whole([reply], usage)
    assert (message["stop_reason"], message["content"][0]["input"]) == ("tool_use", {"_raw_arguments": text})


async def test_blocks_of_every_kind_are_read(saying, client_of):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "See", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and now?"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no net"}],
                },
            ],
        },
        {"role": "assistant", "content": None},
        {
            "role": "user",
            "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}},
                {
                    "type": "document",
                    "title": "T",
                    "source": {"type": "text", "media_type": "text/plain", "data": "inside"},
                },
                {"type": "search_result", "title": "S", "source": "u", "content": [{"type": "text", "text": "found"}]},
            ],
        },
        {"role": "system", "content": "A reminder."},
    ]
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=2;"},
        {"type": "text", "text": "You help."},
    ]
    engine = saying()
    async with client_of(engine) as client:
        answer = await client.post(MESSAGES, json={**ASK, "messages": messages, "system": system, "tools": [WEATHER]})
    assert answer.status_code == 200, answer.text
    prompt = engine.voice.tokenizer.decode(engine.requests[0].prompt_ids)
    for text in (
        "You help.",
        "See",
        "I look.",
        "Error: no net",
        "and now?",
        "image: left out",
        "inside",
        "found",
        "A reminder.",
    ):
        assert text in prompt, text
    assert prompt.index("no net") < prompt.index("and now?")  # a result follows its call
    assert "billing" not in prompt
    assert "image" in " ".join(answer.json()["warnings"])


def test_a_turn_of_the_assistant_is_one_message():
    asked = {
        **ASK,
        "messages": [
            *ASK["messages"],
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "So."},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"é": 1}},
                ],
            },
        ],
    }
    turn = conversation_of_messages(parse_messages(asked)).messages[-1]
    function = {"name": "f", "arguments": '{"é": 1}'}
    assert turn == {
        "role": "assistant",
        "content": "So.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "t", "type": "function", "function": function}],
    }


async def test_a_reply_that_is_begun_is_gone_on_with(saying, client_of):
    engine = saying(" B)")
    async with client_of(engine) as client:
        begun = [*ASK["messages"], {"role": "assistant", "content": "The answer is ("}]
        answer = (await client.post(MESSAGES, json={**ASK, "messages": begun})).json()
        await client.post(MESSAGES, json=ASK)
    assert answer["content"] == [{"type": "text", "text": " B)"}]
    with_begin, alone = (engine.requests[index].prompt_ids for index in (0, 1))
    assert with_begin == alone + tuple(engine.voice.tokenizer.encode("The answer is ("))


@pytest.mark.parametrize(
    ("choice", "mode", "name", "parallel"),
    [
        (None, "auto", None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", None, False),
        ({"type": "none"}, "none", None, True),
        ({"type": "any"}, "required", None, True),
        ({"type": "tool", "name": "get_weather"}, "required", "get_weather", True),
    ],
)
def test_tool_choices_are_read(choice, mode, name, parallel):
    found = conversation_of_messages(parse_messages({**ASK, "tools": [WEATHER], "tool_choice": choice})).tool_choice
    assert (found.mode, found.name, found.parallel) == (mode, name, parallel)


@pytest.mark.parametrize(
    ("fields", "wanted", "budget", "effort", "keeps"),
    [
        ({}, None, None, None, None),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, None, None, None, None),
        ({"thinking": {"type": "disabled"}}, False, None, None, None),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}, "output_config": {"effort": "low"}},
            True,
            2000,
            "low",
            None,
        ),
        ({"output_config": {"effort": "low"}}, None, None, "low", None),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
            None,
            None,
            None,
            True,
        ),
    ],
)
def test_thinking_is_read(fields, wanted, budget, effort, keeps):
    found = conversation_of_messages(parse_messages({**ASK, **fields}))
    assert (found.thinking, found.reasoning_budget, found.keep_reasoning) == (wanted, budget, keeps)
    assert found.reasoning_effort == effort


async def test_what_an_agent_sends_beside_is_taken_silently_and_what_is_lost_is_named(saying, client_of):
    keep = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    silent = {"metadata": {"user_id": "u"}, "service_tier": "auto"}
    lost = {
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
        "new_field": 1,
    }
    async with client_of(saying()) as client:
        assert "warnings" not in (await client.post(f"{MESSAGES}?beta=true", json={**ASK, **silent})).json()
        kept = (await client.post(MESSAGES, json={**ASK, "context_management": keep})).json().get("warnings", [])
        assert "context_management" not in " ".join(kept)
        answer = await client.post(MESSAGES, json={**ASK, **lost})
        start = events((await client.post(MESSAGES, json={**ASK, **lost, "stream": True})).text)[0]
    told = " ".join(answer.json()["warnings"])
    assert start["message"]["warnings"] == answer.json()["warnings"]
    assert all(name in told for name in ("clear_tool_uses_20250919", "web_search_20250305", "new_field"))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": ["Hi"]},
        {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
        {"temperature": "hot"},
        {"stop_sequences": [""]},
        {"tools": [{"name": "a b", "input_schema": {}}]},
        {"tools": [{"name": "f"}]},
        {"tools": [WEATHER, WEATHER]},
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "fly"}},
        {"tool_choice": {"type": "any"}},
        {"thinking": {"type": "sometimes"}},
        {"container": "c"},
    ],
)
async def test_what_is_malformed_is_refused_in_anthropic_s_shape(saying, client_of, fields):
    engine = saying()
    async with client_of(engine) as client:
        for stream in (False, True):
            answer = await client.post(MESSAGES, json={**ASK, "stream": stream, **fields})
            assert answer.status_code == 400
            assert AnthropicErrorAnswer.model_validate_json(answer.text, strict=True).model_dump() == answer.json()
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not engine.requests


async def test_every_failure_has_anthropic_s_type(saying, client_of):
    async with client_of(saying(), api_key="secret", max_body_bytes=2000) as client:
        bearer, key = {"authorization": "Bearer secret"}, {"x-api-key": "secret"}
        for headers, body, status, kind in (
            ({}, ASK, 401, "authentication_error"),
            ({"x-api-key": "no"}, ASK, 401, "authentication_error"),
            (key, {**ASK, "model": "other"}, 404, "not_found_error"),
            (bearer, {**ASK, "system": "x" * 3000}, 413, "request_too_large"),
        ):
            answer = await client.post(MESSAGES, json=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
            assert answer.headers["request-id"].startswith("req_")
        for headers in (bearer, key):
            assert (await client.post(MESSAGES, json=ASK, headers=headers)).status_code == 200
        missing = await client.get("/v1/messages/batches", headers=key)
        assert missing.json()["error"]["type"] == "not_found_error"
    full = OverloadedError("too many requests are waiting")
    long = ContextLengthError("the prompt has 9 tokens, and the context holds 8")
    for refusal, status, kind, words in (
        (full, 503, "overloaded_error", "waiting"),
        (long, 400, "invalid_request_error", "prompt is too long: "),
    ):
        async with client_of(saying(refusal=refusal)) as client:
            for stream in (False, True):
                answer = await client.post(MESSAGES, json={**ASK, "stream": stream})
                assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
                assert words in answer.json()["error"]["message"]


async def test_a_fault_in_the_stream_is_an_error_event(saying, client_of):
    async with client_of(saying(break_at=3)) as client:
        last = events((await client.post(MESSAGES, json={**ASK, "stream": True})).text)[-1]
    assert last["type"] == "error" and "stage 1 died" in last["error"]["message"]


async def test_models_are_told_in_both_shapes_under_every_name(saying, client_of):
    async with client_of(saying(), further_names=["claude-x", "tiny-kimi"]) as client:
        openai = (await client.get("/v1/models")).json()
        theirs = (await client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
        assert [card["id"] for card in openai["data"]] == [card["id"] for card in theirs["data"]]
        assert [card["id"] for card in openai["data"]] == ["tiny-kimi", "claude-x"]
        assert all(card["max_model_len"] == card["context_length"] == 4096 for card in openai["data"])
        one = (await client.get("/v1/models/claude-x", headers={"anthropic-version": "2023-06-01"})).json()
        assert (one["type"], one["display_name"]) == ("model", "claude-x")
        assert (await client.post(MESSAGES, json={**ASK, "model": "claude-x"})).json()["model"] == "claude-x"
        assert (await client.post(MESSAGES, json={**ASK, "model": "gpt-x"})).status_code == 404
        assert (await client.head("/")).status_code == 200
    async with client_of(saying(), any_model=True) as client:
        assert (await client.post(MESSAGES, json={**ASK, "model": "gpt-x"})).json()["model"] == "tiny-kimi"


@pytest.mark.parametrize("stream", [False, True])
def test_the_anthropic_client_edits_a_file_in_an_agent_loop(playing, thinker, live, tmp_path: Path, stream: bool):
    """A call that reads, a call that writes, an answer, with thinking that goes back."""
    file = tmp_path / "greeting.txt"
    file.write_text("Helo")
    schema = {"type": "object", "properties": {}}
    tools: Any = [{"name": name, "input_schema": schema} for name in ("read_file", "write_file")]
    engine = playing(
        "Look.</think>I look." + call("read_file", "{}"),
        "Write.</think>" + call("write_file", '{"text": "Hello"}', 1),
        "Done.</think>I corrected the greeting.",
        by=thinker,
    )
    client = anthropic.Anthropic(base_url=live(engine).url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "Correct greeting.txt"}]
    for _ in range(5):
        asked: dict[str, Any] = {"model": "tiny-kimi", "max_tokens": 500, "messages": messages, "tools": tools}
        if stream:
            with client.messages.stream(**asked) as streamed:
                message = streamed.get_final_message()
        else:
            message = client.messages.create(**asked)
        assert message.content[0].type == "thinking"
        messages.append({"role": "assistant", "content": [block.to_dict() for block in message.content]})
        results = []
        for block in message.content:
            if block.type != "tool_use":
                continue
            if block.name == "write_file":
                file.write_text(str(block.input["text"]))
            results.append({"type": "tool_result", "tool_use_id": block.id, "content": file.read_text()})
        if message.stop_reason != "tool_use":
            break
        messages.append({"role": "user", "content": results})
    assert message.content[-1].text == "I corrected the greeting."
    assert file.read_text() == "Hello"
    assert len(engine.requests) == 3


def test_the_anthropic_client_counts_lists_and_reads_errors(saying, live):
    server = live(saying())
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    counted = client.messages.count_tokens(model="tiny-kimi", messages=[{"role": "user", "content": "Hi"}])
    assert counted.input_tokens > 3
    assert [model.id for model in client.models.list()] == ["tiny-kimi"]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])
    assert httpx.head(server.url).status_code == 200
