"""Twelve tool calls seen in the wild, and everything around them, cut at every character."""

from __future__ import annotations

import itertools
import json
import re
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
        [("functions.search:0", "search", BROKEN), ("functions.get_weather:1", "get_weather", WEATHER)],
    ),
    "10 a second call begun before the first ended": Case(
        f"{BEGIN}{CALL}functions.get_weather:0{ARGS}{WEATHER}{call('functions.search:1', QUERY)}{END}",
        [PARIS, ("functions.search:1", "search", QUERY)],
    ),
    "11 cut off by the token limit": Case(
        f'{BEGIN}{call("functions.get_weather:0")}{CALL}functions.search:1{ARGS}{{"query": "how to',
        [PARIS, ("functions.search:1", "search", '{"query": "how to')],
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
        [PARIS, ("functions.search:1", "search", "[1]")],
        "!",
    ),
    "an open string beside a good call": Case(
        f"{BEGIN}{BAD}{call('functions.get_weather:1')}{END}",
        [("functions.search:0", "search", '{"query": "open'), ("functions.get_weather:1", "get_weather", WEATHER)],
    ),
    "markers inside an argument": Case(
        f"{BEGIN}{call('functions.search:0', ABOUT_MARKERS)}{END}", [("functions.search:0", "search", ABOUT_MARKERS)]
    ),
    "only malformed": Case(f"a{BEGIN}{BAD}{END}b", [("functions.search:0", "search", '{"query": "open')], "ab"),
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
        " and",
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
        f"{BEGIN}{call('functions.unknown:0', '{}')}{END}", [("functions.unknown:0", "unknown", "{}")]
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
    "NaN is not JSON": Case(f"{BEGIN}{call('functions.search:0', NAN)}{END}", [("functions.search:0", "search", NAN)]),
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
def test_arguments_are_a_json_object_or_what_the_model_wrote(name: str) -> None:
    stream = (WILD | MORE)[name].stream
    calls, _ = read((WILD | MORE)[name], [stream])
    for _, _, arguments in calls:
        try:
            assert isinstance(json.loads(arguments), dict) or arguments == "[1]"
        except ValueError:
            assert arguments in stream


def near(header: str, arguments: str = WEATHER, tools: Any = None, *, marker: str = ARGS) -> Case:
    return Case(f"{BEGIN}{CALL}{header}{marker}{arguments}{DONE}{END}", tools=tools or TOOLS)


