"""Checks the messages of a chat request, and writes them as a chat template reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.serve.request.schemas import Message

# Fields that only one role may carry; `name` may be on any.
_ROLE_FIELDS = {
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "refusal": "assistant",
    "annotations": "assistant",
    "tool_call_id": "tool",
}


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI-shaped dicts for the template: `developer` becomes `system`, text parts become one string.

    Raises:
        RequestError: a field that the role does not have, or lacks; content that is not text.
        UnsupportedError: images, audio, files.
    """
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, Any]:
    for field, role in _ROLE_FIELDS.items():
        if getattr(message, field) and message.role != role:
            raise RequestError(
                f"'{where}.{field}' is only for the role '{role}'", found=message.role, param=f"{where}.{field}"
            )
    if message.role == "tool" and not message.tool_call_id:
        param = f"{where}.tool_call_id"
        raise RequestError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    text = _text(message.content, f"{where}.content")
    if text is None and message.refusal:
        text = message.refusal
    if text is None and not (message.role == "assistant" and (message.tool_calls or message.reasoning_content)):
        param = f"{where}.content"
        raise RequestError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")

    rendered: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.name:
        rendered["name"] = message.name
    if message.tool_call_id:
        rendered["tool_call_id"] = message.tool_call_id
    if message.reasoning_content:
        rendered["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        rendered["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    return rendered


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not content:
        raise RequestError(f"'{where}' is an empty list", expected="at least one part", param=where)
    return "".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind in ("image_url", "input_audio", "file"):
        raise UnsupportedError(
            f"content parts of type '{kind}' are not supported",
            expected="text",
            param=where,
            code="unsupported_content",
        )
    if kind not in ("text", "refusal"):
        found = repr(kind)[:40]
        raise RequestError(f"unknown type of content part: {found}", expected="text", param=f"{where}.type")
    text = part.get(kind)
    if not isinstance(text, str):
        raise RequestError(f"'{where}.{kind}' must be a text", found=type(text).__name__, param=f"{where}.{kind}")
    unknown = sorted(part.keys() - {"type", kind, "annotations", "prompt_cache_breakpoint"})
    if unknown:
        name = f"{where}.{unknown[0][:80]}"
        raise RequestError(f"unknown parameter: '{name}'", param=name, code="unknown_parameter")
    return text
