"""A Messages request as a request of the dialogue: content blocks to messages, tools to functions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from exo_kimi.dialogue.request import ConversationRequest, SamplingOverrides, ToolChoice
from exo_kimi.errors import RequestError
from exo_kimi.serve.anthropic.request import CountRequest, MessagesRequest
from exo_kimi.serve.request.parts import joined, left_out_part, text_field
from exo_kimi.serve.request.schemas import TOOL_NAME

# Claude Code's first block of `system` is for Anthropic's accounts, and can differ in every request: no prompt would ever
# be found in a cache behind it.
_ACCOUNTING = "x-anthropic-billing-header:"
_CLIENT_TOOLS = (
    None,
    "custom",
)  # what has another type runs on Anthropic's servers, or has a schema that only they know


def conversation_of_messages(request: CountRequest) -> ConversationRequest:
    """A Messages request in the dialogue's terms; a request for a count has no options of the reply.

    Raises:
        RequestError: a message, block or tool that is malformed.
    """
    warnings = request.not_carried_out()
    messages = [*_system(request.system, warnings), *_messages(request.messages, warnings)]
    begun = _begun_reply(messages)
    tools = _tools(request.tools or (), warnings)
    choice = _choice(request.tool_choice, [tool["function"]["name"] for tool in tools])
    conversation = ConversationRequest(
        messages=tuple(messages[:-1] if begun is not None else messages),
        tools=tuple(tools),
        tool_choice=choice,
        thinking=request.thinks(),
        reasoning_budget=request.budget(),
        reasoning_effort=request.effort(warnings),
        keep_reasoning=request.keeps_thinking(),
        response_format=request.json_format() if choice.mode != "required" else None,
        begun_reply=begun,
        must_show_pictures=False,
        warnings=tuple(warnings),
    )
    if not isinstance(request, MessagesRequest):
        return conversation
    return replace(
        conversation, sampling=SamplingOverrides.of(request), max_tokens=request.max_tokens, stop=request.stops()
    )


def _system(system: str | list[Any] | None, warnings: list[str]) -> list[dict[str, Any]]:
    if isinstance(system, str):
        text = system
    else:
        blocks = [_block_text(block, f"system[{index}]", warnings) for index, block in enumerate(system or ())]
        text = "\n\n".join(block for block in blocks if not block.startswith(_ACCOUNTING))
    return [{"role": "system", "content": text}] if text else []


def _messages(messages: Sequence[Any], warnings: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"'{where}' is no message", expected="an object", param=where, code="invalid_type")
        match message.get("role"):
            case "user":
                found += _user(message.get("content"), f"{where}.content", warnings)
            case "assistant":
                found.append(_assistant(message.get("content"), f"{where}.content", warnings))
            case "system":
                text = _text(message.get("content"), f"{where}.content", warnings)
                found.append({"role": "system", "content": text})
            case other:
                raise RequestError(
                    f"invalid '{where}.role'",
                    expected="user or assistant",
                    found=repr(other)[:40],
                    param=f"{where}.role",
                )
    return found


def _blocks(content: object, where: str) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None:
        return []
    if not isinstance(content, list):
        found = type(content).__name__
        raise RequestError(f"'{where}' is neither text nor blocks", found=found, param=where, code="invalid_type")
    for index, block in enumerate(content):
        if not isinstance(block, Mapping):
            raise RequestError(
                f"'{where}[{index}]' is no block", expected="an object", param=f"{where}[{index}]", code="invalid_type"
            )
    return content


def _user(content: object, where: str, warnings: list[str]) -> list[dict[str, Any]]:
    """Results of tools first, for they follow their calls; then what the user says."""
    results: list[dict[str, Any]] = []
    said: list[str | Mapping[str, Any]] = []
    for index, block in enumerate(_blocks(content, where)):
        place = f"{where}[{index}]"
        if block.get("type") == "tool_result":
            results.append(_tool_result(block, place, warnings))
        else:
            said.append(_block(block, place, warnings))
    content = joined(said, "\n\n")
    return [*results, *([{"role": "user", "content": content}] if said or not results else [])]


def _tool_result(block: Mapping[str, Any], where: str, warnings: list[str]) -> dict[str, Any]:
    call_id = text_field(block, "tool_use_id", where)
    content = block.get("content")
    if not isinstance(content, str | list | None):
        content = json.dumps(content, ensure_ascii=False)  # history is never refused
    blocks = _blocks(content, f"{where}.content")
    parts = [_block(each, f"{where}.content[{index}]", warnings) for index, each in enumerate(blocks)]
    first = parts[0] if parts else ""
    if block.get("is_error") and not (isinstance(first, str) and "error" in first[:80].lower()):
        # Kimi's templates have no other word for it.
        parts = [f"Error: {first}", *parts[1:]] if isinstance(first, str) else ["Error:", *parts]
    return {"role": "tool", "tool_call_id": call_id, "content": joined(parts, "\n")}


def _assistant(content: object, where: str, warnings: list[str]) -> dict[str, Any]:
    said, thoughts, calls = [], [], []
    for index, block in enumerate(_blocks(content, where)):
        place = f"{where}[{index}]"
        match block.get("type"):
            case "thinking":
                thoughts.append(text_field(block, "thinking", place))
            case "redacted_thinking":
                pass  # nobody but Anthropic can read it
            case "tool_use":
                arguments = block.get("input")
                function = {
                    "name": text_field(block, "name", place),
                    "arguments": arguments
                    if isinstance(arguments, str)
                    else json.dumps(arguments or {}, ensure_ascii=False),
                }
                calls.append({"id": text_field(block, "id", place), "type": "function", "function": function})
            case _:
                said.append(_block_text(block, place, warnings))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(content: object, where: str, warnings: list[str]) -> str:
    blocks = _blocks(content, where)
    return "\n".join(_block_text(block, f"{where}[{index}]", warnings) for index, block in enumerate(blocks))


def _block(block: Mapping[str, Any], where: str, warnings: list[str]) -> str | Mapping[str, Any]:
    """A block as text, or as the picture that it is."""
    return block if block.get("type") == "image" else _block_text(block, where, warnings)


def _block_text(block: object, where: str, warnings: list[str]) -> str:
    """A block as text: its own, a document's, or a word for what cannot be read."""
    if not isinstance(block, Mapping):
        raise RequestError(f"'{where}' is no block", expected="an object", param=where, code="invalid_type")
    kind = block.get("type")
    if kind == "text":
        return text_field(block, "text", where)
    source = block.get("source")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") in ("text", "content"):
        inside = source.get("data") if source["type"] == "text" else source.get("content")
        title = block.get("title")
        heading = f"{title}\n\n" if isinstance(title, str) and title else ""
        return heading + (inside if isinstance(inside, str) else _text(inside, f"{where}.source.content", warnings))
    if kind == "search_result":
        parts = [block.get("title"), source, _text(block.get("content"), f"{where}.content", warnings)]
        return "\n".join(part for part in parts if isinstance(part, str) and part)
    if kind == "tool_reference":
        return f"[tool {block.get('tool_name')}]"
    return left_out_part(str(kind), warnings)


