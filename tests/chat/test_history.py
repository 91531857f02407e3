"""Ids of past calls: Kimi's in the prompt, whatever the client uses, and none of them given twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from exo_kimi.chat.events import ToolCallEvent
from exo_kimi.chat.history import CallHistory
from exo_kimi.chat.tool_calls import ToolCallParser

STYLES: dict[str, Callable[[int, str], str]] = {
    "Kimi's": lambda index, name: f"functions.{name}:{index}",
    "OpenAI's": lambda index, name: f"call_{index}abc",
    "Anthropic's": lambda index, name: f"toolu_{index}",
    "Kimi Code's": lambda index, name: f"functions_{name}_{index}",
    "one for all": lambda index, name: "0",
    "none": lambda index, name: "",
    "numbered per turn": lambda index, name: f"functions.{name}:{index % 2}",
}


def turn(*calls: tuple[str, str]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}} for id_, name in calls
        ],
    }


def result(id_: str, text: str = "", **more: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": text, **more}


def conversation(style: Callable[[int, str], str]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Hi"},
        turn((style(0, "look"), "look"), (style(1, "read"), "read")),
        result(style(0, "look"), "a"),
        result(style(1, "read"), "b"),
        turn((style(2, "look"), "look")),
        result(style(2, "look"), "c"),
    ]


def ids(messages: Sequence[Any]) -> tuple[list[str], list[str]]:
    calls = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    return calls, [message["tool_call_id"] for message in messages if message["role"] == "tool"]


@pytest.mark.parametrize("name", STYLES)
def test_every_style_of_id_reads_the_same_in_the_prompt(name: str) -> None:
    history = CallHistory.of(conversation(STYLES[name]))
    assert history.messages == CallHistory.of(conversation(STYLES["Kimi's"])).messages
    expected = ["functions.look:0", "functions.read:1", "functions.look:2"]
    assert ids(history.messages) == (expected, expected)
    assert history.next_index == 3


def test_the_clients_messages_are_not_changed() -> None:
    messages = conversation(STYLES["OpenAI's"])
    before = json.dumps(messages)
    CallHistory.of(messages)
    assert json.dumps(messages) == before


def test_results_in_another_order_and_late_ones_find_their_call() -> None:
    messages = [
        turn(("a", "look"), ("b", "read")),
        result("b"),
        result("a"),
        turn(("c", "look")),
        result("a"),
        result("c"),
    ]
    assert ids(CallHistory.of(messages).messages)[1] == [
        "functions.read:1",
        "functions.look:0",
        "functions.look:0",
        "functions.look:2",
    ]


def test_a_result_whose_call_was_trimmed_has_a_name_all_the_same() -> None:
    history = CallHistory.of([result("toolu_9", name="look"), result("toolu_8"), turn(("x", "look"))])
    assert ids(history.messages) == (["functions.look:2"], ["functions.look:0", "functions.tool:1"])


def test_an_id_that_the_history_holds_is_not_given_again() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    stream = "<|tool_call_begin|>functions.look:{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    # The client trimmed its history: the ids it still has are not those that the prompt shows.
    history = CallHistory.of(
        [turn(("functions.look:1", "look"), ("functions.look:3", "look")), result("functions.look:3")]
    )
    for written in (0, 1, 2, 3):
        parser = ToolCallParser(tools, history)
        items = [*parser.feed(stream.format(written) * 2), *parser.finish()]
        given = [item.id for item in items if isinstance(item, ToolCallEvent)]
        assert len(set(given)) == 2
        assert not set(given) & {"functions.look:0", "functions.look:1", "functions.look:3"}