WRAPPED = json.dumps({"name": "get_weather", "arguments": {"city": "Paris"}})
WRAPPED_TEXT = json.dumps({"name": "functions.get_weather", "arguments": WEATHER})
DOTTED = [tool("functions.get_weather", "city"), tool("search", "query")]
UUID = "3f2b8c1e-9d4a-4b6f-8e21-0c5d7a9b1f34"
NEAR_MISSES = {
    "a slash": near("functions/get_weather:0"),
    "an underscore": near("functions_get_weather:0"),
    "underscores all over": near("functions_get_weather_0"),
    "another case": near("functions.Get_Weather:0"),
    "camel case": near("functions.getWeather:0"),
    "a dash": near("get-weather:0"),
    "the singular": near("function.get_weather:0"),
    "quotes": near('"functions.get_weather:0"'),
    "a leading zero": near("functions.get_weather:00"),
    "a letter missing": near("functions.get_wether:0"),
    "a UUID behind the prefix": near(f"functions.{UUID}:0"),
    "an id of OpenAI": near("call_x1"),
    "an id of Anthropic and one tool": near("toolu_01", tools=TOOLS[:1]),
    "a fence": near("functions.get_weather:0", f"```json\n{WEATHER}\n```"),
    "no marker": near("functions.get_weather:0", marker=""),
    "no marker and a line end": near("functions.get_weather:0\n", marker=""),
    "no marker and a fence": near("functions.get_weather:0\n```json\n", f"{WEATHER}\n```", marker=""),
    "name and arguments under an id": near("call_1", WRAPPED),
    "name and arguments as text": near("call_1", WRAPPED_TEXT),
    "name and arguments under an id without a marker": near("call_1", WRAPPED, marker=""),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_a_call_of_the_tool_that_it_means(name: str) -> None:
    case = NEAR_MISSES[name]
    for pieces in ([case.stream], list(case.stream)):
        assert read(case, pieces) == ([PARIS], "")


def test_a_declared_name_that_begins_with_the_prefix_is_that_name() -> None:
    for header in ("functions.functions.get_weather:0", "functions.get_weather:0", "get_weather:0"):
        calls, text = read(near(header, tools=DOTTED), [near(header).stream])
        assert (calls, text) == ([("functions.functions.get_weather:0", "functions.get_weather", WEATHER)], "")


def test_a_name_that_fits_nothing_declared_is_for_the_agent_to_refuse() -> None:
    calls, _ = read(near("functions.launch_rocket:0", '{"when": "now"}'), [near("functions.launch_rocket:0").stream])
    assert calls == [("functions.get_weather:0", "get_weather", WEATHER)]
    case = near("functions.launch_rocket:0", '{"when": "now"}')
    assert read(case, [case.stream])[0] == [("functions.launch_rocket:0", "launch_rocket", '{"when": "now"}')]


def test_an_id_that_fits_two_tools_is_not_guessed() -> None:
    two = [tool("read", "path"), tool("delete", "path")]
    case = near(f"functions.{UUID}:0", PATH, two)
    assert read(case, [case.stream]) == ([], case.stream)


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


def deltas(items: list[Any]) -> list[str]:
    return [item.arguments for item in items if isinstance(item, ToolCallDelta)]


def test_a_call_is_announced_before_its_arguments_and_they_are_sent_as_they_come() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.feed(f"{BEGIN}{CALL}functions.search:0{ARGS}") == []
    assert parser.feed("{") == [ToolCallBegin(0, "functions.search:0", "search"), ToolCallDelta(0, "{")]
    sent = "{"
    body = json.dumps({"query": "how to write a long file " * 400})[1:]
    for at in range(0, len(body), 4):
        sent += "".join(deltas(parser.feed(body[at : at + 4])))
        assert len(sent) >= at - 4
    assert parser.feed(DONE) == [ToolCallEvent(0, "functions.search:0", "search", "{" + body)]


@settings(max_examples=200)
@given(parts=st.lists(fragments, max_size=14), size=st.integers(1, 9))
def test_what_is_sent_is_never_taken_back(parts: list[str], size: int) -> None:
    stream = "".join(parts)
    parser = ToolCallParser(TOOLS)
    items = [item for at in range(0, len(stream), size) for item in parser.feed(stream[at : at + size])]
    items += parser.finish()
    open_call: ToolCallBegin | None = None
    sent = ""
    for item in items:
        match item:
            case ToolCallBegin():
                assert open_call is None
                open_call, sent = item, ""
            case ToolCallDelta():
                assert open_call is not None and item.index == open_call.index and item.arguments
                sent += item.arguments
            case ToolCallEvent():
                assert open_call is not None
                assert (item.index, item.id, item.name) == (open_call.index, open_call.id, open_call.name)
                assert item.arguments == sent
                open_call = None
    assert open_call is None


@pytest.mark.parametrize("between", ["", " ", "\n", "\n\n \t"])
def test_white_space_around_calls_is_no_text(between: str) -> None:
    one, two = call("functions.get_weather:0"), call("functions.search:1", QUERY)
    stream = f"{between}{BEGIN}{between}{one}{between}{two}{between}{END}{between}"
    for pieces in ([stream], list(stream)):
        assert read(Case(stream), pieces) == ([PARIS, ("functions.search:1", "search", QUERY)], "")
    stream = f"Sure.{between}{one}{between}"
    assert read(Case(stream), list(stream)) == ([PARIS], "Sure.")


@pytest.mark.parametrize("tools", [TOOLS[:1], TOOLS])
def test_a_forced_call_that_is_cut_is_a_call_without_markup(tools: list[dict[str, Any]]) -> None:
    stream = f"{BEGIN}{call('functions.get_weather:0')}"
    for end in range(1, len(stream) + 1):
        parser = ToolCallParser(tools, spelled=(), forced=True)
        items: list[Any] = []
        # A control token is there or not, never half of it.
        for part in re.split(r"(<\|.*?\|>)", re.sub("<[^>]*$", "", stream[:end])):
            items += parser.feed_marker(part) if part.endswith("|>") else parser.feed(part)
        items += parser.finish()
        assert not any(isinstance(item, str) for item in items), end
        calls = [item for item in items if isinstance(item, ToolCallEvent)]
        assert len(calls) <= 1
        assert calls or (ARGS not in stream[:end] and (len(tools) > 1 or CALL not in stream[:end]))
        for one in calls:
            assert one.name == "get_weather" and WEATHER.startswith(one.arguments)


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
    assert len(parser.feed(f"{BEGIN}{CALL}functions.get_weather:0{ARGS}{WEATHER}")) == 2
    assert parser.feed(DONE)[-1] == ToolCallEvent(0, *PARIS)


def test_plain_text_is_not_held_back() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.feed("hello <") == ["hello"]
    assert parser.feed("b") == [" <b"]
    assert parser.feed(" ") == []
    assert parser.finish() == [" "]


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
