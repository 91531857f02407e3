"""Checks the messages of a chat request, and writes them as a chat template reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exo_kimi.dialogue.pictures import PICTURE_KINDS
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
    """OpenAI-shaped dicts for the dialogue: `developer` becomes `system`; parts become one text unless there are pictures.

    Raises:
        RequestError: a field that the role does not have, or lacks; content that is not text.
        UnsupportedError: audio, films, files.
    """
    for index, message in enumerate(messages[:-1]):
        if message.partial:
            where = f"messages[{index}].partial"
            raise RequestError(f"'{where}' is only for the last message", param=where)
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
    if message.partial and (message.role != "assistant" or message.tool_calls):
        raise RequestError(
            f"'{where}.partial' is only for a message of the role 'assistant' without tool calls",
            found=message.role,
            param=f"{where}.partial",
        )
    text = _content(message.content, f"{where}.content")
    if message.partial and isinstance(text, list):
        raise RequestError(f"'{where}' cannot be gone on with: its content is not text", param=f"{where}.content")
    if message.tools:
        return _gained_tools(message, text, where)
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


def _gained_tools(message: Message, text: str | list[dict[str, Any]] | None, where: str) -> dict[str, Any]:
    """Tools that the conversation gains here: a system message with nothing else."""
    if message.role not in ("system", "developer") or text:
        raise RequestError(
            f"'{where}.tools' is only for a message of the role 'system' without content",
            found=message.role if message.role != "system" else "content",
            param=f"{where}.tools",
        )
    tools = [tool.model_dump(exclude_none=True) for tool in message.tools or ()]
    return {"role": "system", "content": "", "tools": tools}


def _content(content: str | list[dict[str, Any]] | None, where: str) -> str | list[dict[str, Any]] | None:
    if content is None or isinstance(content, str):
        return content
    if not content:
        raise RequestError(f"'{where}' is an empty list", expected="at least one part", param=where)
    if any(part.get("type") in PICTURE_KINDS for part in content):
        return [
            part
            if part.get("type") in PICTURE_KINDS
            else {"type": "text", "text": _part_text(part, f"{where}[{index}]")}
            for index, part in enumerate(content)
        ]
    return "".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind in ("input_audio", "audio_url", "video_url", "file"):
        raise UnsupportedError(
            f"content parts of type '{kind}' are not supported",
            expected="text, or a picture (image_url)",
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
