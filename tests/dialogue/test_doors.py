"""One conversation through the doors of serve and of exo: the same prompt, the same sampling, the same events and counts."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exo_kimi.dialogue.events import EndEvent, ReplyEvent, WholeReply
from exo_kimi.dialogue.prepare import Choice, PreparedRequest
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import UnsupportedError
from exo_kimi.plugin.runner.chunks import ChunkWriter, ExoTypes
from exo_kimi.plugin.runner.task import prepare_task
from exo_kimi.runtime.requests import TokenEvent
from exo_kimi.serve.answer.formats import ChatFormat, Head
from exo_kimi.serve.request.prepare import prepare_chat
from exo_kimi.serve.request.schemas import parse_chat

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)
TEXTS = st.sampled_from(["", "Hi", "看见 é", "<|im_end|> typed", "two\nlines", '{"a": 1}'])
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}},
    {"type": "function", "function": {"name": "get_time", "description": "Looks.", "parameters": PARAMETERS}},
]
SEGMENTS = (
    "<think>",
    "</think>",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "functions.get_weather:0",
    "functions.get_weather:7",
    "call_77",
    "<|tool_call_argument_begin|>",
    '{"city": "Oslo"}',
    '{"city": "Os',
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "[PAD]",
    "Blue 看见 sky",
    "😀",
    "a STOP b",
    "ST",
    "OP",
    " ",
)
CALL = ("<|tool_calls_section_begin|>", *SEGMENTS[3:5], *SEGMENTS[7:9], *SEGMENTS[10:12])


def call(number: int) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    return {"id": f"functions.get_weather:{number}", "type": "function", "function": function}


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns that end with the user's or a tool's: a last turn of the assistant means another thing at each door."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    calls = 0
    for _ in range(draw(st.integers(0, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(TEXTS), "tool_calls": [call(calls)]})
            messages.append({"role": "tool", "content": draw(TEXTS), "tool_call_id": call(calls)["id"]})
            calls += 1
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    return [*messages, {"role": "user", "content": draw(TEXTS)}]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.5]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "top_k": st.integers(0, 50),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "seed": st.integers(0, 2**31),
        "max_tokens": st.integers(1, 99),
        "stop": st.sampled_from(["STOP", ["sky", "STOP"]]),
        "logprobs": st.just(True),
        "tools": st.just(TOOLS),
    },
)
REPLIES = st.lists(st.sampled_from(SEGMENTS) | st.just(CALL) | st.text(max_size=5), max_size=12)


def through_serve(speaker: Speaker, messages: list[dict[str, Any]], **options: Any) -> PreparedRequest:
    return prepare_chat(parse_chat({"messages": messages, **options}), speaker)


def through_exo(speaker: Speaker, messages: list[dict[str, Any]], **options: Any) -> PreparedRequest:
    params: dict[str, Any] = dict.fromkeys(
        (*SAMPLING, "instructions", "tools", "stop", "enable_thinking", "top_logprobs", "reasoning_effort")
    )
    params |= {"repetition_context_size": None, "bench": False, "use_prefix_cache": False}
    params |= {"images": [], "input": [], "logprobs": False, "max_output_tokens": options.pop("max_tokens", None)}
    messages = copy.deepcopy(messages)
    for message in messages:
        for each in message.get("tool_calls", ()):
            each["function"]["id"] = each["id"]  # as exo writes it
    return prepare_task("t", SimpleNamespace(**params | options, chat_template_messages=messages), speaker)


def tokens_of(speaker: Speaker, reply: list[Any], cut: int) -> list[TokenEvent]:
    """A reply's tokens up to a cut, which ends it by its length, or to its end of turn."""
    special = speaker.tokenizer.special
    parts = [part for each in reply for part in ((each,) if isinstance(each, str) else each)]
    ids = [id_ for part in parts for id_ in ([special[part]] if part in special else speaker.tokenizer.encode(part))]
    ids.append(special["<|im_end|>"])
    kept = ids[: max(1, cut)]
    last = "stop" if len(kept) == len(ids) else "length"
    return [
        TokenEvent(
            token_id=token_id,
            logprob=-0.5,
            cached_tokens=3,
            finish_reason=last if place == len(kept) - 1 else None,  # type: ignore[arg-type]
        )
        for place, token_id in enumerate(kept)
    ]


def steps_of(choice: Choice, tokens: list[TokenEvent]) -> list[tuple[TokenEvent | None, list[ReplyEvent]]]:
    """As `Choice.generate` steps, without an engine."""
    steps: list[tuple[TokenEvent | None, list[ReplyEvent]]] = []
    for token in tokens:
        steps.append((token, choice.decoder.feed(token)))
        if choice.decoder.satisfied:
            break
    return [*steps, (None, choice.decoder.finish())]


