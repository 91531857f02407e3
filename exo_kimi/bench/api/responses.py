"""Checks of OpenAI's Responses API. They hold for a model that talks nonsense: only the form is checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from exo_kimi.bench.api.caller import Caller, Checks, broken, error_object, expect, expect_status
from exo_kimi.bench.api.events import Event, all_events, kinds, open_events, refused_body

checks = Checks("Responses")
PATH = "/v1/responses"
ROOM = 160
WORDS = "Name three colours of the sky."
PARAMETERS = {
    "type": "object",
    "properties": {"size": {"type": "string", "enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "name": name, "description": "A size.", "parameters": PARAMETERS, "strict": False}
    for name in ("get_size", "set_size")
]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["blue", "grey"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


def _body(api: Caller, **fields: Any) -> Event:
    base = {"model": api.model, "input": WORDS, "max_output_tokens": 12, "temperature": 0}
    return {key: value for key, value in {**base, **fields}.items() if value is not ...}


def _create(api: Caller, **fields: Any) -> Event:
    return api.post(PATH, _body(api, **fields))


def _stream(api: Caller, **fields: Any) -> list[Event]:
    return all_events(api, PATH, _body(api, **fields))


def _items(response: Event, kind: str) -> list[Event]:
    return [item for item in response["output"] if item["type"] == kind]


def _text(response: Event) -> str:
    return "".join(part["text"] for item in _items(response, "message") for part in item["content"])


def _calls(api: Caller, **fields: Any) -> list[Event]:
    response = _create(api, tools=TOOLS, max_output_tokens=ROOM, **fields)
    calls = _items(response, "function_call") or broken("no function_call item")
    for call in calls:
        expect(bool(call["call_id"]) and bool(call["id"]), f"call: {call}")
    return list(calls)


def _history(result: object, call_id: str = "call_abc") -> list[Event]:
    return [
        {"role": "user", "content": WORDS},
        {"type": "function_call", "call_id": call_id, "name": "get_size", "arguments": '{"size": "small"}'},
        {"type": "function_call_output", "call_id": call_id, "output": result},
    ]


@checks
def response_form(api: Caller) -> None:
    """id, object response, created_at, status, model, output and usage."""
    response = _create(api)
    missing = {"id", "object", "created_at", "status", "model", "output", "usage"} - response.keys()
    expect(not missing, f"it lacks {', '.join(sorted(missing))}")
    expect(response["object"] == "response" and response["id"].startswith("resp_"), f"id {response['id']!r}")
    expect(response["status"] in ("completed", "incomplete"), f"the status is {response['status']!r}")


@checks
def response_repeats_the_request(api: Caller) -> None:
    """instructions, tools, tool_choice, parallel_tool_calls, temperature, metadata and text come back in the response."""
    response = _create(api, instructions="Be brief.", tools=TOOLS, metadata={"a": "b"}, tool_choice="auto")
    expect(response["instructions"] == "Be brief." and response["metadata"] == {"a": "b"}, "not the request's")
    expect([tool["name"] for tool in response["tools"]] == ["get_size", "set_size"], "not the request's tools")
    expect(response["tool_choice"] == "auto" and response["parallel_tool_calls"] is True, "not the request's choice")
    expect(response["temperature"] == 0 and response["text"]["format"]["type"] == "text", "not the request's form")


@checks
def message_item_form(api: Caller) -> None:
    """A message item has id, status, role assistant, and output_text parts with annotations."""
    message = (_items(_create(api), "message") or broken("no message"))[0]
    expect(message["role"] == "assistant" and bool(message["id"]) and "status" in message, f"message: {message}")
    part = message["content"][0]
    expect(part["type"] == "output_text" and part["annotations"] == [], f"part: {part}")


@checks
def response_usage(api: Caller) -> None:
    """input_tokens, output_tokens and total_tokens that add up, with cached_tokens and reasoning_tokens."""
    usage = _create(api)["usage"]
    expect(usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], f"usage: {usage}")
    expect("cached_tokens" in usage["input_tokens_details"], "no cached_tokens")
    expect("reasoning_tokens" in usage["output_tokens_details"], "no reasoning_tokens")


@checks
def response_cut(api: Caller) -> None:
    """max_output_tokens used up: status incomplete, incomplete_details.reason max_output_tokens."""
    response = _create(api, max_output_tokens=3)
    expect(response["usage"]["output_tokens"] <= 3, f"{response['usage']['output_tokens']} tokens")
    if response["usage"]["output_tokens"] == 3:
        expect(response["status"] == "incomplete", f"the status is {response['status']!r}")
        expect(response["incomplete_details"] == {"reason": "max_output_tokens"}, f"{response['incomplete_details']}")


@checks
def response_greedy_repeats(api: Caller) -> None:
    """Greedy responses are equal."""
    expect(_text(_create(api)) == _text(_create(api)), "two greedy responses differ")


@checks
def response_is_the_chat_answer(api: Caller) -> None:
    """The text is that of chat completions for the same message."""
    chat = api.chat()["choices"][0]["message"]["content"]
    expect(_text(_create(api)) == chat, "the texts differ")


@checks
def input_as_a_message(api: Caller) -> None:
    """input as a text is a message of the user, also as {role, content} and as input_text parts."""
    plain = _text(_create(api))
    parts = [{"type": "input_text", "text": WORDS[:10]}, {"type": "input_text", "text": WORDS[10:]}]
    for items in ([{"role": "user", "content": WORDS}], [{"type": "message", "role": "user", "content": parts}]):
        expect(_text(_create(api, input=items)) == plain, "the text differs")


@checks
def instructions_are_a_system_message(api: Caller) -> None:
    """instructions are read as the first system message."""
    said = _text(_create(api, instructions="Answer in one word."))
    items = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": WORDS}]
    expect(_text(_create(api, input=items)) == said, "the texts differ")
    expect(said != _text(_create(api)), "instructions change nothing")


@checks
def developer_input(api: Caller) -> None:
    """The role developer is read like system."""
    one, other = (
        _text(_create(api, input=[{"role": role, "content": "In one word."}, {"role": "user", "content": WORDS}]))
        for role in ("developer", "system")
    )
    expect(one == other, "the texts differ")


@checks
def output_goes_back_as_input(api: Caller) -> None:
    """The output items of a response are taken as input of the next."""
    output = _create(api)["output"]
    asked = [{"role": "user", "content": WORDS}, *output, {"role": "user", "content": "And of the sea?"}]
    expect(_create(api, input=asked)["status"] in ("completed", "incomplete"), "no response")


@checks
def reasoning_items_are_taken(api: Caller) -> None:
    """Reasoning items with summary, content, or encrypted_content of another server are taken in input."""
    for fields in (
        {"summary": [{"type": "summary_text", "text": "Hm."}]},
        {"summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"summary": [], "encrypted_content": "gAAAAAB"},
    ):
        reasoning = {"type": "reasoning", "id": "rs_1", **fields}
        _create(api, input=[{"role": "user", "content": WORDS}, reasoning, {"role": "user", "content": "So?"}])


@checks
def call_and_output_are_read(api: Caller) -> None:
    """A function_call and its output are taken, and the output is read."""
    one, other = (_text(_create(api, input=_history(text), tools=TOOLS)) for text in ("12 cm", "a very big one"))
    expect(one != other, "two outputs give the same greedy text")


@checks
def call_output_as_parts(api: Caller) -> None:
    """A function_call_output may be a list of input_text parts."""
    parts = [{"type": "input_text", "text": "12 cm"}]
    one, other = (_text(_create(api, input=_history(output), tools=TOOLS)) for output in ("12 cm", parts))
    expect(one == other, "the texts differ")


@checks
def call_ids_do_not_matter(api: Caller) -> None:
    """The ids that a client gives to past calls do not change the response."""
    one, other = (
        _text(_create(api, input=_history("12 cm", call_id), tools=TOOLS)) for call_id in ("call_1", "toolu_zz9")
    )
    expect(one == other, "another id gives another text")


@checks
def custom_call_history(api: Caller) -> None:
    """custom_tool_call and custom_tool_call_output are taken."""
    items = [
        {"role": "user", "content": WORDS},
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "Done"},
    ]
    _create(api, input=items, tools=[{"type": "custom", "name": "patch", "description": "Edits."}])


@checks
def foreign_items_are_taken(api: Caller) -> None:
    """Items of tools that ran on other servers (web_search_call) do not fail a request."""
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    _create(api, input=[{"role": "user", "content": WORDS}, search, {"role": "user", "content": "So?"}])


@checks
def empty_input_probe(api: Caller) -> None:
    """An empty input with max_output_tokens 1, as agents probe a server, is answered."""
    _create(api, input=[], max_output_tokens=1)


@checks
def function_call_required(api: Caller) -> None:
    """tool_choice required: a function_call item with arguments of the schema."""
    for call in _calls(api, tool_choice="required"):
        expect(call["name"] in ("get_size", "set_size"), f"the function is {call['name']!r}")
        if call["status"] == "completed":
            expect(json.loads(call["arguments"])["size"] in ("small", "large"), f"arguments {call['arguments']}")


@checks
def function_call_named(api: Caller) -> None:
    """tool_choice {type: function, name}: that function is called."""
    calls = _calls(api, tool_choice={"type": "function", "name": "set_size"})
    expect({call["name"] for call in calls} == {"set_size"}, "another function")


@checks
def function_call_none(api: Caller) -> None:
    """tool_choice none: no call."""
    response = _create(api, tools=TOOLS, tool_choice="none")
    expect(not _items(response, "function_call"), "a function_call")


@checks
def allowed_tools(api: Caller) -> None:
    """tool_choice allowed_tools: one of those is called."""
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "set_size"}]}
    expect({call["name"] for call in _calls(api, tool_choice=allowed)} == {"set_size"}, "another function")


@checks
def one_function_call(api: Caller) -> None:
    """parallel_tool_calls false: exactly one call."""
    count = len(_calls(api, tool_choice="required", parallel_tool_calls=False))
    expect(count == 1, f"{count} calls")


@checks
def custom_tool_call(api: Caller) -> None:
    """A custom tool that must be called gives a custom_tool_call item with a text."""
    tools = [{"type": "custom", "name": "patch", "description": "Edits."}]
    choice = {"type": "custom", "name": "patch"}
    response = _create(api, tools=tools, tool_choice=choice, max_output_tokens=ROOM)
    item = (_items(response, "custom_tool_call") or broken("no custom_tool_call item"))[0]
    expect(item["name"] == "patch" and isinstance(item["input"], str), f"item: {item}")


@checks
def hosted_tools_do_not_fail(api: Caller) -> None:
    """Tools that only OpenAI runs (web_search, local_shell, image_generation) do not fail a request."""
    hosted = [{"type": name} for name in ("web_search", "local_shell", "image_generation")]
    _create(api, tools=[*hosted, *TOOLS])


@checks
def namespace_tools_do_not_fail(api: Caller) -> None:
    """Tools in a namespace, as Codex sends them, do not fail a request."""
    _create(api, tools=[{"type": "namespace", "name": "agents", "description": "More.", "tools": TOOLS}])


@checks
def text_format_schema(api: Caller) -> None:
    """text.format json_schema: the text obeys the schema."""
    form = {"type": "json_schema", "name": "sky", "strict": True, "schema": SCHEMA}
    text = _text(_create(api, text={"format": form}, max_output_tokens=ROOM))
    value = json.loads(text)
    expect(value.get("colour") in ("blue", "grey") and isinstance(value.get("sure"), bool), f"it is {value}")


@checks
def text_format_object(api: Caller) -> None:
    """text.format json_object: the text is a JSON object, or the begin of one when the tokens ran out."""
    response = _create(api, text={"format": {"type": "json_object"}}, max_output_tokens=ROOM)
    text = _text(response)
    expect(text.lstrip().startswith("{"), f"the text begins {text[:20]!r}")
    if response["status"] == "completed":
        expect(isinstance(json.loads(text), dict), "the text is no JSON object")


@checks
def events_of_a_message(api: Caller) -> None:
    """created, in_progress, output_item.added, content_part.added, output_text.delta, and their ends, in order."""
    found = [kind.removeprefix("response.") for kind in kinds(_stream(api)) if "reasoning" not in kind]
    begun, ended = (
        ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"],
        [
            "output_text.done",
            "content_part.done",
            "output_item.done",
        ],
    )
    expect(found[:-1] == [*begun, *ended] and found[-1] in ("completed", "incomplete"), f"events: {found}")


@checks
def events_are_numbered(api: Caller) -> None:
    """sequence_number counts the events from 0."""
    numbers = [event.get("sequence_number") for event in _stream(api)]
    expect(numbers == list(range(len(numbers))), f"numbers {numbers[:5]}")


@checks
def events_have_places(api: Caller) -> None:
    """Deltas have item_id, output_index and content_index, which are those of the item."""
    events = _stream(api)
    added = {event["output_index"]: event["item"]["id"] for event in events if event["type"].endswith("item.added")}
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    expect(bool(deltas), "no deltas")
    for delta in deltas:
        expect(added[delta["output_index"]] == delta["item_id"] and delta["content_index"] == 0, f"delta: {delta}")


@checks
def stream_is_the_response(api: Caller) -> None:
    """The deltas join to the text, and the last event has the whole response."""
    events = _stream(api)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    last = events[-1]["response"]
    expect(text == _text(last) == _text(_create(api)), "the texts differ")
    expect(bool(last["usage"]) and last["status"] in ("completed", "incomplete"), f"the last: {last['status']}")


@checks
def first_event_is_the_response_in_progress(api: Caller) -> None:
    """response.created has the id and the status in_progress before any text."""
    events = _stream(api)
    first, last = events[0]["response"], events[-1]["response"]
    expect((first["id"], first["status"]) == (last["id"], "in_progress"), f"the first: {first['status']}")


@checks
def events_of_a_function_call(api: Caller) -> None:
    """output_item.added with name and call_id and no arguments, argument deltas that join, arguments.done, item.done."""
    events = _stream(api, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_output_tokens=ROOM)
    own = [event for event in events if event["type"].startswith("response.function_call_arguments")]
    added = next(event["item"] for event in events if event["type"].endswith("item.added"))
    expect(bool(added["name"]) and bool(added["call_id"]) and added["arguments"] == "", f"added: {added}")
    done = next(event["item"] for event in events if event["type"].endswith("item.done"))
    joined = "".join(event["delta"] for event in own if event["type"].endswith("delta"))
    expect(joined == own[-1]["arguments"] == done["arguments"], "the deltas do not join to the arguments")
    expect(done["call_id"] == added["call_id"], "another call_id")


@checks
def response_logprobs(api: Caller) -> None:
    """include message.output_text.logprobs with top_logprobs: an entry for every token of the text."""
    response = _create(api, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=5)
    entries = _items(response, "message")[0]["content"][0]["logprobs"]
    data = bytes(byte for entry in entries for byte in entry["bytes"] or ())
    expect(data.decode("utf-8", "replace") == _text(response), "the bytes of the tokens are not the text")
    expect(all(len(entry["top_logprobs"]) == 2 for entry in entries), "not 2 alternatives")


@checks
def response_is_kept(api: Caller) -> None:
    """GET /v1/responses/{id} gives a response that was stored, which is the default."""
    response = _create(api)
    kept = api.http.get(f"{PATH}/{response['id']}")
    expect_status(kept.status_code, 200)
    expect(kept.json()["output"] == response["output"], "another output")


@checks
def response_is_not_kept(api: Caller) -> None:
    """store false: GET is a 404."""
    response = _create(api, store=False)
    expect_status(api.http.get(f"{PATH}/{response['id']}").status_code, 404)


@checks
def response_is_deleted(api: Caller) -> None:
    """DELETE answers deleted true; GET is a 404 then."""
    path = f"{PATH}/{_create(api)['id']}"
    deleted = api.http.delete(path)
    expect_status(deleted.status_code, 200)
    expect(deleted.json().get("deleted") is True, f"{deleted.text[:80]}")
    expect_status(api.http.get(path).status_code, 404)


@checks
def response_input_items(api: Caller) -> None:
    """GET /v1/responses/{id}/input_items lists the input."""
    listed = api.http.get(f"{PATH}/{_create(api)['id']}/input_items")
    expect_status(listed.status_code, 200)
    expect([item["type"] for item in listed.json()["data"]] == ["message"], f"{listed.text[:100]}")


@checks
def previous_response(api: Caller) -> None:
    """previous_response_id goes on with input and output of that response."""
    first = _create(api)
    said = _text(_create(api, input="And of the sea?", previous_response_id=first["id"]))
    asked = [{"role": "user", "content": WORDS}, *first["output"], {"role": "user", "content": "And of the sea?"}]
    expect(said == _text(_create(api, input=asked)), "not the text of the whole conversation")


@checks
def previous_response_unknown(api: Caller) -> None:
    """An unknown previous_response_id is a 400 that names the field."""
    refused = refused_body(api, PATH, _body(api, previous_response_id="resp_none"))
    expect(refused["error"]["param"] == "previous_response_id", f"{refused}")


@checks
def codex_fields(api: Caller) -> None:
    """What Codex sends beside is taken: include, reasoning, prompt_cache_key, client_metadata, store false."""
    fields = {
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "medium", "summary": "auto"},
        "prompt_cache_key": "k",
        "client_metadata": {"session_id": "s"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "text": {"verbosity": "low"},
    }
    _create(api, **fields)


@checks
def response_errors_have_openai_s_form(api: Caller) -> None:
    """A wrong type is a 400 whose error object names the field."""
    error = error_object(json.dumps(refused_body(api, PATH, _body(api, temperature="hot"))).encode())
    expect(error["param"] == "temperature", f"param is {error['param']!r}")


@checks
def response_of_an_unknown_model(api: Caller) -> None:
    """An unknown model is a 404."""
    refused_body(api, PATH, _body(api, model="no-such-model-anywhere"), 404)


@checks
def responses_at_once(api: Caller) -> None:
    """Requests at the same time get the responses that they get alone."""
    alone = _text(_create(api))
    with ThreadPoolExecutor(8) as pool:
        texts: Sequence[str] = list(pool.map(lambda _: _text(_create(api)), range(8)))
    expect(all(text == alone for text in texts), "a response differs from the one given alone")


@checks
def response_client_gone(api: Caller) -> None:
    """After a client leaves a long stream, the next request is answered."""
    with open_events(api, PATH, _body(api, max_output_tokens=4000)) as events:
        for _ in range(6):
            next(events)
    _create(api)
