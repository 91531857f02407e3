"""The items of a Responses request as the messages of a conversation."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exo_kimi.errors import RequestError
from exo_kimi.serve.request.parts import joined, left_out_part, text_field
from exo_kimi.serve.responses.tools import CUSTOM_INPUT, declared_name

ENCRYPTED_PREFIX = "exo-kimi:"  # before reasoning that a client keeps for us: encoded, for it is the client's own
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}

Lookup = Callable[[str], Mapping[str, Any] | None]


def messages_of(items: str | Sequence[Any] | None, *, find: Lookup, warnings: list[str]) -> list[dict[str, Any]]:
    """OpenAI-shaped chat messages: reasoning, text and calls of one turn are one message of the assistant.

    Args:
        items: `input`; a text is a message of the user.
        find: an item by its id, for references to items that were answered before.
        warnings: gets what could not be read.

    Raises:
        RequestError: an item is malformed, or refers to one that is not kept.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    reader = _ItemReader(find, warnings)
    for index, item in enumerate(items or ()):
        reader.read(item, f"input[{index}]")
    return reader.messages


def encode_reasoning(text: str) -> str:
    """Reasoning as the opaque text that clients keep and send back."""
    return ENCRYPTED_PREFIX + base64.b64encode(text.encode()).decode()


def decode_reasoning(text: object) -> str:
    """The reasoning in what `encode_reasoning` made; nothing from another server's."""
    if not isinstance(text, str) or not text.startswith(ENCRYPTED_PREFIX):
        return ""
    try:
        return base64.b64decode(text.removeprefix(ENCRYPTED_PREFIX), validate=True).decode()
    except ValueError:
        return ""


class _ItemReader:
    def __init__(self, find: Lookup, warnings: list[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._find = find
        self._warnings = warnings

    def read(self, item: object, where: str) -> None:
        if not isinstance(item, Mapping):
            raise RequestError(f"'{where}' is no item", expected="an object", param=where, code="invalid_type")
        match item.get("type", "message" if "role" in item else "item_reference"):
            case "message":
                self._message(item, where)
            case "function_call":
                arguments = item.get("arguments")
                self._call(item, arguments if isinstance(arguments, str) else json.dumps(arguments or {}), where)
            case "custom_tool_call":
                text = json.dumps({CUSTOM_INPUT: item.get("input") or ""}, ensure_ascii=False)
                self._call(item, text, where)
            case "function_call_output" | "custom_tool_call_output":
                call_id = text_field(item, "call_id", where)
                output = self._content(item.get("output"), f"{where}.output")
                self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case "reasoning":
                self._reasoning(item, where)
            case "item_reference":
                self._reference(item, where)
            case other:
                line = f"items of type {str(other)[:40]!r} were left out of the conversation"
                if line not in self._warnings:
                    self._warnings.append(line)

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            found = repr(item.get("role"))[:40]
            raise RequestError(
                f"invalid '{where}.role'", expected=", ".join(_ROLES), found=found, param=f"{where}.role"
            )
        if role != "assistant":
            self.messages.append({"role": role, "content": self._content(item.get("content"), f"{where}.content")})
            return
        text = self._text(item.get("content"), f"{where}.content")
        turn = self._turn()
        turn["content"] += f"\n{text}" if turn["content"] and text else text

    def _call(self, item: Mapping[str, Any], arguments: str, where: str) -> None:
        name = declared_name(text_field(item, "name", where), item.get("namespace"))
        call_id = text_field(item, "call_id", where)
        function = {"name": name, "arguments": arguments}
        self._turn().setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def _reasoning(self, item: Mapping[str, Any], where: str) -> None:
        text = (
            self._text(item.get("content"), f"{where}.content")
            or decode_reasoning(item.get("encrypted_content"))
            or self._text(item.get("summary"), f"{where}.summary")
        )
        if text:
            turn = self._turn()
            if turn["content"] or "tool_calls" in turn:  # a reply begins with its reasoning
                turn = self._turn(fresh=True)
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def _reference(self, item: Mapping[str, Any], where: str) -> None:
        found = self._find(text_field(item, "id", where))
        if found is None:
            raise RequestError(
                f"'{where}' refers to an item that this server does not keep",
                found=str(item["id"])[:80],
                fix="send the item itself (`store: false` in most clients)",
                param=where,
                code="item_not_found",
            )
        self.read(found, where)

    def _turn(self, *, fresh: bool = False) -> dict[str, Any]:
        """The message of the assistant that is being gathered."""
        if fresh or not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]

    def _text(self, content: object, where: str) -> str:
        """Content as one text: history is never refused, so what is neither text nor parts is written as JSON."""
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            return json.dumps(content, ensure_ascii=False)
        return "".join(self._part(part, f"{where}[{index}]") for index, part in enumerate(content))

    def _content(self, content: object, where: str) -> str | list[dict[str, Any]]:
        """Content as one text, or as parts where there are pictures."""
        if not isinstance(content, list):
            return self._text(content, where)
        return joined(
            [
                part if _is_picture(part) else self._part(part, f"{where}[{index}]")
                for index, part in enumerate(content)
            ],
            "",
        )

    def _part(self, part: object, where: str) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping):
            raise RequestError(f"'{where}' is no content part", expected="an object", param=where, code="invalid_type")
        kind = str(part.get("type"))
        if kind in _TEXT_PARTS:
            return text_field(part, _TEXT_PARTS[kind], where)
        return left_out_part(kind, self._warnings)


def _is_picture(part: object) -> bool:
    """A picture that is in the request, or at an address; a file that was uploaded to another server is none."""
    return isinstance(part, Mapping) and part.get("type") == "input_image" and part.get("image_url") is not None
