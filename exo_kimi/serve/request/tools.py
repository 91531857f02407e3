"""What a request lets the model call, from `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

from typing import Any, get_args

from exo_kimi.dialogue.request import ToolChoice, ToolMode
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.serve.request.schemas import ChatRequest


def choose_tools(request: ChatRequest) -> ToolChoice:
    """Reads the three tool fields together.

    Raises:
        RequestError: a choice without tools, an unknown function, a name used twice.
        UnsupportedError: a choice of another kind than OpenAI's none, auto, required or a named function.
    """
    gained = [tool for message in request.messages for tool in message.tools or ()]
    tools = [*(request.tools or ()), *gained]
    names = [tool.function.name for tool in tools]
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            param = f"tools[{index}].function.name"
            raise RequestError(f"two tools have the name '{name}'", param=param)
        seen.add(name)
    if request.parallel_tool_calls is not None and not tools:
        raise RequestError("'parallel_tool_calls' is only allowed with 'tools'", param="parallel_tool_calls")
    if not tools:
        if request.tool_choice not in (None, "none", "auto"):
            raise RequestError("'tool_choice' is only allowed with 'tools'", param="tool_choice")
        return ToolChoice()
    mode, chosen = _choice(request.tool_choice, names)
    return ToolChoice(mode=mode, name=chosen, parallel=request.parallel_tool_calls is not False)


def _choice(choice: str | dict[str, Any] | None, names: list[str]) -> tuple[ToolMode, str | None]:
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        for mode in get_args(ToolMode):
            if choice == mode:
                return mode, None
        raise RequestError(
            "invalid 'tool_choice'",
            expected="'none', 'auto', 'required' or a function",
            found=repr(choice[:80]),
            param="tool_choice",
        )
    if choice.get("type") != "function":
        raise UnsupportedError(
            "'tool_choice' of this type is not supported",
            expected="'none', 'auto', 'required' or a function",
            found=repr(choice.get("type"))[:80],
            param="tool_choice",
            code="unsupported_value",
        )
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) and len(function) == 1 else None
    if not isinstance(name, str) or choice.keys() != {"type", "function"}:
        raise RequestError(
            "invalid 'tool_choice'", expected='{"type": "function", "function": {"name": ...}}', param="tool_choice"
        )
    if name not in names:
        raise RequestError(
            "'tool_choice' names a function that is not in 'tools'",
            expected=", ".join(names)[:1000],
            found=name[:80],
            param="tool_choice",
        )
    return "required", name
