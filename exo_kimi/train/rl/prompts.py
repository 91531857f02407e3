"""Prompts of the project's own tasks with what is right to say, drawn from the training's side of the split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from exo_kimi.train.data.conversations import BRIEF, Message, declared, exchange, single, tool_exchange
from exo_kimi.train.tasks import arithmetic, facts, manners, tools
from exo_kimi.train.tasks.registry import LAST_SHARES
from exo_kimi.train.tasks.turn import Task, Turn, draw, held_out

FOCUS = "carry"
"""The kind that `exo-kimi train grpo` is for: sums 4x + 3x with a carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedPrompt:
    """One prompt, and what is right.

    Args:
        kind: of `KINDS`.
        messages: before the reply.
        tools: that are declared.
        reply: a right reply, as training shows it.
        accepted: all right answers; none where a call or some parts are asked for.
        call: the right call of a tool, its name and arguments.
        used: parts of a tool's result that a right answer holds.
    """

    kind: str
    messages: list[Message]
    reply: Message
    tools: list[dict[str, Any]] | None = None
    accepted: tuple[str, ...] = ()
    call: tuple[str, dict[str, Any]] | None = None
    used: tuple[str, ...] = ()


def draw_prompt(rng: Random, shares: dict[str, float]) -> RewardedPrompt:
    """A prompt of a kind drawn by its share; no held-out question."""
    kind = rng.choices(list(shares), list(shares.values()))[0]
    return KINDS[kind](rng)


def _of_task(kind: str, task: Task) -> Callable[[Random], RewardedPrompt]:
    def make(rng: Random) -> RewardedPrompt:
        return _asked(kind, draw(task, rng, evaluation=False))

    return make


def _asked(kind: str, turn: Turn) -> RewardedPrompt:
    *messages, reply = single(turn)
    return RewardedPrompt(kind=kind, messages=messages, reply=reply, accepted=turn.accepted or (turn.answer,))


def _any_task(rng: Random) -> RewardedPrompt:
    task = rng.choices(list(LAST_SHARES), list(LAST_SHARES.values()))[0]
    return _asked("tasks", draw(task, rng, evaluation=False))


def _brief(rng: Random) -> RewardedPrompt:
    turn = draw(facts.fact, rng, evaluation=False)
    messages: list[Message] = [{"role": "system", "content": BRIEF}, *exchange(turn)[:-1]]
    return RewardedPrompt(
        kind="brief", messages=messages, reply={"role": "assistant", "content": turn.brief}, accepted=(turn.brief,)
    )


def _names(rng: Random) -> RewardedPrompt:
    if rng.random() < 0.5:
        system, turn = manners.named(rng)
        while held_out(turn.key):
            system, turn = manners.named(rng)
        *messages, reply = single(turn, system=system)
        return RewardedPrompt(kind="names", messages=messages, reply=reply, accepted=(turn.answer,))
    told, asked = manners.introduced(rng)
    while held_out(told.key):
        told, asked = manners.introduced(rng)
    between = draw(facts.fact, rng, evaluation=False)
    *messages, reply = (message for turn in (told, between, asked) for message in exchange(turn))
    return RewardedPrompt(kind="names", messages=messages, reply=reply, accepted=(asked.answer,))


def _tool_call(rng: Random) -> RewardedPrompt:
    names = declared(rng)
    request = tools.request(rng, names, evaluation=False)
    question, call, _, _ = tool_exchange(request, 0)
    return RewardedPrompt(
        kind="tool_calls",
        messages=[question],
        reply=call,
        tools=[tools.TOOLS[name] for name in names],
        call=(request.tool, dict(request.arguments)),
    )


def _tool_result(rng: Random) -> RewardedPrompt:
    names = declared(rng)
    request = tools.request(rng, names, evaluation=False)
    *messages, reply = tool_exchange(request, 0)
    return RewardedPrompt(
        kind="tool_results",
        messages=messages,
        reply=reply,
        tools=[tools.TOOLS[name] for name in names],
        used=request.used,
    )


KINDS: dict[str, Callable[[Random], RewardedPrompt]] = {
    FOCUS: _of_task(FOCUS, arithmetic.carry_sum),
    "sums": _of_task("sums", arithmetic.addition),
    "tasks": _any_task,
    "brief": _brief,
    "names": _names,
    "tool_calls": _tool_call,
    "tool_results": _tool_result,
}
"""Kind -> draws a prompt of it."""

FOCUSED_SHARES = {FOCUS: 3.0, "sums": 6.0, "tasks": 2.0, "brief": 0.75}
"""A quarter of the prompts are of the focus, half are other sums, which lie nearest and suffer first; the rest, and the
supervised texts that are replayed beside them, keep what is known."""
