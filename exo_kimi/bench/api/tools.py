"""Checks of tools and of constrained output. They hold for a model that talks nonsense: only the form is checked."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from exo_kimi.bench.api.caller import QUESTION, Caller, Checks, broken, content_of, expect

checks = Checks("tools and response formats")
ENDS = ("tool_calls", "length")  # a model that talks nonsense may make calls until the tokens are used up
ROOM = 160  # tokens: enough for the small forms below


def _tool(name: str, field: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {field: {"type": "string", "enum": ["small", "large"]}},
        "required": [field],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "A size.", "parameters": parameters}}


TOOLS = [_tool("get_size", "size"), _tool("set_size", "wanted")]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["blue", "grey"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


def _calls(answer: dict[str, Any], reasons: Collection[str] = ENDS) -> list[dict[str, Any]]:
    choice = answer["choices"][0]
    calls = choice["message"].get("tool_calls") or broken("no tool call")
    expect(choice["finish_reason"] in reasons, f"finish_reason is {choice['finish_reason']}")
    for call in calls:
        expect(call["type"] == "function" and bool(call["id"]), f"call: {call}")
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            expect(choice["finish_reason"] == "length" and call is calls[-1], f"arguments that are no JSON: {call}")
            continue  # the tokens ran out inside of it
        expect(set(arguments.values()) <= {"small", "large"}, f"arguments outside the schema: {arguments}")
    return list(calls)


@checks
def tool_choice_required(api: Caller) -> None:
    """The answer calls one of the tools, with arguments of its schema."""
    calls = _calls(api.chat(tools=TOOLS, tool_choice="required", max_tokens=ROOM))
    expect({call["function"]["name"] for call in calls} <= {"get_size", "set_size"}, "an unknown function")


@checks
def tool_choice_named(api: Caller) -> None:
    """The answer calls the named function."""
    choice = {"type": "function", "function": {"name": "set_size"}}
    # OpenAI's own server ends a forced call with stop.
    calls = _calls(api.chat(tools=TOOLS, tool_choice=choice, max_tokens=ROOM), reasons=(*ENDS, "stop"))
    expect({call["function"]["name"] for call in calls} == {"set_size"}, "another function")


@checks
def tool_choice_none(api: Caller) -> None:
    """The answer calls nothing."""
    message = api.chat(tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    expect(not message.get("tool_calls"), "a tool call")


@checks
def tool_choice_unknown_function(api: Caller) -> None:
    """A choice that is not among the tools is refused."""
    choice = {"type": "function", "function": {"name": "no_such_function"}}
    api.refused(400, {"tools": TOOLS, "tool_choice": choice})


@checks
def one_tool_call(api: Caller) -> None:
    """parallel_tool_calls false: exactly one call."""
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": ROOM}
    count = len(_calls(api.chat(**fields)))
    expect(count == 1, f"{count} calls")


@checks
def streamed_tool_call(api: Caller) -> None:
    """Deltas of a tool call have its index, id, type and name, and the arguments join to JSON."""
    chunks = api.stream(tools=TOOLS, tool_choice="required", max_tokens=ROOM)
    deltas = [
        call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls") or []
    ]
    first = [delta for delta in deltas if delta["index"] == 0]
    expect(bool(first), "no tool call")
    expect(first[0].get("type") == "function" and bool(first[0].get("id")), f"the first delta is {first[0]}")
    expect(first[0]["function"]["name"] in ("get_size", "set_size"), "an unknown function")
    json.loads("".join(delta["function"].get("arguments") or "" for delta in first))
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    expect(len(reasons) == 1 and reasons[0] in ENDS, f"finish reasons: {reasons}")


@checks
def tool_result(api: Caller) -> None:
    """A conversation with a tool call (content null) and its result is accepted, and the result is read."""

    def conversation(result: str) -> list[dict[str, Any]]:
        function = {"name": "get_size", "arguments": '{"size": "small"}'}
        call = {"id": "functions.get_size:0", "type": "function", "function": function}
        return [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "functions.get_size:0", "content": result},
        ]

    one, other = (
        content_of(api.chat(messages=conversation(text), tools=TOOLS)) for text in ("12 cm", "a very big one")
    )
    expect(one != other, "two results give the same greedy answer")


@checks
def tool_message_without_call_id(api: Caller) -> None:
    """tool_call_id is required in a tool message."""
    api.refused(400, {"messages": [*QUESTION, {"role": "tool", "content": "12 cm"}]})


@checks
def json_object(api: Caller) -> None:
    """response_format json_object: the text is a JSON object, or the begin of one when the tokens ran out."""
    answer = api.chat(response_format={"type": "json_object"}, max_tokens=ROOM)
    text = content_of(answer)
    if answer["choices"][0]["finish_reason"] == "length":
        expect(text.lstrip().startswith("{"), f"the text begins {text[:20]!r}")
    else:
        expect(isinstance(json.loads(text), dict), "the text is no JSON object")


@checks
def json_schema(api: Caller) -> None:
    """response_format json_schema with strict: the text obeys the schema."""
    form = {"type": "json_schema", "json_schema": {"name": "sky", "strict": True, "schema": SCHEMA}}
    text = content_of(api.chat(response_format=form, max_tokens=ROOM))
    try:
        value = json.loads(text)
    except ValueError:
        broken(f"the text is no JSON: {text[:60]!r}")
    expect(value.get("colour") in ("blue", "grey") and isinstance(value.get("sure"), bool), f"it is {value}")


@checks
def json_schema_without_schema(api: Caller) -> None:
    """json_schema without the schema's name and body is refused."""
    api.refused(400, {"response_format": {"type": "json_schema"}})
