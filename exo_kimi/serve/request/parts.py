"""Content that agents send beside text: what is not text is named to the model in its place, and in the answer's warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exo_kimi.errors import RequestError


def left_out_part(kind: str, warnings: list[str]) -> str:
    """The text that stands for a part that this server cannot read: a history with it must stay usable.

    Args:
        kind: its type, as the client wrote it.
        warnings: gets one line for each type.
    """
    line = f"content of type '{kind[:40]}' was left out: this server does not read it"
    if line not in warnings:
        warnings.append(line)
    return f"[{kind[:40]}: left out, this server does not read it]"


def joined(parts: Sequence[str | Mapping[str, Any]], separator: str) -> str | list[dict[str, Any]]:
    """Texts and pictures of one message as its content: one text where there are no pictures, else parts in their order."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, str):
            found.append(dict(part))
        elif found and found[-1]["type"] == "text":
            found[-1]["text"] += separator + part
        else:
            found.append({"type": "text", "text": part})
    if not found:
        return ""
    return found[0]["text"] if len(found) == 1 and found[0]["type"] == "text" else found


def list_field(part: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """A list that a part may have; absent and null are empty.

    Raises:
        RequestError: it is something else.
    """
    found = part.get(name)
    if not isinstance(found, list | None):
        kind = type(found).__name__
        raise RequestError(f"'{where}.{name}' must be a list", found=kind, param=f"{where}.{name}", code="invalid_type")
    return found or []


def text_field(part: Mapping[str, Any], name: str, where: str) -> str:
    """A text that a part must have.

    Raises:
        RequestError: it has none.
    """
    text = part.get(name)
    if not isinstance(text, str):
        found = type(text).__name__
        raise RequestError(
            f"'{where}.{name}' must be a text", found=found, param=f"{where}.{name}", code="invalid_type"
        )
    return text