def _begun_reply(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The begin of the reply, where the last message is text of the assistant: the model goes on with it."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or last.get("tool_calls") or not last.get("content"):
        return None
    return str(last["content"])


def _tools(tools: Sequence[Any], warnings: list[str]) -> list[dict[str, Any]]:
    functions: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise RequestError(f"'{where}' is no tool", expected="an object", param=where, code="invalid_type")
        name, schema = tool.get("name"), tool.get("input_schema")
        if tool.get("type") not in _CLIENT_TOOLS and schema is None:
            warnings.append(f"the tool {str(tool.get('type'))[:60]!r} was left out: this server cannot run it")
            continue
        if not isinstance(name, str) or not re.fullmatch(TOOL_NAME, name):
            raise RequestError(f"invalid '{where}.name'", found=repr(name)[:80], param=f"{where}.name")
        if any(each["function"]["name"] == name for each in functions):
            raise RequestError(f"two tools have the name '{name}'", param=f"{where}.name")
        if not isinstance(schema, Mapping):
            param = f"{where}.input_schema"
            raise RequestError(f"'{param}' is no schema", expected="an object", param=param, code="invalid_type")
        function: dict[str, Any] = {"name": name, "parameters": dict(schema)}
        if isinstance(tool.get("description"), str):
            function["description"] = tool["description"]
        if tool.get("strict") is True:
            function["strict"] = True
        functions.append({"type": "function", "function": function})
    return functions


def _choice(choice: Mapping[str, Any] | None, names: Sequence[str]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = choice.get("disable_parallel_tool_use") is not True
    kind, name = choice.get("type"), choice.get("name")
    if kind in ("auto", "none"):
        return ToolChoice(mode=kind, parallel=parallel)
    if kind == "any" and names:
        return ToolChoice(mode="required", parallel=parallel)
    if kind == "tool" and name in names:
        return ToolChoice(mode="required", name=str(name), parallel=parallel)
    raise RequestError(
        "invalid 'tool_choice'",
        expected="auto, none, or any and tool with tools of this request" + (f": {', '.join(names)}" if names else ""),
        found=repr(dict(choice))[:120],
        param="tool_choice",
    )
