"""A constrained reply is valid whatever the model prefers: random walks over the masks, checked by parsing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from exo_kimi.chat import constraint
from exo_kimi.chat.constraint import grammar_tokenizer
from exo_kimi.chat.events import ContentDelta, ReasoningDelta, ToolCallEvent
from exo_kimi.chat.output import OutputParser
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.errors import ChatError, RequestError, UnsupportedError

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 5}},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def allowed(mask: bytes | None, size: int) -> list[int]:
    assert mask is not None
    assert len(mask) == -(-size // 32) * 4
    return [int(i) for i in np.nonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))[0]]


def walk(
    tokenizer: KimiTokenizer, subject: Any, seed: int, *, prefer: Sequence[int] = (), size: int | None = None
) -> list[int]:
    """A reply of uniformly random allowed tokens, without the final stop token."""
    rng = random.Random(seed)
    ids: list[int] = []
    for step in range(3_000):
        choices = allowed(subject.mask(), size or tokenizer.vocab_size)
        assert choices and max(choices) < tokenizer.vocab_size
        wanted = [token_id for token_id in prefer if token_id in choices]
        token_id = rng.choice(wanted if wanted and step > 20 else choices)
        subject.accept(token_id)
        if token_id in tokenizer.stop_ids:
            return ids
        ids.append(token_id)
    raise AssertionError(f"the reply never ended: {tokenizer.decode(ids)[:200]}")


def parse(tokenizer: KimiTokenizer, ids: list[int], *, reasoning_open: bool = False, tools: Any = False) -> list[Any]:
    parser = OutputParser(tokenizer, reasoning_open=reasoning_open, tools=tools)
    return [event for token_id in ids for event in parser.feed(token_id)] + parser.finish()


def calls_of(events: list[Any]) -> list[ToolCallEvent]:
    """The calls of a reply that is calls alone."""
    assert not any(isinstance(event, ContentDelta) for event in events)
    return [event for event in events if isinstance(event, ToolCallEvent)]


def content(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, ContentDelta))


def closers(tokenizer: KimiTokenizer) -> list[int]:
    """Tokens that help a random walk to end what it began."""
    return [*(tokenizer.encode(char)[0] for char in '"}]'), tokenizer.special["</think>"], *tokenizer.stop_ids]


@pytest.mark.parametrize("seed", range(8))
def test_json_object_is_a_json_object(seed: int, tokenizer: KimiTokenizer) -> None:
    ids = walk(tokenizer, constraint.json_object(tokenizer), seed, prefer=closers(tokenizer))
    assert isinstance(json.loads(tokenizer.decode(ids)), dict)


@pytest.mark.parametrize("seed", range(8))
def test_json_schema_is_obeyed(seed: int, tokenizer: KimiTokenizer) -> None:
    value = json.loads(tokenizer.decode(walk(tokenizer, constraint.json_schema(tokenizer, SCHEMA), seed)))
    assert set(value) == {"kind", "count", "tags"}
    assert value["kind"] in ("a", "b") and 1 <= value["count"] <= 99
    assert len(value["tags"]) <= 2 and all(len(tag) <= 5 for tag in value["tags"])


@pytest.mark.parametrize("mode", ["open", "may_open", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_reasoning_comes_first_and_is_free(mode: Any, seed: int, tokenizer: KimiTokenizer) -> None:
    subject = constraint.json_schema(tokenizer, SCHEMA, reasoning=mode)
    ids: list[int] = []
    if mode == "may_open":
        assert tokenizer.special["<think>"] in allowed(subject.mask(), tokenizer.vocab_size)
        subject.accept(tokenizer.special["<think>"])
        ids.append(tokenizer.special["<think>"])
    if mode != "none":
        free = allowed(subject.mask(), tokenizer.vocab_size)
        controls = [token_id for token_id in free if tokenizer.is_special(token_id)]
        assert controls == [tokenizer.special["</think>"]]
        assert len(free) == tokenizer.vocab_size - 256 + 1
    ids += walk(tokenizer, subject, seed, prefer=[tokenizer.special["</think>"]])
    events = parse(tokenizer, ids, reasoning_open=mode == "open")
    assert any(isinstance(event, ReasoningDelta) for event in events) == (mode != "none")
    assert set(json.loads(content(events))) == {"kind", "count", "tags"}


def test_reasoning_that_may_open_need_not(tokenizer: KimiTokenizer) -> None:
    subject = constraint.json_object(tokenizer, reasoning="may_open")
    subject.accept(tokenizer.encode("{")[0])
    assert tokenizer.special["<think>"] not in allowed(subject.mask(), tokenizer.vocab_size)


@pytest.mark.parametrize("seed", range(6))
def test_a_required_call_is_a_valid_call(seed: int, tokenizer: KimiTokenizer) -> None:
    tools = [WEATHER, CLOCK]
    prefer = [tokenizer.special["<|tool_calls_section_end|>"], *closers(tokenizer)]
    ids = walk(tokenizer, constraint.tool_call(tokenizer, tools), seed, prefer=prefer)
    events = calls_of(parse(tokenizer, ids, tools=tools))
    assert events
    for event in events:
        assert event.name in ("get_weather", "clock")
        if event.name == "get_weather":
            assert set(json.loads(event.arguments)) == {"city", "unit"}


@pytest.mark.parametrize("seed", range(4))
def test_a_named_call_is_one_call_of_that_name(seed: int, tokenizer: KimiTokenizer) -> None:
    tools = [CLOCK, WEATHER]
    subject = constraint.tool_call(tokenizer, tools, "get_weather", reasoning="open")
    ids = walk(tokenizer, subject, seed, prefer=closers(tokenizer))
    events = calls_of(parse(tokenizer, ids, reasoning_open=True, tools=tools))
    assert [event.name for event in events] == ["get_weather"]


def test_without_parallel_calls_there_is_one(tokenizer: KimiTokenizer) -> None:
    tools = [CLOCK]
    subject = constraint.tool_call(tokenizer, tools, parallel=False)
    ids = walk(tokenizer, subject, 1, prefer=[tokenizer.special["<|tool_call_begin|>"], *closers(tokenizer)])
    assert len(calls_of(parse(tokenizer, ids, tools=tools))) == 1


def test_strict_tools_leave_text_free_and_make_calls_valid(tokenizer: KimiTokenizer) -> None:
    subject = constraint.strict_tools(tokenizer, [WEATHER, CLOCK])
    assert subject is not None
    special = tokenizer.special
    ids = [*tokenizer.encode("Let me see."), special["<|tool_calls_section_begin|>"]]
    for token_id in ids:
        assert subject.mask() is None
        subject.accept(token_id)
    for seed in range(3):
        begin, end = special["<|tool_call_begin|>"], special["<|tool_call_end|>"]
        subject.accept(begin)
        rng = random.Random(seed)
        ids.append(begin)
        while (mask := subject.mask()) is not None:
            choices = allowed(mask, tokenizer.vocab_size)
            closing = [token_id for token_id in (*closers(tokenizer), end) if token_id in choices]
            ids.append(rng.choice(closing or choices))
            assert ids[-1] not in tokenizer.stop_ids
            subject.accept(ids[-1])
        assert ids[-1] == end
    events = parse(tokenizer, ids, tools=[WEATHER, CLOCK])
    assert sum(isinstance(event, ToolCallEvent) for event in events) == 3
    assert content(events) == "Let me see."


def test_no_strict_tool_needs_no_constraint(tokenizer: KimiTokenizer) -> None:
    assert constraint.strict_tools(tokenizer, [CLOCK]) is None


@pytest.mark.parametrize("extra", [0, 1, 31, 33, 100])
def test_masks_fit_vocabularies_of_any_size(extra: int, tokenizer: KimiTokenizer) -> None:
    size = tokenizer.vocab_size + extra
    for mode in ("open", "none"):
        subject = constraint.json_schema(tokenizer, SCHEMA, reasoning=mode, vocab_size=size)  # type: ignore[arg-type]
        ids = walk(tokenizer, subject, 3, prefer=closers(tokenizer), size=size)
        assert json.loads(content(parse(tokenizer, ids, reasoning_open=mode == "open")))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tokenizer: KimiTokenizer) -> None:
    with pytest.raises(ValueError, match="less than the tokenizer's"):
        constraint.json_object(tokenizer, vocab_size=tokenizer.vocab_size - 1)


def test_the_grammar_tokenizer_is_built_once(tokenizer: KimiTokenizer) -> None:
    assert grammar_tokenizer(tokenizer) is grammar_tokenizer(tokenizer)


def test_after_the_end_only_stops_are_allowed(tokenizer: KimiTokenizer) -> None:
    subject = constraint.json_schema(tokenizer, {"const": 1})
    subject.accept(tokenizer.encode("1")[0])
    assert set(allowed(subject.mask(), tokenizer.vocab_size)) == set(tokenizer.stop_ids)
    subject.accept(min(tokenizer.stop_ids))
    assert set(allowed(subject.mask(), tokenizer.vocab_size)) == set(tokenizer.stop_ids)


def test_a_token_that_was_not_allowed_is_an_error(tokenizer: KimiTokenizer) -> None:
    with pytest.raises(ChatError, match="does not allow"):
        constraint.json_object(tokenizer).accept(tokenizer.encode("x")[0])


@pytest.mark.parametrize(
    "schema",
    [
        7,
        {"type": "nothing"},
        {"$ref": "#/$defs/none"},
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
        {"type": "string", "pattern": "(?=a)b"},
        {"$ref": "https://example.org/schema.json"},
        {"type": "object", "properties": {"a": {"minimum": float("nan")}}},
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: Any, tokenizer: KimiTokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        constraint.json_schema(tokenizer, schema)
    assert caught.value.param == "response_format"
    assert "JSON schema" in str(caught.value)


def test_only_strict_tools_are_refused_for_a_keyword_that_cannot_be_enforced(tokenizer: KimiTokenizer) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    loose = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    strict = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    assert constraint.tool_call(tokenizer, [loose]).mask()
    with pytest.raises(RequestError, match="uniqueItems") as caught:
        constraint.tool_call(tokenizer, [strict])
    assert caught.value.param == "tools[0].function.parameters"


def test_a_tool_choice_without_its_tool_is_refused(tokenizer: KimiTokenizer) -> None:
    with pytest.raises(RequestError, match="names no declared tool: other") as caught:
        constraint.tool_call(tokenizer, [WEATHER], "other")
    assert caught.value.param == "tool_choice"
    with pytest.raises(RequestError, match="needs a tool"):
        constraint.tool_call(tokenizer, [])


def test_names_with_quotes_cannot_break_the_grammar(tokenizer: KimiTokenizer) -> None:
    for name in ('a"b', "a\\b", "a\nb", "ü:x", "%json {}"):
        tool = {"type": "function", "function": {"name": name}}
        assert constraint.tool_call(tokenizer, [tool]).mask()


def test_a_vocabulary_without_tool_markers_cannot_be_made_to_call(tokenizer: KimiTokenizer) -> None:
    class Bare(KimiTokenizer):
        def __init__(self) -> None:
            self.special = {}

    with pytest.raises(UnsupportedError):
        constraint.tool_call(Bare(), [CLOCK])


def test_no_tools_bias_bars_every_tool_marker(tokenizer: KimiTokenizer) -> None:
    bias = dict(constraint.no_tools_bias(tokenizer))
    assert set(bias) == {token_id for name, token_id in tokenizer.special.items() if "tool_call" in name}
    assert json.loads(json.dumps(list(bias.values()))) == [-1e9] * 5


def test_a_schema_on_which_llguidance_panics_is_refused_like_any_other(tokenizer: KimiTokenizer) -> None:
    """It cuts its message at byte 100, in the middle of a letter; Rust's panic is no Exception, and was a 500."""
    with pytest.raises(RequestError, match="cannot be enforced"):
        constraint.json_schema(tokenizer, {"type": "object", "required": "é" * 50})
