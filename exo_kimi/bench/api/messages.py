"""Checks of Anthropic's Messages API. They hold for a model that talks nonsense: only the form is checked."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from exo_kimi.bench.api.caller import Caller, Checks, broken, expect, expect_status
from exo_kimi.bench.api.events import Event, all_events, kinds, open_events, refused_body

checks = Checks("Messages")
PATH = "/v1/messages"
COUNT = f"{PATH}/count_tokens"
ROOM = 160
WORDS = "Name three colours of the sky."
ASKED = [{"role": "user", "content": WORDS}]
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "string", "enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
TOOLS = [{"name": name, "description": "A size.", "input_schema": SCHEMA} for name in ("get_size", "set_size")]
STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use")


def _body(api: Caller, **fields: Any) -> Event:
    base = {"model": api.model, "messages": ASKED, "max_tokens": 12, "temperature": 0}
    return {key: value for key, value in {**base, **fields}.items() if value is not ...}


def _create(api: Caller, **fields: Any) -> Event:
    return api.post(PATH, _body(api, **fields))


def _stream(api: Caller, **fields: Any) -> list[Event]:
    return [event for event in all_events(api, PATH, _body(api, **fields)) if event["type"] != "ping"]


def _blocks(message: Event, kind: str) -> list[Event]:
    return [block for block in message["content"] if block["type"] == kind]


def _text(message: Event) -> str:
    return "".join(block["text"] for block in _blocks(message, "text"))


def _calls(api: Caller, **fields: Any) -> list[Event]:
    message = _create(api, tools=TOOLS, max_tokens=ROOM, **fields)
    calls = _blocks(message, "tool_use") or broken("no tool_use block")
    expect(message["stop_reason"] in ("tool_use", "max_tokens"), f"stop_reason is {message['stop_reason']!r}")
    return list(calls)


def _history(result: object, call_id: str = "toolu_1", **fields: Any) -> list[Event]:
    call = {"type": "tool_use", "id": call_id, "name": "get_size", "input": {"size": "small"}}
    answered = {"type": "tool_result", "tool_use_id": call_id, "content": result, **fields}
    return [*ASKED, {"role": "assistant", "content": [call]}, {"role": "user", "content": [answered]}]


def _error(refused: Event) -> Event:
    expect(refused.get("type") == "error" and isinstance(refused.get("error"), dict), f"no error object: {refused}")
    error = dict(refused["error"])
    expect(bool(error.get("type")) and bool(error.get("message")), f"error: {error}")
    return error


def _count(api: Caller, **fields: Any) -> int:
    body = {"model": api.model, "messages": ASKED, **fields}
    return int(api.post(COUNT, body)["input_tokens"])


@checks
def message_form(api: Caller) -> None:
    """id, type message, role assistant, model, content, stop_reason, stop_sequence and usage."""
    message = _create(api)
    missing = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"} - message.keys()
    expect(not missing, f"it lacks {', '.join(sorted(missing))}")
    expect((message["type"], message["role"]) == ("message", "assistant"), f"type {message['type']!r}")
    expect(message["id"].startswith("msg_"), f"id {message['id']!r}")
    expect(message["stop_reason"] in STOP_REASONS, f"stop_reason is {message['stop_reason']!r}")


@checks
def message_content(api: Caller) -> None:
    """Text comes in text blocks."""
    message = _create(api)
    expect({block["type"] for block in message["content"]} <= {"text", "thinking"}, f"{message['content']}")
    expect(bool(_text(message)), "no text")


@checks
def message_usage(api: Caller) -> None:
    """usage has input_tokens, output_tokens and cache_read_input_tokens."""
    usage = _create(api)["usage"]
    expect(usage["output_tokens"] > 0 and usage["input_tokens"] >= 0, f"usage: {usage}")
    expect("cache_read_input_tokens" in usage, "no cache_read_input_tokens")


@checks
def message_usage_and_cache(api: Caller) -> None:
    """input_tokens are those that no cache held: with cache_read_input_tokens they are the counted prompt."""
    usage = _create(api)["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"] + (usage.get("cache_creation_input_tokens") or 0)
    expect(total == _count(api), f"{total} tokens for {_count(api)}")


@checks
def message_cut(api: Caller) -> None:
    """max_tokens used up: stop_reason max_tokens."""
    message = _create(api, max_tokens=3)
    used = message["usage"]["output_tokens"]
    expect(used <= 3, f"{used} tokens")
    expect(used < 3 or message["stop_reason"] == "max_tokens", f"stop_reason is {message['stop_reason']!r}")


@checks
def max_tokens_is_required(api: Caller) -> None:
    """A request without max_tokens is refused."""
    _error(refused_body(api, PATH, _body(api, max_tokens=...)))


@checks
def message_greedy_repeats(api: Caller) -> None:
    """Greedy messages are equal."""
    expect(_text(_create(api)) == _text(_create(api)), "two greedy messages differ")


@checks
def message_is_the_chat_answer(api: Caller) -> None:
    """The text is that of chat completions for the same message."""
    expect(_text(_create(api)) == api.chat()["choices"][0]["message"]["content"], "the texts differ")


@checks
def system_as_text_and_blocks(api: Caller) -> None:
    """system may be a text or text blocks with cache_control."""
    one = _text(_create(api, system="Answer in one word."))
    block = {"type": "text", "text": "Answer in one word.", "cache_control": {"type": "ephemeral"}}
    expect(_text(_create(api, system=[block])) == one, "the texts differ")
    expect(one != _text(_create(api)), "system changes nothing")


@checks
def content_as_blocks(api: Caller) -> None:
    """Content as a text block is the same as a text."""
    blocks = [{"type": "text", "text": WORDS, "cache_control": {"type": "ephemeral"}}]
    said = _text(_create(api, messages=[{"role": "user", "content": blocks}]))
    expect(said == _text(_create(api)), "the texts differ")


@checks
def message_goes_back(api: Caller) -> None:
    """The content of a message is taken as the assistant's turn."""
    content = _create(api)["content"]
    _create(
        api, messages=[*ASKED, {"role": "assistant", "content": content}, {"role": "user", "content": "And the sea?"}]
    )


