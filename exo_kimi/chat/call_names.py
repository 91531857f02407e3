"""The function that a tool call means, from its header and its arguments.

A header should read `functions.NAME:IDX`. In the wild the prefix or the index is missing, the name holds colons, or a bare
UUID stands there; then the declared tools decide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

PREFIX = "functions."
_INDEXED = re.compile(r"(?P<name>.+):(?P<index>[0-9]{1,9})")
_NAME = re.compile(r"[^\s<>{}\"]+")
# Ids that other APIs hand out; they name no function.
_OPAQUE = re.compile(
    r"(?:call|chatcmpl|toolu|fc)[_-].*|[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|[0-9a-f]{16,}|[0-9]+",
    re.IGNORECASE,
)


class DeclaredTools:
    """The functions that a request declared.

    Args:
        tools: OpenAI-shaped function tools; none when they are not known.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        functions = [tool.get("function") for tool in tools]
        self._schemas: dict[str, Any] = {
            function["name"]: function.get("parameters")
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }

    def resolve(self, header: str, arguments: Mapping[str, Any]) -> tuple[str, int | None] | None:
        """The function's name and the index that the model gave the call, or None when it cannot be told.

        Args:
            header: text between the call's begin and its arguments, stripped.
            arguments: the parsed arguments.
        """
        body = header.removeprefix(PREFIX)
        match = _INDEXED.fullmatch(body)
        if match is not None and body not in self._schemas and self._is_name(match["name"]):
            return match["name"], int(match["index"])
        if body in self._schemas:
            return body, None
        begun = [name for name in self._schemas if body.startswith(f"{name}:")]
        if begun:
            return max(begun, key=len), None
        if (header != body or not self._schemas) and self._is_name(body):
            return body, None
        fitting = list(self._schemas) if len(self._schemas) == 1 else self._fitting(arguments)
        return (fitting[0], None) if len(fitting) == 1 else None

    def _is_name(self, text: str) -> bool:
        """Whether it is declared, or at least has the form of a name: a model may call what was not declared."""
        return text in self._schemas or (_NAME.fullmatch(text) is not None and _OPAQUE.fullmatch(text) is None)

    def _fitting(self, arguments: Mapping[str, Any]) -> list[str]:
        """Tools whose parameters take exactly these keys, all required ones among them."""
        fitting = []
        for name, schema in self._schemas.items():
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            required = schema.get("required") if isinstance(schema, Mapping) else None
            known = set(properties) if isinstance(properties, Mapping) else set()
            needed = set(required) if isinstance(required, list) else set()
            if needed <= arguments.keys() <= known:
                fitting.append(name)
        return fitting


def parse_arguments(text: str) -> tuple[dict[str, Any], str] | None:
    """Parse a call's arguments: as an object and as strict JSON text, or None when they are no object.

    An empty text is an empty object. The model's own text is kept when it is strict JSON; raw line ends inside strings are
    escaped, and an object written as a JSON string is unwrapped.
    """
    text = text.strip()
    if text in ("", "null"):
        return {}, "{}"
    try:
        value = _loads(text, strict=True)
    except (ValueError, RecursionError):
        try:
            value = _loads(text, strict=False)
            text = json.dumps(value, ensure_ascii=False)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return parse_arguments(value)
    return (value, text) if isinstance(value, dict) else None


def _loads(text: str, *, strict: bool) -> Any:
    return json.loads(text, strict=strict, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
