"""Conversations in the OpenAI shape, made of questions and answers, for training and for evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from exo_kimi.train.tasks import manners, tools
from exo_kimi.train.tasks.registry import PARTS
from exo_kimi.train.tasks.turn import Task, Turn, draw, held_out

Message = dict[str, Any]
Shares = Mapping[Task, float]
BRIEF = "Answer briefly."
_BRIEF_SHARE = 0.25
_SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant")
_NO_TOOL = "I have no tool for that."


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConversation:
    """Messages, the last of them by the assistant, with the tools that are declared."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def training_conversation(rng: Random, *, part: int = 0) -> TrainingConversation:
    """Make one conversation without any held-out question.

    Args:
        part: part of the training, from 0; tasks are drawn by its shares in `registry.PARTS`.
    """
    shares = PARTS[part]
    kind = rng.random()
    if kind < 0.09:
        return _with_tools(rng, shares)
    if kind < 0.12:
        return _named(rng, shares)
    if kind < 0.16:
        return _introduced(rng, shares)
    return _plain(rng, shares)


def single(turn: Turn, *, brief: bool = False, system: str | None = None) -> list[Message]:
    """The messages of one question and its answer."""
    if brief and turn.brief:
        system = BRIEF
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *exchange(turn, brief=brief)]


def exchange(turn: Turn, *, brief: bool = False) -> list[Message]:
    """A question and its answer."""
    answer: Message = {"role": "assistant", "content": turn.brief if brief and turn.brief else turn.answer}
    if turn.reasoning:
        answer["reasoning_content"] = turn.reasoning
    return [{"role": "user", "content": turn.question}, answer]


def tool_exchange(request: tools.Request, number: int) -> list[Message]:
    """A request, the call, its result and the answer.

    Args:
        number: the call's number, counted over the conversation.
    """
    identity = f"functions.{request.tool}:{number}"
    function = {"name": request.tool, "arguments": json.dumps(request.arguments)}
    call = {"id": identity, "type": "function", "function": function}
    return [
        {"role": "user", "content": request.question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": identity, "content": request.result},
        {"role": "assistant", "content": request.answer},
    ]


def _turn(rng: Random, shares: Shares) -> Turn:
    return draw(rng.choices(list(shares), list(shares.values()))[0], rng, evaluation=False)


def _plain_turn(rng: Random, shares: Shares) -> Turn:
    """Draw a turn without reasoning, which reads the same in the past as when it was the last: reasoning is not shown again."""
    while (turn := _turn(rng, shares)).reasoning or turn.task == "stories":
        pass
    return turn


def _plain(rng: Random, shares: Shares) -> TrainingConversation:
    turns = [_plain_turn(rng, shares) for _ in range(rng.choices((0, 1, 2, 3), (45, 15, 20, 20))[0])]
    turns.append(_turn(rng, shares))
    system, brief = None, rng.random() < _BRIEF_SHARE
    if brief:
        system = BRIEF
    elif rng.random() < 0.15:
        system = rng.choice(_SYSTEMS)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return TrainingConversation(
        messages=messages + [message for turn in turns for message in exchange(turn, brief=brief)]
    )


def _named(rng: Random, shares: Shares) -> TrainingConversation:
    system, asked = manners.named(rng)
    while held_out(asked.key):
        system, asked = manners.named(rng)
    turns = [_plain_turn(rng, shares) for _ in range(rng.choice((0, 0, 1, 2)))] + [asked]
    messages = [message for turn in turns for message in exchange(turn)]
    return TrainingConversation(messages=[{"role": "system", "content": system}, *messages])


def _introduced(rng: Random, shares: Shares) -> TrainingConversation:
    told, asked = manners.introduced(rng)
    while held_out(told.key):
        told, asked = manners.introduced(rng)
    turns = [told, *(_plain_turn(rng, shares) for _ in range(rng.choice((0, 1, 2)))), asked]
    return TrainingConversation(messages=[message for turn in turns for message in exchange(turn)])


def _with_tools(rng: Random, shares: Shares) -> TrainingConversation:
    names = declared(rng)
    messages: list[Message] = []
    calls = 0
    for _ in range(rng.randint(2, 5)):
        kind = rng.random()
        if kind < 0.75:
            messages += tool_exchange(tools.request(rng, names, evaluation=False), calls)
            calls += 1
        elif kind < 0.85 and len(names) < len(tools.TOOLS):
            missing = tuple(name for name in tools.TOOLS if name not in names)
            question = tools.request(rng, missing, evaluation=False).question
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _NO_TOOL}]
        else:
            messages += exchange(_plain_turn(rng, shares))
    return TrainingConversation(messages=messages, tools=[tools.TOOLS[name] for name in names])


def declared(rng: Random) -> tuple[str, ...]:
    """Draw the names of the tools of one conversation, in any order: mostly all."""
    names = list(tools.TOOLS)
    rng.shuffle(names)
    return tuple(names[: rng.choices((1, 2, 3), (15, 15, 70))[0]])
