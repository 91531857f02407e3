"""Requests to sequences and their replies: seeds, ids, forms, echo, counts, times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exo_kimi.chat.defaults import SamplingDefaults
from exo_kimi.dialogue.decoding import ReplyDecoder, TextParser
from exo_kimi.dialogue.events import ContentEvent, EndEvent, ReplyEvent
from exo_kimi.dialogue.prepare import Choice, prepare
from exo_kimi.dialogue.request import ConversationRequest, JsonFormat, SamplingOverrides, TextRequest, ToolChoice
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.runtime.requests import GenerationRequest, TokenEvent

ASK = ({"role": "user", "content": "Hi"},)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def text_of(events: list[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, ContentEvent))


def test_each_reply_has_its_own_seed_id_decoder_and_grammar(speaker: Speaker) -> None:
    asked = ConversationRequest(
        messages=ASK, n=3, request_id="r", sampling=SamplingOverrides(seed=2**63 - 1), response_format=JsonFormat()
    )
    prepared = prepare(asked, speaker)
    requests = [choice.request for choice in prepared.choices]
    assert [request.sampling.seed for request in requests] == [2**63 - 1, 0, 1]
    assert [request.request_id for request in requests] == ["r", "r-1", "r-2"]
    assert len({id(request.constraint) for request in requests} - {id(None)}) == 3
    assert len({id(choice.decoder) for choice in prepared.choices}) == 3
    assert prepared.prompt_tokens == len(requests[0].prompt_ids)


def test_ids_are_drawn_when_no_door_gives_one(speaker: Speaker) -> None:
    prepared = prepare(ConversationRequest(messages=ASK, n=2), speaker)
    assert len({choice.request.request_id for choice in prepared.choices}) == 2


def test_what_is_left_open_is_the_checkpoints(thinker: Speaker) -> None:
    defaults = replace(
        thinker.defaults,
        thinking=SamplingDefaults(temperature=1.0, top_p=0.95),
        instant=SamplingDefaults(temperature=0.6, top_p=0.95),
    )
    thinker = replace(thinker, defaults=defaults)
    instant = prepare(ConversationRequest(messages=ASK, thinking=False), thinker).choices[0].request.sampling
    thinking = prepare(ConversationRequest(messages=ASK), thinker).choices[0].request.sampling
    assert (instant.temperature, thinking.temperature) == (0.6, 1.0)
    chosen = SamplingOverrides(temperature=0.0, logit_bias=((3, 1.0),), top_logprobs=0)
    sampling = thinker.sampling(chosen)
    assert (sampling.temperature, sampling.top_p, sampling.logit_bias) == (0.0, 0.95, ((3, 1.0),))
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 0)
    assert not thinker.sampling(SamplingOverrides()).logprobs


def test_tools_that_must_not_be_called_are_shown_and_barred(speaker: Speaker) -> None:
    asked = ConversationRequest(messages=ASK, tools=(TOOL,), tool_choice=ToolChoice(mode="none"))
    request = prepare(asked, speaker).choices[0].request
    assert "look" in speaker.tokenizer.decode(request.prompt_ids)
    assert dict(request.sampling.logit_bias)[speaker.tokenizer.special["<|tool_calls_section_begin|>"]] < -100


@pytest.mark.parametrize(
    "form", [{"response_format": JsonFormat()}, {"tools": (TOOL,), "tool_choice": ToolChoice(mode="required")}]
)
def test_a_reply_that_is_begun_cannot_be_held_to_a_form(speaker: Speaker, form: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="begun"):
        prepare(ConversationRequest(messages=ASK, begun_reply="{", **form), speaker)


def test_texts_are_gone_on_with_and_echoed(speaker: Speaker) -> None:
    ids = tuple(speaker.tokenizer.encode("The sky"))
    prepared = prepare(TextRequest(prompts=("The sky", ids), echo=True, n=2), speaker)
    assert {choice.request.prompt_ids for choice in prepared.choices} == {ids}
    assert (prepared.prompt_tokens, prepared.choices_per_prompt, len(prepared.choices)) == (2 * len(ids), 2, 4)
    assert text_of(prepared.choices[3].decoder.finish()) == "The sky"
    with pytest.raises(RequestError, match="no tokens"):
        prepare(TextRequest(prompts=("The sky", "")), speaker)


def test_the_choices_of_a_prompt_share_what_was_cached_for_all_of_them(speaker: Speaker) -> None:
    prepared = prepare(TextRequest(prompts=("a b c", "d e"), n=2), speaker)
    ends = [
        EndEvent(finish_reason="stop", completion_tokens=5, cached_tokens=cached, reasoning_tokens=1)
        for cached in (2, 3, 0, 1)
    ]
    usage = prepared.usage(ends)
    assert (usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens) == (20, 2, 4)
    assert usage.total_tokens == prepared.prompt_tokens + 20


def test_times_run_from_the_start_to_the_first_token_and_to_the_end(speaker: Speaker) -> None:
    ticks = iter((10.0, 12.5, 14.0))
    parser = TextParser(speaker.tokenizer)
    decoder = ReplyDecoder(parser, stop_ids=speaker.tokenizer.stop_ids, clock=lambda: next(ticks))
    for token_id in speaker.tokenizer.encode("Blue sky"):
        decoder.feed(TokenEvent(token_id=token_id))
    end = decoder.finish()[-1]
    assert isinstance(end, EndEvent) and (end.ttft_s, end.decode_s) == (2.5, 1.5)


def test_a_reply_that_is_complete_ends_its_sequence(speaker: Speaker) -> None:
    closed: list[bool] = []

    class Engine:
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
            try:
                while True:
                    for token_id in speaker.tokenizer.encode("Blue STOP"):
                        yield TokenEvent(token_id=token_id)
            finally:
                closed.append(True)

    async def run(choice: Choice) -> list[ReplyEvent]:
        async with aclosing(choice.generate(Engine())) as steps:  # type: ignore[arg-type]
            return [event async for _, events in steps for event in events]

    (choice,) = prepare(ConversationRequest(messages=ASK, stop=("STOP",)), speaker).choices
    events = asyncio.run(run(choice))
    assert text_of(events) == "Blue "
    assert closed == [True]
    assert isinstance(events[-1], EndEvent) and events[-1].finish_reason == "stop"


def conversation_with(id_: str) -> tuple[dict[str, Any], ...]:
    """A conversation whose one call has this id."""
    call = {"id": id_, "type": "function", "function": {"name": "look", "arguments": "{}"}}
    return (
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": id_, "content": "found"},
    )


@pytest.mark.parametrize("id_", ["call_1", "toolu_01A", "functions_look_0", "functions.look:7", ""])
def test_foreign_ids_give_the_same_prompt_as_kimis(id_: str, thinker: Speaker) -> None:
    ours = (
        prepare(ConversationRequest(messages=conversation_with("functions.look:0"), tools=(TOOL,)), thinker)
        .choices[0]
        .request
    )
    theirs = prepare(ConversationRequest(messages=conversation_with(id_), tools=(TOOL,)), thinker).choices[0].request
    assert theirs.prompt_ids == ours.prompt_ids
    assert "functions.look:0<|tool_call_argument_begin|>" in thinker.tokenizer.decode(ours.prompt_ids)


def allowed(request: GenerationRequest, speaker: Speaker) -> set[bytes]:
    """The tokens that may come next."""
    assert request.constraint is not None
    mask = request.constraint.mask()
    assert mask is not None
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return {speaker.tokenizer.token_bytes(int(id_)) for id_ in np.flatnonzero(bits)}


def test_a_form_beside_tools_is_a_call_or_such_a_text(speaker: Speaker) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    asked = ConversationRequest(messages=ASK, tools=(TOOL,), response_format=JsonFormat(schema=schema))
    for text in (
        '{"a": 5}',
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}",
    ):
        request = prepare(asked, speaker).choices[0].request
        assert allowed(request, speaker) <= {b"{", b'{"', b"<|tool_calls_section_begin|>"}
        assert request.constraint is not None
        for id_ in speaker.tokenizer.encoding.encode(text, allowed_special="all"):
            request.constraint.accept(id_)
    assert b"<|tool_call_end|>" in allowed(request, speaker)


def test_a_forced_call_has_the_next_number_and_no_leading_zero(speaker: Speaker) -> None:
    asked = ConversationRequest(
        messages=conversation_with("call_1"), tools=(TOOL,), tool_choice=ToolChoice(mode="required")
    )
    request = prepare(asked, speaker).choices[0].request
    assert request.constraint is not None
    head = "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:"
    for id_ in speaker.tokenizer.encoding.encode(head, allowed_special="all"):
        request.constraint.accept(id_)
    assert allowed(request, speaker) == {b"1"}


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_reasoning_is_closed_at_its_budget(budget: int, thinker: Speaker) -> None:
    for form in (None, JsonFormat()):
        asked = ConversationRequest(messages=ASK, reasoning_budget=budget, response_format=form)
        constraint = prepare(asked, thinker).choices[0].request.constraint
        assert constraint is not None
        for id_ in thinker.tokenizer.encode("abcdefgh")[:budget]:
            mask = constraint.mask()
            assert mask is None or len(mask) > 0
            constraint.accept(id_)
        request = prepare(asked, thinker).choices[0].request
        close = thinker.tokenizer.special["</think>"]
        mask = constraint.mask()
        assert mask is not None
        assert np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist() == [close]
        constraint.accept(close)
        assert (constraint.mask() is None) == (form is None)
        assert request.constraint is not constraint


def test_a_budget_of_a_model_that_does_not_reason_costs_nothing(speaker: Speaker) -> None:
    asked = ConversationRequest(messages=ASK, reasoning_budget=5)
    assert prepare(asked, speaker).choices[0].request.constraint is None
