"""The function that a tool call means, from its header and its arguments.

A header should read `functions.NAME:IDX`. In the wild the prefix or the index is missing or spelled otherwise, the name holds
colons or is in another case, or a bare UUID stands there; then the declared tools decide.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "functions."
_PREFIXES = re.compile(r"functions?[./_:]", re.IGNORECASE)
_INDEXED = re.compile(r"(?P<name>.+):(?P<index>[0-9]{1,9})")
_LOOSELY_INDEXED = re.compile(r"(?P<name>.+)[_./-](?P<index>[0-9]{1,9})")
_NAME = re.compile(r"[^\s<>{}\"]+")
# Ids that other APIs hand out; they name no function.
_OPAQUE = re.compile(
    r"(?:call|chatcmpl|toolu|fc)[_-].*|[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|[0-9a-f]{16,}|[0-9]+",
    re.IGNORECASE,
)
_CLOSE = 0.75  # of 1: how alike two names must be to be taken for one
_WRAPPINGS = ("arguments", "parameters", "input")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallMeaning:
    """What a call means.

    Args:
        name: the function.
        index: the number that the model gave the call; None when it gave none.
        arguments: those inside of the arguments, where the model wrote name and arguments there; None: as they stand.
    """

    name: str
    index: int | None = None
    arguments: Mapping[str, Any] | str | None = None


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
        self._by_letters: dict[str, list[str]] = {}
        for name in self._schemas:
            self._by_letters.setdefault(_letters(name), []).append(name)

    def __bool__(self) -> bool:
        return bool(self._schemas)

    @property
    def only(self) -> str | None:
        """The one function, where there is one."""
        return next(iter(self._schemas)) if len(self._schemas) == 1 else None

    def named(self, header: str) -> CallMeaning | None:
        """What a header means by itself; None where its arguments must decide."""
        header = header.strip().strip("`\"'")
        if not self._schemas:
            body, index = _split(header.removeprefix(PREFIX))
            return CallMeaning(name=body, index=index) if _is_name(body) else None
        forms = list(_forms(header))
        for name, index in forms:
            if name in self._schemas:
                return CallMeaning(name=name, index=index)
        begun = [name for text, _ in forms for name in self._schemas if text.startswith(f"{name}:")]
        if begun:
            return CallMeaning(name=max(begun, key=len))
        for text, index in forms:
            alike = self._by_letters.get(_letters(text), ())
            if len(alike) == 1 and not _OPAQUE.fullmatch(text):
                return CallMeaning(name=alike[0], index=index)
        return None

    def meant(self, header: str, arguments: Mapping[str, Any]) -> CallMeaning | None:
        """What a call means, or None when that cannot be told.

        Args:
            header: text between the call's begin and its arguments.
            arguments: the parsed arguments.
        """
        if (named := self.named(header)) is not None:
            return named
        if (wrapped := self._wrapped(arguments)) is not None:
            return wrapped
        prefix = _PREFIXES.match(header.strip())
        body, index = _split(header.strip()[prefix.end() if prefix is not None else 0 :])
        opaque = not _is_name(body)
        if opaque and self.only is not None:
            return CallMeaning(name=self.only)
        fitting = self._fitting(arguments) if arguments or opaque else []
        if len(fitting) == 1:
            return CallMeaning(name=fitting[0])
        if opaque:
            return None
        if (close := self._closest(body)) is not None:
            return CallMeaning(name=close, index=index)
        # A model may call what was not declared: the agent can tell it so.
        return CallMeaning(name=body, index=index)

    def _wrapped(self, arguments: Mapping[str, Any]) -> CallMeaning | None:
        """`{"name": ..., "arguments": {...}}` under a header that says nothing."""
        name = arguments.get("name")
        inner = [arguments[key] for key in _WRAPPINGS if key in arguments]
        if not isinstance(name, str) or len(inner) != 1 or not isinstance(inner[0], Mapping | str):
            return None
        named = self.named(name) if self._schemas else None
        return None if named is None else CallMeaning(name=named.name, index=named.index, arguments=inner[0])

    def _fitting(self, arguments: Mapping[str, Any]) -> list[str]:
        """Tools whose parameters take exactly these keys, all required ones among them."""
        fitting = []
        for name, schema in self._schemas.items():
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            required = schema.get("required") if isinstance(schema, Mapping) else None
            known = set(properties) if isinstance(properties, Mapping) else set()
            needed = {key for key in required if isinstance(key, str)} if isinstance(required, list) else set()
            if needed <= arguments.keys() <= known:
                fitting.append(name)
        return fitting

    def _closest(self, body: str) -> str | None:
        """The declared name that is most alike, if it is alike enough and no other is as much."""
        letters = _letters(body)
        ratios = sorted(
            ((difflib.SequenceMatcher(None, letters, _letters(name)).ratio(), name) for name in self._schemas),
            reverse=True,
        )
        if not ratios or ratios[0][0] < _CLOSE or (len(ratios) > 1 and ratios[1][0] == ratios[0][0]):
            return None
        return ratios[0][1]


def _forms(header: str) -> Iterator[tuple[str, int | None]]:
    """What may be the name in a header, and the index beside it: with and without prefix and index."""
    prefix = _PREFIXES.match(header)
    for text in (header[prefix.end() :] if prefix is not None else header, header):
        yield text, None
        for pattern in (_INDEXED, _LOOSELY_INDEXED):
            if (match := pattern.fullmatch(text)) is not None:
                yield match["name"], int(match["index"])


def _split(body: str) -> tuple[str, int | None]:
    match = _INDEXED.fullmatch(body)
    return (match["name"], int(match["index"])) if match is not None else (body, None)


def _is_name(text: str) -> bool:
    """Whether it has the form of a function's name, and not of another API's id."""
    return _NAME.fullmatch(text) is not None and _OPAQUE.fullmatch(text) is None


def _letters(name: str) -> str:
    """Letters and digits, in one case: what is left when separators are mixed up."""
    return "".join(char for char in name.casefold() if char.isalnum())
