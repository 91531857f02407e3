"""Held-out questions and tool requests of one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from exo_kimi.train.data.conversations import BRIEF, Message, exchange, single
from exo_kimi.train.tasks import arithmetic, facts, manners, tools
from exo_kimi.train.tasks.registry import SHARES
from exo_kimi.train.tasks.turn import Task, Turn, draw, held_out

_TRAINED_ONLY: tuple[Task, ...] = (manners.greeting, manners.unnamed)
_PATIENCE = 400  # draws without a new question: there are no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question: the messages before the reply, and the replies that are right."""

    task: str
    messages: list[Message]
    accepted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCase:
    """One request with the declared tools."""

    request: tools.Request
    tools: list[dict[str, Any]]


def question_cases(count: int, seed: int) -> list[Case]:
    """At most `count` different held-out questions of each task."""
    cases: list[Case] = []
    for task in SHARES:
        if task is facts.fact:
            cases += _distinct(_capital, count, seed)
            cases += _distinct(_fact, count, seed)
        elif task not in _TRAINED_ONLY:
            cases += _distinct(partial(_question, task), count, seed)
    for made in (_carry_sum, _named, _introduced, _brief):
        cases += _distinct(made, count, seed)
    return cases


def tool_cases(count: int, seed: int) -> list[ToolCase]:
    """At most `count` different held-out requests of each tool, with all tools declared in any order."""
    rng = Random(f"requests {seed}")
    cases: list[ToolCase] = []
    for name in tools.TOOLS:
        made: dict[str, ToolCase] = {}
        tries = 0
        while len(made) < count and tries < _PATIENCE:
            tries += 1
            request = tools.request(rng, (name,), evaluation=True)
            if request.key not in made:
                declared = list(tools.TOOLS.values())
                rng.shuffle(declared)
                made[request.key], tries = ToolCase(request=request, tools=declared), 0
        cases += made.values()
    return cases


def _distinct(make: Callable[[Random], Case], count: int, seed: int) -> Iterator[Case]:
    rng = Random(f"questions {seed}")
    seen: set[str] = set()
    tries = 0
    while len(seen) < count and tries < _PATIENCE:
        tries += 1
        case = make(rng)
        if (said := str(case.messages)) not in seen:
            seen.add(said)
            tries = 0
            yield case


def _single(turn: Turn) -> Case:
    return Case(task=turn.task, messages=single(turn)[:-1], accepted=turn.accepted or (turn.answer,))


def _question(task: Task, rng: Random) -> Case:
    return _single(draw(task, rng, evaluation=True))


def _carry_sum(rng: Random) -> Case:
    return replace(_question(arithmetic.carry_sum, rng), task="sums with a carry")


def _capital(rng: Random) -> Case:
    while (turn := draw(facts.fact, rng, evaluation=True)).task != "capitals":
        pass
    return _single(turn)


def _fact(rng: Random) -> Case:
    while (turn := draw(facts.fact, rng, evaluation=True)).task != "facts":
        pass
    return _single(turn)


def _brief(rng: Random) -> Case:
    turn = draw(facts.fact, rng, evaluation=True)
    messages: list[Message] = [{"role": "system", "content": BRIEF}, *exchange(turn)[:-1]]
    return Case(task="brief answers", messages=messages, accepted=(turn.brief,))


def _named(rng: Random) -> Case:
    while True:
        system, turn = manners.named(rng)
        if held_out(turn.key):
            return Case(task=turn.task, messages=single(turn, system=system)[:-1], accepted=(turn.answer,))


def _introduced(rng: Random) -> Case:
    while True:
        told, asked = manners.introduced(rng)
        if held_out(told.key):
            between = draw(facts.fact, rng, evaluation=True)
            messages = [message for turn in (told, between, asked) for message in exchange(turn)]
            return Case(task=asked.task, messages=messages[:-1], accepted=(asked.answer,))
