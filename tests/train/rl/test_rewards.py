"""Rewards are exact: right, wrong and malformed answers and tool calls, format and length, through the parser that serves."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from exo_kimi.compress.compare.replies import Reply, parse_reply
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.rl.prompts import FOCUS, FOCUSED_SHARES, KINDS, RewardedPrompt, draw_prompt
from exo_kimi.train.rl.rewards import is_right, is_well_formed, length_reward, reward
from exo_kimi.train.tasks.turn import held_out

MOST = 64


def said(encoder: Encoder, prompt: RewardedPrompt, message: dict[str, Any], *, ended: bool = True) -> Reply:
    """A message as the model would have to say it, parsed as it is served."""
    text = encoder.template.render(prompt.messages, prompt.tools)
    ids = encoder.reply(message, text.reasoning)[:-1]
    return parse_reply(encoder.tokenizer, text, ids, prompt.tools, ended=ended)


def called(name: str, arguments: str) -> dict[str, Any]:
    call = {"id": f"functions.{name}:0", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tasks_own_reply_earns_everything(encoder: Encoder, kind: str) -> None:
    rng = Random(kind)
    for _ in range(20):
        prompt = KINDS[kind](rng)
        assert prompt.kind == kind
        got = reward(prompt, said(encoder, prompt, prompt.reply), tokens=20, usual_tokens=20, most_tokens=MOST)
        assert (got.right, got.format, got.length) == (1, 1, 0)
        assert got.total((1.0, 0.1, 0.1)) == pytest.approx(1.1)


def test_no_prompt_is_held_out_and_all_kinds_come() -> None:
    rng = Random(0)
    assert {draw_prompt(rng, dict.fromkeys(KINDS, 1.0)).kind for _ in range(400)} == set(KINDS)
    assert {draw_prompt(rng, FOCUSED_SHARES).kind for _ in range(400)} == set(FOCUSED_SHARES)
    for _ in range(200):
        question = KINDS[FOCUS](rng).accepted[0]
        a, b = (int(part) for part in question.partition(" =")[0].split(" + "))
        assert a // 10 == 4
        assert b // 10 == 3
        assert a % 10 + b % 10 >= 10
        assert not held_out(f"{b} + {a}")


def test_a_wrong_answer_keeps_the_format_and_an_unfinished_one_nothing(encoder: Encoder) -> None:
    prompt = KINDS[FOCUS](Random(1))
    wrong = {**prompt.reply, "content": "47 + 35 = 72."}
    got = reward(prompt, said(encoder, prompt, wrong), tokens=30, usual_tokens=30, most_tokens=MOST)
    assert (got.right, got.format) == (0, 1)
    cut = said(encoder, prompt, prompt.reply, ended=False)
    got = reward(prompt, cut, tokens=MOST, usual_tokens=30, most_tokens=MOST)
    assert (got.right, got.format, got.length) == (0, 0, -1)


def test_think_tags_left_open_are_malformed(encoder: Encoder) -> None:
    prompt = KINDS[FOCUS](Random(1))
    text = encoder.template.render(prompt.messages, None)
    ids = encoder.reply(prompt.reply, text.reasoning)
    ids = ids[: ids.index(encoder.tokenizer.special["</think>"])]
    reply = parse_reply(encoder.tokenizer, text, ids, None, ended=True)
    assert not is_well_formed(prompt, reply)
    assert not is_right(prompt, reply)


@pytest.mark.parametrize(
    ("name", "arguments", "right", "well_formed"),
    [
        ("calculator", '{"expression": "1200 + 34"}', True, True),
        ("calculator", '{"expression":"1200 + 34"}', True, True),
        ("calculator", '{"expression": "1200 + 35"}', False, True),
        ("calculator", '{"expression": "1200 + 34", "unit": 1}', False, True),
        ("calculator", '{"city": "Oslo"}', False, False),
        ("calculator", '{"expression": 5}', False, False),
        ("calculator", '{"expression": "1200 + 34"', False, False),
        ("get_weather", '{"city": "Oslo"}', False, False),
    ],
)
def test_calls_of_tools(encoder: Encoder, name: str, arguments: str, right: bool, well_formed: bool) -> None:
    rng = Random(2)
    prompt = KINDS["tool_calls"](rng)
    while [tool["function"]["name"] for tool in prompt.tools or ()] != ["calculator"]:
        prompt = KINDS["tool_calls"](rng)
    prompt = RewardedPrompt(
        kind=prompt.kind,
        messages=prompt.messages,
        reply=prompt.reply,
        tools=prompt.tools,
        call=("calculator", {"expression": "1200 + 34"}),
    )
    reply = said(encoder, prompt, called(name, arguments))
    assert len(reply.calls) == 1
    assert is_right(prompt, reply) is right
    assert is_well_formed(prompt, reply) is well_formed


def test_two_calls_or_a_call_where_none_is_asked_are_wrong(encoder: Encoder) -> None:
    prompt = KINDS["tool_calls"](Random(3))
    twice = {**prompt.reply, "tool_calls": prompt.reply["tool_calls"] * 2}
    assert not is_right(prompt, said(encoder, prompt, twice))
    result = KINDS["tool_results"](Random(3))
    assert not is_right(result, said(encoder, result, called("calculator", "{}")))
    assert not is_right(result, said(encoder, result, {"content": "It is nothing."}))


def test_length_is_free_up_to_a_half_more_and_then_falls_to_minus_one() -> None:
    assert [length_reward(tokens, 20, 60) for tokens in (1, 20, 30, 45, 60)] == [0, 0, 0, -0.5, -1]
    assert length_reward(50, 40, 50) == 0  # what is free reaches beyond the most
