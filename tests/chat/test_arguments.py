"""Arguments while they come: nothing is taken back, slips are repaired, and what was cut stays cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.chat.arguments import ArgumentsReader

REPAIRED = {
    "a backslash that escapes nothing": (r'{"re": "\d+\.\w"}', {"re": r"\d+\.\w"}),
    "half an escape of hex": (r'{"p": "C:\users"}', {"p": r"C:\users"}),
    "an escaped apostrophe": (r'{"a": "it\'s"}', {"a": "it's"}),
    "raw line ends": ('{"a": "b\n\tc"}', {"a": "b\n\tc"}),
    "a brace too many": ('{"a": {"b": 1}}}', {"a": {"b": 1}}),
    "braces and brackets too many": ('{"a": [1]}]}\n', {"a": [1]}),
    "a comma too many": ('{"a": [1, 2, ], "b": 3,\n}', {"a": [1, 2], "b": 3}),
    "Python's literals": ('{"a": True, "b": [None, False]}', {"a": True, "b": [None, False]}),
    "a code fence": ('```json\n{"a": 1}\n```', {"a": 1}),
    "Python's quotes": ("{'a': 'b', 'c': 1}", {"a": "b", "c": 1}),
    "keys without quotes": ('{a: "x", b: 2}', {"a": "x", "b": 2}),
    "a comma missing": ('{"a": "x" "b": 2}', {"a": "x", "b": 2}),
    "quotes inside of a string": ('{"cmd": "echo "hi" there"}', {"cmd": 'echo "hi" there'}),
    "an object in a string": (json.dumps('{"a": 1}'), {"a": 1}),
    "nothing": ("", {}),
    "null": (" null ", {}),
}
RAW = {
    "half a file": '{"path": "a.py", "content": "def f():\\n    ret',
    "half a file with a brace in it": '{"path": "a.c", "content": "int main() { }',
    "no brace at the end": '{"a": 1',
    "no value": '{"query": }',
    "NaN": '{"n": NaN}',
    "a comment": '{"a": 1, /* why */ "b": 2}',
    "a list": "[1]",
    "text behind": '{"a": 1} and so on',
    "two objects": '{"a": 1}{"b": 2}',
    "a key twice, once without a value": '{"a": 1, "a": }',
    "a number that means two things": '{"a": 0123}',
    "words": "none of your business",
}


def read(text: str, size: int, *, delimited: bool = True) -> tuple[str, bool]:
    reader = ArgumentsReader()
    let = [reader.feed(text[at : at + size]) for at in range(0, len(text), size)]
    rest, complete = reader.finish(delimited=delimited)
    assert reader.arguments == "".join(let) + rest
    return reader.arguments, complete


@pytest.mark.parametrize("name", REPAIRED)
def test_a_slip_with_one_meaning_is_repaired(name: str) -> None:
    text, meant = REPAIRED[name]
    for size in (1, 2, 3, 5, 1000):
        arguments, complete = read(text, size)
        assert complete
        assert json.loads(arguments) == meant


@pytest.mark.parametrize("name", RAW)
def test_anything_else_is_handed_over_as_it_was_written(name: str) -> None:
    for size in (1, 2, 3, 5, 1000):
        assert read(RAW[name], size) == (RAW[name], False)


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def cuts(text: str) -> list[str]:
    return [text[:end] for end in range(len(text))]


@pytest.mark.parametrize("name", REPAIRED)
@pytest.mark.parametrize("delimited", [True, False])
def test_a_repair_never_completes_what_was_cut(name: str, delimited: bool) -> None:
    text, meant = REPAIRED[name]
    for cut in cuts(text):
        arguments, complete = read(cut, 1, delimited=delimited)
        if complete:  # the cut took nothing but what means nothing
            assert json.loads(arguments) in (meant, {}) and (json.loads(arguments) == meant or not cut.strip())
        else:
            assert not is_object(arguments)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-9, 9) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    value=st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    indent=st.sampled_from([None, 2]),
    size=st.integers(1, 7),
    ascii_only=st.booleans(),
)
def test_json_goes_through_as_it_is_and_early(value: Any, indent: int | None, size: int, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert read(text, size) == (text, True)
    reader, sent = ArgumentsReader(), ""
    for at, char in enumerate(text):
        sent += reader.feed(char)
        # Held back: a token that has not ended, or one that the next decides about.
        assert text.startswith(sent) and len(text[len(sent) : at + 1].strip()) <= 30


@settings(max_examples=200)
@given(text=st.text(alphabet="{}[]\",:\\ \n`'tuTNonrlea01-."))
def test_any_text_is_a_json_object_or_comes_back(text: str) -> None:
    for size in (1, 1000):
        arguments, complete = read("{" + text, size)
        if complete:
            assert isinstance(json.loads(arguments), dict)


def test_a_long_text_is_let_through_while_it_comes_in_linear_time() -> None:
    reader = ArgumentsReader()
    body = 'line "quoted" \\ and\n' * 20_000
    text = json.dumps({"content": body})
    sent = 0
    for at in range(0, len(text), 50):
        sent += len(reader.feed(text[at : at + 50]))
        assert sent >= at - 60
    assert reader.complete