@checks
def begun_reply(api: Caller) -> None:
    """A last turn of the assistant is gone on with, and not repeated."""
    plain = _text(_create(api, max_tokens=12))
    begin = plain[: len(plain) // 2]
    said = _text(_create(api, messages=[*ASKED, {"role": "assistant", "content": begin}]))
    expect(bool(said) and not said.startswith(begin), f"the text begins {said[:30]!r}")


@checks
def thinking_goes_back(api: Caller) -> None:
    """thinking and redacted_thinking blocks are taken in a history."""
    content = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "Blue."},
    ]
    _create(api, messages=[*ASKED, {"role": "assistant", "content": content}, {"role": "user", "content": "Why?"}])


@checks
def system_message_in_the_middle(api: Caller) -> None:
    """A message of the role system is taken, as Claude Code sends it."""
    _create(api, messages=[*ASKED, {"role": "system", "content": "A reminder."}])


@checks
def stop_sequence(api: Caller) -> None:
    """The text ends before a stop sequence; stop_reason stop_sequence, and stop_sequence says which."""
    text = _text(_create(api, max_tokens=16))
    usable = [letter for letter in text[len(text) // 2 :] if letter.isalnum()] or list(text[-1:])
    message = _create(api, max_tokens=16, stop_sequences=["never seen", usable[0]])
    expect(_text(message) == text[: text.index(usable[0])], "the text goes on, or is cut elsewhere")
    expect(message["stop_reason"] == "stop_sequence", f"stop_reason is {message['stop_reason']!r}")
    expect(message["stop_sequence"] == usable[0], f"stop_sequence is {message['stop_sequence']!r}")


@checks
def tool_choice_any(api: Caller) -> None:
    """tool_choice any: a tool_use block with input of the schema."""
    for call in _calls(api, tool_choice={"type": "any"}):
        expect(call["name"] in ("get_size", "set_size") and bool(call["id"]), f"call: {call}")
        expect(isinstance(call["input"], dict), f"input: {call['input']!r}")


@checks
def tool_choice_tool(api: Caller) -> None:
    """tool_choice tool: that tool is used."""
    calls = _calls(api, tool_choice={"type": "tool", "name": "set_size"})
    expect({call["name"] for call in calls} == {"set_size"}, "another tool")


@checks
def tool_choice_none_message(api: Caller) -> None:
    """tool_choice none: no tool_use block."""
    expect(not _blocks(_create(api, tools=TOOLS, tool_choice={"type": "none"}), "tool_use"), "a tool_use block")


@checks
def one_tool_use(api: Caller) -> None:
    """disable_parallel_tool_use: exactly one tool_use block."""
    count = len(_calls(api, tool_choice={"type": "any", "disable_parallel_tool_use": True}))
    expect(count == 1, f"{count} calls")


@checks
def tool_input_obeys_the_schema(api: Caller) -> None:
    """The input of a forced call obeys input_schema."""
    call = _calls(api, tool_choice={"type": "any", "disable_parallel_tool_use": True})[0]
    expect(call["input"].get("size") in ("small", "large"), f"input: {call['input']}")


@checks
def tool_choice_of_no_tool(api: Caller) -> None:
    """A choice that is not among the tools is refused."""
    choice = {"type": "tool", "name": "no_such_tool"}
    _error(refused_body(api, PATH, _body(api, tools=TOOLS, tool_choice=choice)))


@checks
def tool_result_is_read(api: Caller) -> None:
    """A tool_use and its tool_result are taken, and the result is read."""
    one, other = (_text(_create(api, messages=_history(text), tools=TOOLS)) for text in ("12 cm", "a very big one"))
    expect(one != other, "two results give the same greedy text")


@checks
def tool_result_as_blocks(api: Caller) -> None:
    """A tool_result may be text blocks."""
    blocks = [{"type": "text", "text": "12 cm"}]
    one, other = (_text(_create(api, messages=_history(content), tools=TOOLS)) for content in ("12 cm", blocks))
    expect(one == other, "the texts differ")


@checks
def tool_result_error(api: Caller) -> None:
    """is_error is shown to the model."""
    one, other = (
        _text(_create(api, messages=_history("12 cm", is_error=wrong), tools=TOOLS)) for wrong in (False, True)
    )
    expect(one != other, "is_error changes nothing")


@checks
def tool_result_without_content(api: Caller) -> None:
    """A tool_result without content is taken."""
    _create(api, messages=_history(None), tools=TOOLS)


@checks
def tool_use_ids_do_not_matter(api: Caller) -> None:
    """The ids of past calls do not change the message."""
    one, other = (
        _text(_create(api, messages=_history("12 cm", call_id), tools=TOOLS)) for call_id in ("toolu_1", "call_zz9")
    )
    expect(one == other, "another id gives another text")


@checks
def server_tools_do_not_fail(api: Caller) -> None:
    """Tools that only Anthropic runs do not fail a request."""
    _create(api, tools=[{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}, *TOOLS])


@checks
def thinking_fields(api: Caller) -> None:
    """thinking enabled with a budget, adaptive and disabled are taken."""
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}):
        _create(api, thinking=thinking, max_tokens=12)


