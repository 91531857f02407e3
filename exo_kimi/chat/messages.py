"""OpenAI-shaped messages as the dicts that Kimi's chat templates read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exo_kimi.errors import RequestError, UnsupportedError

_TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


PICTURE: Mapping[str, Any] = {"type": "image_url", "image_url": {"url": ""}}
"""Stands for a picture, in the form that every published template knows; what is shown is not the template's to see."""


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and copy them in the form that templates read.

    In the copy no value is None (templates would print it), content is a string or a list of text parts, and OpenAI's newer
    names are the older ones (`developer` is `system`, `reasoning` is `reasoning_content`).

    Raises:
        RequestError: a message is malformed.
        UnsupportedError: a content part is neither text nor `PICTURE`.
    """
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{param} is no message", param=param, expected="an object with a role")
    kept = {key: value for key, value in message.items() if value is not None}
    if kept["role"] == "developer":
        kept["role"] = "system"
    if "reasoning" in kept:
        kept.setdefault("reasoning_content", kept.pop("reasoning"))
    if not kept.get("tool_calls", True):
        del kept["tool_calls"]
    for field in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(kept.get(field, ""), str):
            raise RequestError(f"{param}.{field} is no string", param=f"{param}.{field}", code="invalid_type")
    kept["content"] = _content(kept.get("content", ""), f"{param}.content")
    return kept


def _content(content: object, param: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{param} is neither text nor a list of parts",
            param=param,
            found=type(content).__name__,
            code="invalid_type",
        )
    return [_part(part, f"{param}[{index}]") for index, part in enumerate(content)]


def _part(part: object, param: str) -> dict[str, Any]:
    if part == PICTURE:
        return dict(PICTURE)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise RequestError(f"{param} is no content part", param=param, expected="an object with a type")
    if kind not in _TEXT_FIELDS:
        raise UnsupportedError(
            f"{param} is of type {kind}, which this server does not read", param=param, code="unsupported_content_part"
        )
    text = part.get(_TEXT_FIELDS[kind])
    if not isinstance(text, str):
        raise RequestError(f"{param} has no text", param=param, code="invalid_type")
    return {"type": "text", "text": text}
