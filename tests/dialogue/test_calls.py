"""Tool calls of a reply as they stream: early, never taken back, the same as the whole; cut ones end as calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from exo_kimi.dialogue.events import ReplyEvent, ToolCallBegin, ToolCallDelta, WholeReply
from exo_kimi.dialogue.prepare import prepare
from exo_kimi.dialogue.request import ConversationRequest, ToolChoice
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.runtime.requests import TokenEvent

ASK = ({"role": "user", "content": "Hi"},)
WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
            "required": ["path", "content"],
        },
    },
}
ARGUMENTS = json.dumps({"path": "a.py", "content": 'print("hello")\n' * 400})
HEAD = "<|tool_calls_section_begin|><|tool_call_begin|>functions.write:0<|tool_call_argument_begin|>"
TAIL = "<|tool_call_end|><|tool_calls_section_end|>"


def replied(
    speaker: Speaker, text: str, *, last: Any = "stop", **options: Any
) -> tuple[list[int], list[list[ReplyEvent]]]:
    """The tokens of a reply, and the events that each completes (one more at the end)."""
    asked = ConversationRequest(messages=ASK, tools=(WRITE,), **options)
    (choice,) = prepare(asked, speaker).choices
    ids = speaker.tokenizer.encoding.encode(text, allowed_special="all")
    ends = [None] * (len(ids) - 1) + [last]
    tokens = [TokenEvent(token_id=id_, finish_reason=end) for id_, end in zip(ids, ends, strict=True)]
    return ids, [*map(choice.decoder.feed, tokens), choice.decoder.finish()]


def test_arguments_begin_within_three_tokens_of_the_header_and_keep_pace(speaker: Speaker) -> None:
    ids, steps = replied(speaker, HEAD + ARGUMENTS + TAIL)
    header = ids.index(speaker.tokenizer.special["<|tool_call_argument_begin|>"])
    first = next(at for at, events in enumerate(steps) if any(isinstance(event, ToolCallDelta) for event in events))
    begun = next(at for at, events in enumerate(steps) if any(isinstance(event, ToolCallBegin) for event in events))
    assert begun <= first <= header + 3
    sent = written = 0
    for id_, events in zip(ids, steps, strict=False):
        sent += sum(len(event.arguments) for event in events if isinstance(event, ToolCallDelta))
        written += len(speaker.tokenizer.token_bytes(id_)) if not speaker.tokenizer.is_special(id_) else 0
        assert sent >= written - len("functions.write:0") - 24  # two tokens
    events = [event for found in steps for event in found]
    whole = WholeReply.of(events)
    assert whole.tool_calls[0].arguments == ARGUMENTS
    assert "".join(event.arguments for event in events if isinstance(event, ToolCallDelta)) == ARGUMENTS


@pytest.mark.parametrize("choice", [ToolChoice(mode="required"), ToolChoice(mode="required", name="write")])
def test_a_forced_call_that_is_cut_is_never_raw_markup(choice: ToolChoice, speaker: Speaker) -> None:
    text = HEAD + ARGUMENTS[:60]
    ids = speaker.tokenizer.encoding.encode(text, allowed_special="all")
    for end in range(1, len(ids)):
        cut = speaker.tokenizer.decode(ids[:end])
        _, steps = replied(speaker, cut, last="length", tool_choice=choice)
        whole = WholeReply.of([event for found in steps for event in found])
        assert (whole.content, whole.end.finish_reason) == ("", "length")
        assert all(ARGUMENTS.startswith(call.arguments) for call in whole.tool_calls)
        assert len(whole.tool_calls) == (end > 1)


def test_a_call_that_is_cut_keeps_its_arguments_so_far(speaker: Speaker) -> None:
    _, steps = replied(speaker, HEAD + ARGUMENTS[:200], last="length")
    whole = WholeReply.of([event for found in steps for event in found])
    assert [call.arguments for call in whole.tool_calls] == [ARGUMENTS[:200]]
    assert whole.end.finish_reason == "length"


def test_without_tools_no_marker_can_be_written(speaker: Speaker) -> None:
    request = prepare(ConversationRequest(messages=ASK), speaker).choices[0].request
    barred = dict(request.sampling.logit_bias)
    markers = [id_ for name, id_ in speaker.tokenizer.special.items() if "tool_call" in name]
    assert markers and all(barred[id_] < -100 for id_ in markers)
