"""Tools, and questions that need one of them or none, made up by a seeded generator."""

from __future__ import annotations

from random import Random
from typing import Any

_CITIES = ("Oslo", "Rome", "Lima", "Hanoi", "Cairo", "Quito", "Delhi", "Perth")
_NAMES = ("Ada", "Ben", "Cleo", "Dana")
Call = tuple[str, dict[str, Any]]


def _tool(name: str, what: str, properties: dict[str, Any], *required: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


_TEXT = {"type": "string"}
_DATE = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}
TOOLS: tuple[dict[str, Any], ...] = (
    _tool(
        "get_weather",
        "The weather in a city now.",
        {"city": _TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "city",
    ),
    _tool(
        "find_trains",
        "Trains between two cities on a day.",
        {"from": _TEXT, "to": _TEXT, "day": _DATE, "seats": {"type": "integer", "minimum": 1, "maximum": 9}},
        "from",
        "to",
        "day",
    ),
    _tool(
        "send_mail",
        "Sends a mail.",
        {"to": {"type": "array", "items": _TEXT, "minItems": 1}, "subject": _TEXT, "body": _TEXT},
        "to",
        "subject",
        "body",
    ),
    _tool("read_file", "The text of a file.", {"path": _TEXT, "lines": {"type": "integer", "minimum": 1}}, "path"),
)


def needing(rng: Random) -> tuple[str, Call]:
    """A question that needs a tool, and the call that answers it."""
    city, other = rng.sample(_CITIES, 2)
    day = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    seats, name, lines = rng.randint(1, 4), rng.choice(_NAMES), rng.randint(2, 40)
    address, path = f"{name.lower()}@example.org", f"/tmp/{city.lower()}.txt"
    mail = {"to": [address], "subject": "Meeting", "body": f"The meeting on {day} is off."}
    return rng.choice(
        (
            (f"What is the weather in {city} right now?", ("get_weather", {"city": city})),
            (
                f"Find me a train from {city} to {other} on {day} for {seats} people.",
                ("find_trains", {"from": city, "to": other, "day": day, "seats": seats}),
            ),
            (f"Send a mail to {address}: the meeting on {day} is off.", ("send_mail", mail)),
            (f"Show me the first {lines} lines of {path}.", ("read_file", {"path": path, "lines": lines})),
        )
    )


def free(rng: Random) -> str:
    """A question that needs none."""
    return rng.choice(
        (
            f"What is {rng.randint(2, 99)} plus {rng.randint(2, 99)}? Answer with the number.",
            f"Write one sentence about the city of {rng.choice(_CITIES)}, without looking anything up.",
            f"Say hello to {rng.choice(_NAMES)}.",
            "Which is the larger animal, a cat or a horse?",
        )
    )
