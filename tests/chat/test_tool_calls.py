"""Twelve tool calls seen in the wild, and everything around them, cut at every character."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.chat.events import ToolCallBegin, ToolCallDelta, ToolCallEvent
from exo_kimi.chat.history import CallHistory
from exo_kimi.chat.tool_calls import ToolCallParser

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, DONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
WEATHER = '{"city": "Paris"}'
QUERY = '{"query": "x"}'
GOOD = '{"query": "good"}'
PATH = '{"path": "/"}'
BROKEN = '{"query": }'
RAW_LINE = '{"query": "a\nb"}'
AS_STRING = json.dumps(QUERY)
NAN = '{"n": NaN}'
ESCAPES = r'{"query": "\\"}'


def tool(name: str, *required: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in (*required, *optional)}
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("get_weather", "city", optional=("unit",)), tool("search", "query"), tool("mcp:files:read", "path")]


def call(header: str, arguments: str = WEATHER) -> str:
    return f"{CALL}{header}{ARGS}{arguments}{DONE}"


@dataclass(frozen=True)
class Case:
    """A stream, the calls in it as (id, name, arguments), and the text that is left."""

    stream: str
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""
    tools: list[dict[str, Any]] = field(default_factory=lambda: TOOLS)
    next_index: int = 0


PARIS = ("functions.get_weather:0", "get_weather", WEATHER)
WILD = {
    "1 one good call": Case(f"Sure.{BEGIN}{call('functions.get_weather:0')}{END}", [PARIS], "Sure."),
    "2 several": Case(
        f"{BEGIN}{call('functions.get_weather:0')}{call('functions.search:1', QUERY)}{END}",
        [PARIS, ("functions.search:1", "search", QUERY)],
    ),
    "3 no section end": Case(f"Sure.{BEGIN}{call('functions.get_weather:0')}", [PARIS], "Sure."),
    "4 singular section": Case(
        f"<|tool_call_section_begin|>{call('functions.get_weather:0')}<|tool_call_section_end|>Done.", [PARIS], "Done."
    ),
    "5 no prefix": Case(f"{BEGIN}{call('get_weather:0')}{END}", [PARIS]),
    "6 colons inside the name": Case(
        f"{BEGIN}{call('functions.mcp:files:read:3', PATH)}{END}",
        [("functions.mcp:files:read:3", "mcp:files:read", PATH)],
    ),
    "7 a UUID for an id": Case(
        f"{BEGIN}{call('3f2b8c1e-9d4a-4b6f-8e21-0c5d7a9b1f34')}{END}",
        [("functions.get_weather:4", "get_weather", WEATHER)],
        next_index=4,
    ),
    "8 empty arguments": Case(
        f"{BEGIN}{call('functions.list_files:0', '')}{END}", [("functions.list_files:0", "list_files", "{}")]
    ),
    "9 a malformed call beside a good one": Case(
        f"{BEGIN}{call('functions.search:0', BROKEN)}{call('functions.get_weather:1')}{END}",
        [("functions.get_weather:1", "get_weather", WEATHER)],
        f"{BEGIN}{call('functions.search:0', BROKEN)}{END}",
    ),
    "10 a second call begun before the first ended": Case(
        f"{BEGIN}{CALL}functions.get_weather:0{ARGS}{WEATHER}{call('functions.search:1', QUERY)}{END}",
        [PARIS, ("functions.search:1", "search", QUERY)],
    ),
    "11 cut off by the token limit": Case(
        f'{BEGIN}{call("functions.get_weather:0")}{CALL}functions.search:1{ARGS}{{"query": "how to',
        [PARIS],
        f'{CALL}functions.search:1{ARGS}{{"query": "how to',
    ),
    "12 a section inside reasoning": Case(
        f"I should look it up.{BEGIN}{call('functions.get_weather:0')}{END}", [PARIS], "I should look it up."
    ),
}
BAD = call("functions.search:0", '{"query": "open')
ABOUT_MARKERS = json.dumps({"query": f"{DONE}{END} {call('functions.x:0')} <|tool_"})
MORE = {
    "good before malformed": Case(
        f"{BEGIN}{call('functions.get_weather:0')}{call('functions.search:1', '[1]')}{END}!",
        [PARIS],
        f"{call('functions.search:1', '[1]')}!",
    ),
    "an open string beside a good call": Case(
        f"{BEGIN}{BAD}{call('functions.get_weather:1')}{END}",
        [("functions.get_weather:1", "get_weather", WEATHER)],
        f"{BEGIN}{BAD}{END}",
    ),
    "markers inside an argument": Case(
        f"{BEGIN}{call('functions.search:0', ABOUT_MARKERS)}{END}", [("functions.search:0", "search", ABOUT_MARKERS)]
    ),
    "only malformed": Case(f"a{BEGIN}{BAD}{END}b", [], f"a{BEGIN}{BAD}{END}b"),
    "empty section": Case(f"{BEGIN} {END}", [], f"{BEGIN} {END}"),
    "text in a section": Case(f"{BEGIN}\nhello{END}", [], f"{BEGIN}\nhello{END}"),
    "a section that never gets anywhere": Case(f"{BEGIN}  ", [], f"{BEGIN}  "),
    "call outside of a section": Case(f"{call('functions.get_weather:0')} then text", [PARIS], " then text"),
    "stray markers": Case(f"{END}{ARGS}x{DONE}", [], f"{END}{ARGS}x{DONE}"),
    "blanks between calls": Case(
        f"{BEGIN}\n{call('functions.get_weather:0')}\n{call('functions.search:1', ' {} ')}\n{END}\n\nText",
        [PARIS, ("functions.search:1", "search", "{}")],
        "\n\nText",
    ),
    "text after a section": Case(f"{BEGIN}{call('functions.get_weather:0')}{END}So.", [PARIS], "So."),
    "two sections": Case(
        f"{BEGIN}{call('functions.get_weather:0')}{END} and {BEGIN}{call('functions.search:1', '{}')}{END}",
        [PARIS, ("functions.search:1", "search", "{}")],
        " and ",
    ),
    "a section inside a section": Case(f"{BEGIN}{BEGIN}{call('functions.get_weather:0')}{END}", [PARIS], BEGIN),
    "section end instead of call end": Case(f"{BEGIN}{CALL}functions.get_weather:0{ARGS}{WEATHER}{END}", [PARIS]),
    "complete but for every end": Case(f"{BEGIN}{CALL}functions.get_weather:0{ARGS}{WEATHER}", [PARIS]),
    "cut before the arguments": Case(
        f"{BEGIN}{CALL}functions.get_weather:0{ARGS}", [], f"{BEGIN}{CALL}functions.get_weather:0{ARGS}"
    ),
    "cut in the header": Case(f"{BEGIN}{CALL}functions.get_w", [], f"{BEGIN}{CALL}functions.get_w"),
    "no argument marker": Case(
        f"{BEGIN}{CALL}functions.search:0{DONE}{call('functions.get_weather:1')}{END}",
        [("functions.get_weather:1", "get_weather", WEATHER)],
        f"{BEGIN}{CALL}functions.search:0{DONE}{END}",
    ),
    "an endless header": Case(f"{BEGIN}{CALL}{'x' * 2000}", [], f"{BEGIN}{CALL}{'x' * 2000}"),
    "blanks around the header": Case(f"{BEGIN}{call(' functions.get_weather:0 ')}{END}", [PARIS]),
    "a name without an index": Case(f"{BEGIN}{call('functions.get_weather')}{END}", [PARIS]),
    "a declared name with a UUID": Case(f"{BEGIN}{call('functions.get_weather:call_9f8e')}{END}", [PARIS]),
    "a name that nobody declared": Case(
        f"{BEGIN}{call('functions.unknown:0')}{END}", [("functions.unknown:0", "unknown", WEATHER)]
    ),
    "a UUID that two tools fit": Case(
        f"{BEGIN}{call('call_123')}{END}", [], f"{BEGIN}{call('call_123')}{END}", tools=[TOOLS[0], tool("b", "city")]
    ),
    "a UUID and one tool": Case(f"{BEGIN}{call('call_123', '{}')}{END}", [(*PARIS[:2], "{}")], tools=TOOLS[:1]),
    "a UUID and unknown tools": Case(
        f"{BEGIN}{call('call_123')}{END}", [], f"{BEGIN}{call('call_123')}{END}", tools=[]
    ),
    "unknown tools": Case(f"{BEGIN}{call('get_weather:0')}{END}", [PARIS], tools=[]),
    "an index twice": Case(
        f"{BEGIN}{call('functions.get_weather:0')}{call('functions.get_weather:0')}{END}",
        [PARIS, ("functions.get_weather:1", "get_weather", WEATHER)],
    ),
    "raw line ends in a string": Case(
        f"{BEGIN}{call('functions.search:0', RAW_LINE)}{END}",
        [("functions.search:0", "search", '{"query": "a\\nb"}')],
    ),
    "arguments as a JSON string": Case(
        f"{BEGIN}{call('functions.search:0', AS_STRING)}{END}",
        [("functions.search:0", "search", QUERY)],
    ),
    "NaN is not JSON": Case(
        f"{BEGIN}{call('functions.search:0', NAN)}{END}", [], f"{BEGIN}{call('functions.search:0', NAN)}{END}"
    ),
    "escapes before a marker": Case(
        f"{BEGIN}{call('functions.search:0', ESCAPES)}{END}",
        [("functions.search:0", "search", ESCAPES)],
    ),
    "nothing to see": Case("a < b <| c <|tool_calls> d <", [], "a < b <| c <|tool_calls> d <"),
}


def read(case: Case, pieces: list[str]) -> tuple[list[tuple[str, str, str]], str]:
    parser = ToolCallParser(case.tools, CallHistory(messages=(), next_index=case.next_index))
    items = [item for piece in pieces for item in parser.feed(piece)] + parser.finish()
    calls = [item for item in items if isinstance(item, ToolCallEvent)]
    assert [one.index for one in calls] == list(range(len(calls)))
    for one in calls:
        begun = [item for item in items if isinstance(item, ToolCallBegin) and item.index == one.index]
        assert begun == [ToolCallBegin(one.index, one.id, one.name)]
        deltas = [item for item in items if isinstance(item, ToolCallDelta) and item.index == one.index]
        assert "".join(item.arguments for item in deltas) == one.arguments
    return [(one.id, one.name, one.arguments) for one in calls], "".join(
        item for item in items if isinstance(item, str)
    )


@pytest.mark.parametrize("name", [*WILD, *MORE])
def test_every_call_is_found_wherever_the_stream_is_cut(name: str) -> None:
    case = (WILD | MORE)[name]
    stream, expected = case.stream, (case.calls, case.text)
    assert read(case, [stream]) == expected
    assert read(case, list(stream)) == expected
    for cut in range(1, len(stream)):
        assert read(case, [stream[:cut], stream[cut:]]) == expected, cut


@pytest.mark.parametrize("name", [*WILD, *MORE])
def test_arguments_are_always_a_json_object(name: str) -> None:
    calls, _ = read((WILD | MORE)[name], [(WILD | MORE)[name].stream])
    assert all(isinstance(json.loads(arguments), dict) for _, _, arguments in calls)


fragments = st.sampled_from(
    [
        BEGIN,
        END,
        CALL,
        ARGS,
        DONE,
        "functions.get_weather:0",
        WEATHER,
        '{"query": "',
        '"}',
        "\\",
        " ",
        "text",
        "{}",
        "<|tool",
    ]
)


@settings(max_examples=300)
@given(parts=st.lists(fragments, max_size=14), data=st.data())
def test_any_stream_reads_the_same_in_any_pieces(parts: list[str], data: st.DataObject) -> None:
    case = Case("".join(parts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(case.stream)), max_size=8)))
    bounds = [0, *cuts, len(case.stream)]
    pieces = [case.stream[start:end] for start, end in itertools.pairwise(bounds)]
    assert read(case, pieces) == read(case, [case.stream])


@settings(max_examples=300)
@given(parts=st.lists(fragments, max_size=14))
def test_whatever_holds_no_call_comes_back_unchanged(parts: list[str]) -> None:
    case = Case("".join(parts))
    calls, text = read(case, [case.stream])
    if not calls:
        assert text == case.stream


@settings(max_examples=200)
@given(before=st.lists(fragments, max_size=8))
def test_a_good_section_is_never_lost_behind_anything_but_an_open_string(before: list[str]) -> None:
    prefix = "".join(part for part in before if '"' not in part)
    good = f"{BEGIN}{call('functions.search:7', GOOD)}{END}"
    calls, _ = read(Case(prefix + good), [prefix + good])
    assert ("functions.search:7", "search", GOOD) in calls


def test_a_call_is_emitted_as_soon_as_it_ends() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.feed(f"{BEGIN}{CALL}functions.get_weather:0{ARGS}{WEATHER}") == []
    assert parser.feed(DONE)[-1] == ToolCallEvent(0, *PARIS)


def test_plain_text_is_not_held_back() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.feed("hello <") == ["hello "]
    assert parser.feed("b") == ["<b"]


@pytest.mark.parametrize(
    "stream",
    [
        f'{BEGIN}{CALL}f:0{ARGS}{{"a": "' + "x" * 400_000,
        f'{BEGIN}{CALL}f:0{ARGS}{{"a": "' + f"{CALL}{ARGS}" * 5_000,
        f'{CALL}f:0{ARGS}{{"a": "' * 5_000,
        "<|tool_call" * 20_000,
        f"{BEGIN}{CALL}f:0{ARGS}" + "[" * 100_000 + DONE,
    ],
    ids=["long string", "many markers", "many open calls", "many half markers", "deep nesting"],
)
def test_hostile_streams_are_read_in_reasonable_time(stream: str) -> None:
    parser = ToolCallParser(TOOLS)
    began = time.monotonic()
    items = [item for start in range(0, len(stream), 50) for item in parser.feed(stream[start : start + 50])]
    items += parser.finish()
    assert time.monotonic() - began < 20
    assert "".join(item for item in items if isinstance(item, str)) == stream
