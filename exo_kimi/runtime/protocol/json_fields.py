"""Typed values out of untrusted JSON: each reader returns what its name says or raises ProtocolError; it knows no message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from exo_kimi.errors import ProtocolError

Value = TypeVar("Value")
MAX_INT = 2**63 - 1


def bad(what: str, *, expected: object, found: object) -> ProtocolError:
    """A ProtocolError about a frame; `found` is cut short, as it is a stranger's."""
    return ProtocolError(f"malformed frame: {what}", expected=expected, found=repr(found)[:200])


def member(body: Mapping[str, Any], name: str) -> Any:
    """A member that must be there."""
    if name not in body:
        raise bad("a member is missing", expected=name, found=sorted(body)[:20])
    return body[name]


def integer(value: object, name: str, *, low: int = 0, high: int = MAX_INT) -> int:
    """An int (not a bool) within bounds."""
    if type(value) is not int or not low <= value <= high:
        raise bad(name, expected=f"an integer from {low} to {high}", found=value)
    return value


def number(value: object, name: str) -> float:
    """A finite float; an int counts."""
    if type(value) not in (int, float):
        raise bad(name, expected="a number", found=value)
    try:
        result = float(value)  # type: ignore[arg-type]
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise bad(name, expected="a finite number", found=value)
    return result


def boolean(value: object, name: str) -> bool:
    """A bool."""
    if type(value) is not bool:
        raise bad(name, expected="true or false", found=value)
    return value


def text(value: object, name: str) -> str:
    """A str."""
    if type(value) is not str:
        raise bad(name, expected="a string", found=value)
    return value


def items(value: object, name: str, *, length: int | None = None) -> list[Any]:
    """A list, of a given length if one is given."""
    if type(value) is not list or (length is not None and len(value) != length):
        raise bad(name, expected="a list" if length is None else f"a list of {length}", found=value)
    return value


def integers(value: object, name: str) -> tuple[int, ...]:
    """A list of non-negative integers."""
    return tuple(integer(item, name) for item in items(value, name))


def mapping(value: object, name: str) -> dict[str, Any]:
    """An object."""
    if type(value) is not dict:
        raise bad(name, expected="an object", found=value)
    return value


def record(cls: type[Value], body: Mapping[str, Any]) -> Value:
    """A flat dataclass of int, float, bool, str, Literal fields and their optionals, from an object with those members.

    Raises:
        ProtocolError: a member is missing or of another type.
    """
    values = {name: _typed(member(body, name), name, annotation) for name, annotation in _annotations(cls).items()}
    return cls(**values)


def _annotations(cls: type[Any]) -> dict[str, Any]:
    known = _known_annotations.get(cls)
    if known is None:
        known = _known_annotations[cls] = get_type_hints(cls)
    return known


_known_annotations: dict[type[Any], dict[str, Any]] = {}  # resolving hints takes 50 us, a heartbeat deserves better


def _typed(value: object, name: str, annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        if type(value) is not str or value not in get_args(annotation):
            raise bad(name, expected=" or ".join(get_args(annotation)), found=value)
        return value
    if get_origin(annotation) is UnionType:
        if value is None:
            return None
        (annotation,) = (arg for arg in get_args(annotation) if arg is not type(None))
    reader = {int: integer, float: number, bool: boolean, str: text}[annotation]
    return reader(value, name)
