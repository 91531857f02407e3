"""The Responses API: its objects and events, its items both ways, what is kept, and the openai client on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from exo_kimi.serve.responses.contract import ResponseEvent, ResponseObject
from exo_kimi.serve.responses.items import decode_reasoning, encode_reasoning, messages_of
from exo_kimi.serve.responses.store import ResponseStore, StoredResponse
from exo_kimi.serve.responses.tools import ToolBox

RESPONSES = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files."}


def call(name: str, arguments: str, number: int = 0) -> str:
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>"
        f"{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    )


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream: each named as its type, numbered from 0, and none behind the last."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n", 1)
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


async def stream_of(client, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post(RESPONSES, json={"input": "Hi", "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def without_ids(value: Any) -> Any:
    """The same without what is drawn anew for every answer."""
    if isinstance(value, dict):
        drawn = {"id", "call_id", "created_at", "completed_at"}
        return {key: without_ids(each) for key, each in value.items() if key not in drawn}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("Hello.", {}),
        ("Hello.", {"max_output_tokens": 1}),
        ("Let me look." + call("get_weather", '{"city": "Oslo"}'), {"tools": [WEATHER]}),
        (call("apply_patch", '{"input": "*** Begin Patch\\n\\u00e9"}'), {"tools": [PATCH, WEATHER]}),
        ("Hello.", {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
    ],
)
@pytest.mark.parametrize("reasoning", [None, {"summary": "auto"}, {"effort": "high", "summary": None}])
async def test_the_stream_ends_with_the_whole_response(saying, thinker, client_of, said, fields, reasoning):
    fields = {**fields, "reasoning": reasoning, "include": [*fields.get("include", ()), "reasoning.encrypted_content"]}
    async with client_of(saying(f"I think.</think>{said}", by=thinker)) as client:
        whole = (await client.post(RESPONSES, json={"input": "Hi", **fields})).json()
        streamed = await stream_of(client, **fields)
    assert ResponseObject.model_validate_json(json.dumps(whole), strict=True)
    for each in streamed:
        assert ResponseEvent.model_validate_json(json.dumps(each), strict=True)
    assert [each["type"] for each in streamed[:2]] == ["response.created", "response.in_progress"]
    last = streamed[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert without_ids(last["response"]) == without_ids(whole)
    # Every item is added, grows and is done at its place, and its pieces are the whole of it.
    for place, item in enumerate(last["response"]["output"]):
        own = [each for each in streamed if each.get("output_index") == place]
        assert own[0]["type"] == "response.output_item.added" and own[-1]["type"] == "response.output_item.done"
        assert own[-1]["item"] == item
        assert {each["item_id"] for each in own[1:-1]} <= {item["id"]}
        pieces = "".join(each["delta"] for each in own if each["type"].endswith(".delta"))
        texts = {
            "message": lambda item: item["content"][0]["text"],
            "reasoning": lambda item: (item["summary"] or item["content"])[0]["text"],
            "function_call": lambda item: item["arguments"],
            "custom_tool_call": lambda item: item["input"],
        }
        assert pieces == texts[item["type"]](item) != ""


async def test_the_events_of_a_message_come_in_openai_s_order(saying, client_of):
    async with client_of(saying("Hello there.")) as client:
        kinds = [each["type"].removeprefix("response.") for each in await stream_of(client)]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


async def test_a_custom_tool_is_a_call_with_its_text(saying, client_of):
    text = '*** Begin Patch\n*** Update File: a.txt\n"é"\n*** End Patch'
    engine = saying(call("apply_patch", json.dumps({"input": text})))
    async with client_of(engine) as client:
        item = (await client.post(RESPONSES, json={"input": "Hi", "tools": [PATCH]})).json()["output"][0]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", text)


async def test_a_tool_of_a_namespace_comes_back_in_it(saying, client_of):
    tools = [{"type": "namespace", "name": "agents", "tools": [WEATHER]}, WEATHER]
    engine = saying(call("agents__get_weather", '{"city": "Oslo"}'))
    async with client_of(engine) as client:
        item = (await client.post(RESPONSES, json={"input": "Hi", "tools": tools})).json()["output"][0]
        again = await client.post(RESPONSES, json={"input": [{"role": "user", "content": "Hi"}, item], "tools": tools})
    assert (item["name"], item["namespace"]) == ("get_weather", "agents")
    assert again.status_code == 200
    assert "agents__get_weather" in engine.voice.tokenizer.decode(engine.requests[-1].prompt_ids)


async def test_tools_of_openai_s_own_servers_are_left_out_and_named(saying, client_of):
    engine = saying()
    hosted = [{"type": "web_search"}, {"type": "local_shell"}, {"type": "image_generation"}, WEATHER]
    async with client_of(engine) as client:
        answer = await client.post(RESPONSES, json={"input": "Hi", "tools": hosted})
    assert answer.status_code == 200
    for name in ("web_search", "local_shell", "image_generation"):
        assert name in answer.headers["x-exo-kimi-warnings"]
        assert any(name in warning for warning in answer.json()["warnings"])
    assert "get_weather" in engine.voice.tokenizer.decode(engine.requests[0].prompt_ids)


async def test_a_probe_with_empty_input_is_answered(saying, client_of):
    async with client_of(saying()) as client:
        for fields in ({"input": []}, {"input": ""}, {}, {"input": [], "instructions": "Be brief."}):
            answer = await client.post(RESPONSES, json={**fields, "max_output_tokens": 1})
            assert answer.status_code == 200
            assert answer.json()["status"] == "incomplete"
            assert answer.json()["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_what_changes_nothing_is_taken_silently_and_what_would_is_named(saying, client_of):
    silent = {
        "metadata": {"a": "b"},
        "user": "u",
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "client_metadata": {},
    }
    async with client_of(saying()) as client:
        assert "warnings" not in (await client.post(RESPONSES, json={"input": "Hi", **silent})).json()
        named = {"truncation": "auto", "new_field": 1, "reasoning": {"context": "all"}}
        told = " ".join((await client.post(RESPONSES, json={"input": "Hi", **named})).json()["warnings"])
    assert all(name in told for name in ("truncation", "new_field", "reasoning.context"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"previous_response_id": "resp_no"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_malformed_or_would_be_lost_is_refused_by_name(saying, client_of, fields, param, stream):
    engine = saying()
    async with client_of(engine) as client:
        answer = await client.post(RESPONSES, json={"input": "Hi", "stream": stream, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not engine.requests


async def test_history_of_any_kind_is_taken(saying, client_of):
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "See"}, {"type": "input_image", "image_url": "data:,"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "of-another-server"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "function_call", "call_id": "call_x", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "call_x", "output": [{"type": "input_text", "text": "12 degrees"}]},
        {"type": "function_call_output", "call_id": "call_x", "output": None},
        {"type": "message", "role": "assistant", "content": None},
    ]
    engine = saying()
    async with client_of(engine) as client:
        answer = await client.post(RESPONSES, json={"input": items})
    assert answer.status_code == 200, answer.text
    prompt = engine.voice.tokenizer.decode(engine.requests[0].prompt_ids)
    assert "12 degrees" in prompt and "image: left out" in prompt
    told = " ".join(answer.json()["warnings"])
    assert "1 images were left out" in told and "web_search_call" in told


def test_reasoning_text_and_calls_of_one_turn_are_one_message():
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}], "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "b", "name": "g", "input": "x"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "2"},
        {"type": "reasoning", "summary": [], "encrypted_content": encode_reasoning("Ah. é")},
        {"type": "message", "role": "assistant", "content": "Done."},
    ]
    messages = messages_of(items, find=lambda _: None, warnings=[])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    turn = messages[1]
    assert (turn["content"], turn["reasoning_content"]) == ("Let me look.", "Hm.")
    assert [(each["id"], each["function"]["name"]) for each in turn["tool_calls"]] == [("a", "f"), ("b", "g")]
    assert turn["tool_calls"][1]["function"]["arguments"] == '{"input": "x"}'
    assert messages[-1] == {"role": "assistant", "content": "Done.", "reasoning_content": "Ah. é"}
    assert decode_reasoning("exo-kimi:###") == decode_reasoning(None) == decode_reasoning("gAAAA") == ""


def test_a_choice_among_several_tools_offers_those_alone():
    tools = [WEATHER, {"type": "function", "name": "b"}, {"type": "web_search"}]
    box = ToolBox.of(tools)
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "b"}, {"type": "web_search"}],
    }
    choice = box.choose(allowed, parallel=False)
    assert (choice.mode, choice.name, choice.parallel) == ("required", None, False)
    assert [tool["function"]["name"] for tool in box.functions] == ["b"]


async def test_a_response_is_kept_gone_on_with_and_forgotten(playing, client_of):
    engine = playing(call("get_weather", '{"city": "Oslo"}'), "It is 12 degrees.")
    async with client_of(engine) as client:
        first = (
            await client.post(RESPONSES, json={"input": "Weather?", "tools": [WEATHER], "instructions": "ONCE"})
        ).json()
        assert (await client.get(f"{RESPONSES}/{first['id']}")).json() == first
        output = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "12"}
        asked = {"input": [output], "previous_response_id": first["id"], "tools": [WEATHER]}
        second = (await client.post(RESPONSES, json=asked)).json()
        assert second["output"][0]["content"][0]["text"] == "It is 12 degrees."
        prompt = engine.voice.tokenizer.decode(engine.requests[-1].prompt_ids)
        assert "Weather?" in prompt and "Oslo" in prompt and "ONCE" not in prompt
        listed = (await client.get(f"{RESPONSES}/{second['id']}/input_items")).json()
        assert [item["type"] for item in listed["data"]] == ["function_call_output"]
        reference = [{"type": "item_reference", "id": first["output"][0]["id"]}, output]
        assert (await client.post(RESPONSES, json={"input": reference, "tools": [WEATHER]})).status_code == 200
        assert (await client.delete(f"{RESPONSES}/{first['id']}")).json()["deleted"] is True
        for gone in (client.get(f"{RESPONSES}/{first['id']}"), client.delete(f"{RESPONSES}/{first['id']}")):
            assert (await gone).status_code == 404
        assert (await client.post(RESPONSES, json=asked)).json()["error"]["code"] == "previous_response_not_found"
        unkept = (await client.post(RESPONSES, json={"input": "Hi", "store": False})).json()
        assert (await client.get(f"{RESPONSES}/{unkept['id']}")).status_code == 404


def test_the_store_is_bounded_in_number_and_in_bytes():
    def stored(number: int, text: str = "x") -> StoredResponse:
        output = [{"id": f"item_{number}", "text": text}]
        return StoredResponse(response={"id": f"resp_{number}", "output": output}, input_items=(), messages=())

    store = ResponseStore(max_bytes=1000, max_responses=3)
    for number in range(4):
        store.keep(stored(number))
    assert (len(store), store.get("resp_0"), store.find_item("item_0")) == (3, None, None)
    assert store.get("resp_1") is not None  # used, and so the last to go
    store.keep(stored(4, "x" * 850))
    assert (len(store), store.find_item("item_1")) == (2, {"id": "item_1", "text": "x"})
    store.keep(stored(5, "x" * 2000))
    assert store.get("resp_5") is None
    for response_id in ("resp_1", "resp_4"):
        store.delete(response_id)
    assert (store.bytes, len(store)) == (0, 0)


async def test_a_prompt_that_is_too_long_fails_in_the_stream_where_codex_looks(saying, client_of):
    from exo_kimi.errors import ContextLengthError

    engine = saying(refusal=ContextLengthError("the prompt has 9 tokens, and the context holds 8"))
    async with client_of(engine) as client:
        assert (await client.post(RESPONSES, json={"input": "Hi"})).status_code == 400
        last = (await stream_of(client))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "context_length_exceeded"


async def test_a_fault_in_the_stream_is_a_failed_response(saying, client_of):
    async with client_of(saying(break_at=3)) as client:
        last = (await stream_of(client))[-1]
        first = await client.post(RESPONSES, json={"input": "Hi"})
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "stage 1 died" in last["response"]["error"]["message"]
    assert first.status_code == 503


async def test_a_silent_stream_has_comments_and_now_and_then_an_event(saying, client_of):
    async with client_of(saying(first_delay_s=0.5), ping_interval_s=0.03) as client:
        answer = await client.post(RESPONSES, json={"input": "Hi", "stream": True})
    assert answer.text.count(": ping") >= 5
    kinds = [each["type"] for each in events(answer.text)]
    assert kinds.count("response.in_progress") >= 2


async def test_tokens_are_counted_without_an_answer(saying, client_of):
    engine = saying()
    async with client_of(engine) as client:
        counted = (await client.post(f"{RESPONSES}/input_tokens", json={"input": "Hi", "tools": [WEATHER]})).json()
        usage = (await client.post(RESPONSES, json={"input": "Hi", "tools": [WEATHER]})).json()["usage"]
    assert counted == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_the_openai_client_edits_a_file_in_an_agent_loop(playing, live, tmp_path: Path, stream: bool, chained: bool):
    """A call that reads, a call that writes, an answer: with the items sent back, or with previous_response_id."""
    file = tmp_path / "greeting.txt"
    file.write_text("Helo")
    tools = [
        {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, "strict": False}
        for name in ("read_file", "write_file")
    ]
    engine = playing(
        "I look." + call("read_file", "{}"), call("write_file", '{"text": "Hello"}', 1), "I corrected the greeting."
    )
    client = OpenAI(base_url=f"{live(engine).url}/v1", api_key="none", max_retries=0)
    items: list[Any] = [{"role": "user", "content": "Correct greeting.txt"}]
    previous = None
    for _ in range(5):
        asked: dict[str, Any] = {"model": "tiny-kimi", "input": items, "tools": tools, "store": chained}
        if chained and previous:
            asked["previous_response_id"] = previous
        if stream:
            with client.responses.stream(**asked) as streamed:
                for _event in streamed:
                    pass
                response = streamed.get_final_response()
        else:
            response = client.responses.create(**asked)
        previous = response.id
        calls = [item for item in response.output if item.type == "function_call"]
        results = []
        for each in calls:
            if each.name == "write_file":
                file.write_text(json.loads(each.arguments)["text"])
            results.append({"type": "function_call_output", "call_id": each.call_id, "output": file.read_text()})
        if not calls:
            break
        echoed = [item.to_dict() for item in response.output]
        items = results if chained else [*items, *echoed, *results]
    assert response.output_text == "I corrected the greeting."
    assert file.read_text() == "Hello"
    assert len(engine.requests) == 3


def test_the_openai_client_reads_errors_and_kept_responses(saying, live):
    client = OpenAI(base_url=f"{live(saying()).url}/v1", api_key="none", max_retries=0)
    response = client.responses.create(model="tiny-kimi", input="Hi")
    assert client.responses.retrieve(response.id).output_text == "Hello there, friend."
    client.responses.delete(response.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(NotFoundError):
        client.responses.create(model="other", input="Hi")
    with pytest.raises(BadRequestError, match="temperature"):
        client.responses.create(model="tiny-kimi", input="Hi", temperature=9)
