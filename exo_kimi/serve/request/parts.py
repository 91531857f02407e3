"""Content that agents send beside text: what is not text is named to the model in its place, and in the answer's warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exo_kimi.errors import RequestError


def left_out_part(kind: str, warnings: list[str]) -> str:
    """The text that stands for a part that this server cannot read: a history with it must stay usable.

    Args:
        kind: its type, as the client wrote it.
        warnings: gets one line for each type.
    """
    line = f"content of type '{kind[:40]}' was left out: this server reads text only"
    if line not in warnings:
        warnings.append(line)
    return f"[{kind[:40]}: left out, this server reads text only]"


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