@checks
def claude_code_fields(api: Caller) -> None:
    """What Claude Code sends beside is taken: metadata, context_management, output_config, betas, ?beta=true."""
    fields = {
        "metadata": {"user_id": "u"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "thinking": {"type": "adaptive"},
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
    response = api.http.post(f"{PATH}?beta=true", json=_body(api, **fields), headers=headers)
    expect_status(response.status_code, 200)


@checks
def output_format_schema(api: Caller) -> None:
    """output_config.format json_schema: the text obeys the schema."""
    form = {"type": "json_schema", "schema": SCHEMA}
    value = json.loads(_text(_create(api, output_config={"format": form}, max_tokens=ROOM)))
    expect(value.get("size") in ("small", "large"), f"it is {value}")


@checks
def events_of_a_text(api: Caller) -> None:
    """message_start, content_block_start, content_block_delta, content_block_stop, message_delta, message_stop."""
    found = kinds(_stream(api))
    expect(
        found
        == [
            *("message_start", "content_block_start", "content_block_delta"),
            *("content_block_stop", "message_delta", "message_stop"),
        ],
        f"events: {found}",
    )


@checks
def message_start_form(api: Caller) -> None:
    """message_start has the message without content, with input_tokens and stop_reason null."""
    message = _stream(api)[0]["message"]
    expect(message["content"] == [] and message["stop_reason"] is None, f"message: {message}")
    expect("input_tokens" in message["usage"], f"usage: {message['usage']}")


@checks
def streamed_text_is_the_message(api: Caller) -> None:
    """Text deltas join to the text of the same request without a stream."""
    deltas = [event["delta"] for event in _stream(api) if event["type"] == "content_block_delta"]
    joined = "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")
    expect(joined == _text(_create(api)), "the texts differ")


@checks
def streamed_blocks_have_indices(api: Caller) -> None:
    """Blocks begin and end in turn, with indices from 0."""
    events = [event for event in _stream(api) if event["type"].startswith("content_block_")]
    begun = [event["index"] for event in events if event["type"] == "content_block_start"]
    ended = [event["index"] for event in events if event["type"] == "content_block_stop"]
    expect(begun == ended == list(range(len(begun))), f"begun {begun}, ended {ended}")


@checks
def message_delta_form(api: Caller) -> None:
    """message_delta has stop_reason, stop_sequence and the output tokens."""
    delta = next(event for event in _stream(api) if event["type"] == "message_delta")
    expect(delta["delta"]["stop_reason"] in STOP_REASONS, f"delta: {delta}")
    expect("stop_sequence" in delta["delta"] and delta["usage"]["output_tokens"] > 0, f"delta: {delta}")


@checks
def streamed_tool_use(api: Caller) -> None:
    """A tool_use block begins with id, name and empty input; input_json_deltas join to its input."""
    choice = {"type": "any", "disable_parallel_tool_use": True}
    events = _stream(api, tools=TOOLS, tool_choice=choice, max_tokens=ROOM)
    begun = next(event["content_block"] for event in events if event["type"] == "content_block_start")
    expect(begun["type"] == "tool_use" and bool(begun["id"]) and begun["input"] == {}, f"block: {begun}")
    parts = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    expect(json.loads("".join(parts))["size"] in ("small", "large"), f"input: {''.join(parts)!r}")


@checks
def count_tokens(api: Caller) -> None:
    """count_tokens counts messages, system and tools."""
    plain = _count(api)
    expect(plain > 3, f"{plain} tokens")
    expect(_count(api, system="Answer in one word.") > plain, "system is not counted")
    expect(_count(api, tools=TOOLS) > plain, "tools are not counted")


@checks
def models_in_anthropic_s_shape(api: Caller) -> None:
    """GET /v1/models with anthropic-version: data with type model, display_name and created_at; has_more, first_id."""
    listed = api.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    missing = {"data", "has_more", "first_id", "last_id"} - listed.keys()
    expect(not missing, f"the list lacks {', '.join(sorted(missing))}")
    missing = {"type", "id", "display_name", "created_at"} - listed["data"][0].keys()
    expect(not missing, f"a model lacks {', '.join(sorted(missing))}")


@checks
def head_of_the_root(api: Caller) -> None:
    """HEAD / is a 200: Claude Code asks before its first request."""
    expect_status(api.http.head("/").status_code, 200)


@checks
def message_errors_have_anthropic_s_form(api: Caller) -> None:
    """A wrong type is a 400 with {type: error, error: {type: invalid_request_error, message}}."""
    error = _error(refused_body(api, PATH, _body(api, temperature="hot")))
    expect(error["type"] == "invalid_request_error", f"error: {error}")


@checks
def message_for_an_unknown_model(api: Caller) -> None:
    """An unknown model is a 404 of the type not_found_error."""
    error = _error(refused_body(api, PATH, _body(api, model="no-such-model-anywhere"), 404))
    expect(error["type"] == "not_found_error", f"error: {error}")


@checks
def messages_empty_list(api: Caller) -> None:
    """An empty list of messages is a 400."""
    _error(refused_body(api, PATH, _body(api, messages=[])))


@checks
def message_body_not_json(api: Caller) -> None:
    """A body that is no JSON is a 400 in Anthropic's form."""
    response = api.http.post(PATH, content=b"{", headers={"content-type": "application/json"})
    expect_status(response.status_code, 400)
    _error(response.json())


@checks
def message_request_id(api: Caller) -> None:
    """Answers have a request-id header."""
    response = api.http.post(PATH, json=_body(api))
    expect(bool(response.headers.get("request-id")), "no request-id header")


@checks
def messages_at_once(api: Caller) -> None:
    """Requests at the same time get the messages that they get alone."""
    alone = _text(_create(api))
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: _text(_create(api)), range(8)))
    expect(all(text == alone for text in texts), "a message differs from the one given alone")


@checks
def message_client_gone(api: Caller) -> None:
    """After a client leaves a long stream, the next request is answered."""
    with open_events(api, PATH, _body(api, max_tokens=4000)) as events:
        for _ in range(4):
            next(events)
    _create(api)
