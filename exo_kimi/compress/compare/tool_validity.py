"""Whether a tool call is one that a program could carry out: declared, JSON, and as its schema says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator


def call_problem(name: str, arguments: str, tools: Sequence[Any]) -> str | None:
    """What is wrong with a call; None for a valid one.

    Args:
        name: of the function.
        arguments: JSON.
        tools: declared, OpenAI-shaped.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if name not in schemas:
        return f"{name} is not declared"
    try:
        value = json.loads(arguments)
    except ValueError as error:
        return f"{name}: arguments are no JSON ({error}): {arguments[:120]}"
    first = next(iter(Draft202012Validator(schemas[name]).iter_errors(value)), None)
    return None if first is None else f"{name}: {first.message}"