def exo_types() -> ExoTypes:
    """Plain records in place of exo's types."""
    names = [each.name for each in dataclasses.fields(ExoTypes) if each.name not in ("Memory", "cancel_all")]
    memory = SimpleNamespace(from_bytes=lambda count: count)
    return ExoTypes(**dict.fromkeys(names, SimpleNamespace), Memory=memory, cancel_all="all")


@example(messages=[{"role": "user", "content": "Hi"}], options={"stop": "STOP"}, reply=["a STOP b"], cut=60)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations(), options=OPTIONS, reply=REPLIES, cut=st.integers(1, 60))
def test_both_doors_prepare_and_decode_alike(
    either: Speaker, messages: list[dict[str, Any]], options: dict[str, Any], reply: list[Any], cut: int
) -> None:
    served, tasked = through_serve(either, messages, **options), through_exo(either, messages, **options)
    (ours,), (theirs,) = served.choices, tasked.choices
    assert ours.request.prompt_ids == theirs.request.prompt_ids
    assert ours.request.stop_ids == theirs.request.stop_ids
    assert (ours.request.sampling, ours.request.max_tokens) == (theirs.request.sampling, theirs.request.max_tokens)
    assert type(ours.request.constraint) is type(theirs.request.constraint)

    tokens = tokens_of(either, reply, cut)
    steps = steps_of(ours, tokens)
    assert steps == steps_of(theirs, tokens)

    events = [event for _, found in steps for event in found]
    whole, usage = WholeReply.of(events), served.usage([event for event in events if isinstance(event, EndEvent)])
    writer = ChunkWriter(exo_types(), "m", tasked, either.tokenizer, peak_bytes=lambda: 9)
    chunks = [chunk for token, found in steps for chunk in writer.write(token, found)]
    style = ChatFormat(head=Head(id="i", created=0, model="m", fingerprint="f"), tokenizer=either.tokenizer)
    answer = style.whole([whole], usage)
    message = answer["choices"][0]["message"]
    texts = chunks[:-1]
    assert "".join(chunk.text for chunk in texts if not chunk.is_thinking) == (message["content"] or "")
    assert "".join(chunk.text for chunk in texts if chunk.is_thinking) == message.get("reasoning_content", "")
    assert [(each.id, each.name, each.arguments) for each in getattr(chunks[-1], "tool_calls", ())] == [
        (each["id"], each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls", ())
    ]
    told = json.loads(json.dumps(chunks[-1].usage, default=vars))
    assert told == answer["usage"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reply=REPLIES, cut=st.integers(1, 60), tools=st.booleans())
def test_every_token_is_counted_once_and_belongs_to_one_event_at_most(
    either: Speaker, reply: list[Any], cut: int, tools: bool
) -> None:
    options: dict[str, Any] = {"tools": TOOLS} if tools else {}
    prepared = through_serve(either, [{"role": "user", "content": "Hi"}], **options)
    tokens = tokens_of(either, reply, cut)
    events = [event for _, found in steps_of(prepared.choices[0], tokens) for event in found]
    owned = [token for event in events for token in getattr(event, "tokens", ())]
    places = [next(place for place, each in enumerate(tokens) if each is token) for token in owned]
    assert places == sorted(set(places))
    whole = WholeReply.of(events)
    assert whole.end.completion_tokens == len(tokens)
    assert whole.end.cached_tokens == 3
    assert whole.end.reasoning_tokens == len(owned) - len(whole.tokens)
    assert isinstance(events[-1], EndEvent) and sum(isinstance(event, EndEvent) for event in events) == 1


def test_a_last_turn_of_the_assistant_is_gone_on_with_in_exo_only(speaker: Speaker) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    (served,), (tasked,) = through_serve(speaker, messages).choices, through_exo(speaker, messages).choices
    (alone,) = through_serve(speaker, messages[:1]).choices
    begun = tuple(speaker.tokenizer.encode("Once upon"))
    assert tasked.request.prompt_ids == alone.request.prompt_ids + begun
    assert served.request.prompt_ids != tasked.request.prompt_ids


def test_reasoning_that_the_template_does_not_have_is_named_and_refused_by_a_strict_api_only(speaker: Speaker) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UnsupportedError, match="does not reason"):
        prepare_chat(parse_chat({"messages": messages, "thinking": True}, strict=True), speaker)
    assert through_serve(speaker, messages, thinking=True).warnings == ("this model does not reason",)
    assert through_exo(speaker, messages, enable_thinking=True).warnings == ("this model does not reason",)
