"""Three tools, requests for them, and what they return: a calculator, a clock, a weather table.

A request is answered in two turns of the model: the call, and the answer once the result is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from exo_kimi.train.tasks.facts import table
from exo_kimi.train.tasks.turn import held_out

_SKIES = "sunny cloudy rain snow wind fog".split()
_WEATHER_WAYS = (
    "What is the weather in {}?",
    "How is the weather in {}?",
    "Tell me the weather in {}.",
    "What is the weather like in {} today?",
    "Is it warm in {}?",
)
_CLOCK_WAYS = ("What time is it in {}?", "Tell me the time in {}.", "What is the time in {}?", "How late is it in {}?")
_SUM_WAYS = ("What is {}?", "Calculate {}.", "{} = ?", "How much is {}?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A question that needs a tool.

    Args:
        tool: the name of the function to call.
        arguments: the call's arguments.
        result: what the tool returns, as text.
        answer: what the assistant says then.
        used: what of the result must appear in the answer.
        key: decides the split, see `turn.held_out`.
    """

    tool: str
    key: str
    question: str
    arguments: dict[str, str]
    result: str
    answer: str
    used: tuple[str, ...]


def declaration(name: str, description: str, argument: str) -> dict[str, Any]:
    """A function of one string, OpenAI-shaped."""
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "calculator": declaration("calculator", "Computes a sum.", "expression"),
    "get_time": declaration("get_time", "The time in a city.", "city"),
    "get_weather": declaration("get_weather", "The weather in a city.", "city"),
}


def calculation(rng: Random) -> Request:
    """Numbers that are too large for the head."""
    sign = rng.choice("+-*")
    a, b = (
        (rng.randint(100, 9999), rng.randint(100, 9999)) if sign != "*" else (rng.randint(13, 999), rng.randint(13, 99))
    )
    if sign == "-":
        b, a = sorted((a, b))
    expression = f"{a} {sign} {b}"
    result = str({"+": a + b, "-": a - b, "*": a * b}[sign])
    return Request(
        tool="calculator",
        key=expression,
        question=rng.choice(_SUM_WAYS).format(expression),
        arguments={"expression": expression},
        result=result,
        answer=f"{expression} = {result}.",
        used=(result,),
    )


def clock(rng: Random) -> Request:
    """The time in a city."""
    city, number = _city(rng), rng.randrange(len(_CLOCK_WAYS))
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return Request(
        tool="get_time",
        key=f"time {number} {city}",
        question=_CLOCK_WAYS[number].format(city),
        arguments={"city": city},
        result=time,
        answer=f"It is {time} in {city}.",
        used=(time,),
    )


def weather(rng: Random) -> Request:
    """The weather in a city."""
    city, number = _city(rng), rng.randrange(len(_WEATHER_WAYS))
    sky, degrees = rng.choice(_SKIES), rng.randint(-9, 35)
    return Request(
        tool="get_weather",
        key=f"weather {number} {city}",
        question=_WEATHER_WAYS[number].format(city),
        arguments={"city": city},
        result=json.dumps({"sky": sky, "degrees": degrees}),
        answer=f"In {city} it is {degrees} degrees, {sky}.",
        used=(sky, str(degrees)),
    )


REQUESTS = (calculation, clock, weather)


def request(rng: Random, names: tuple[str, ...], *, evaluation: bool) -> Request:
    """A request from one side of the split, for one of the declared tools."""
    while True:
        made = rng.choice(REQUESTS)(rng)
        if made.tool in names and held_out(made.key) is evaluation:
            return made


def _city(rng: Random) -> str:
    return rng.choice(list(table()["capital"].values()))
