"""What a request lets the model call, from `tools`, `tool_choice` and `parallel_tool_calls`; knows nothing of grammars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.serve.request.schemas import ChatRequest, Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """The tools to show the model, and whether it must, may or must not call one.

    Args:
        tools: OpenAI-shaped dicts, to show to the model; it may see tools that it must not call.
        mode: `required` also stands for a named function, which `name` holds.
        name: the one function that may be called.
        parallel: whether one answer may hold several calls.
    """

    tools: tuple[dict[str, Any], ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    name: str | None = None
    parallel: bool = True


def plan_tools(request: ChatRequest) -> ToolPlan:
    """Reads the three tool fields together.

    Raises:
        RequestError: a choice without tools, an unknown function, a name used twice.
        UnsupportedError: a choice of another kind than OpenAI's none, auto, required or a named function.
    """
    tools = request.tools or []
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools[{index}].function.name"
            raise RequestError(f"two tools have the name '{name}'", param=param)
    if request.parallel_tool_calls is not None and not tools:
        raise RequestError("'parallel_tool_calls' is only allowed with 'tools'", param="parallel_tool_calls")
    if not tools:
        if request.tool_choice not in (None, "none", "auto"):
            raise RequestError("'tool_choice' is only allowed with 'tools'", param="tool_choice")
        return ToolPlan()
    mode, chosen = _choice(request.tool_choice, names)
    return ToolPlan(
        tools=tuple(_declaration(tool) for tool in tools),
        mode=mode,
        name=chosen,
        parallel=request.parallel_tool_calls is not False,
    )


def _declaration(tool: Tool) -> dict[str, Any]:
    """The tool as the model reads it; `strict` is for the server, the model was never trained on it."""
    function = tool.function
    shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": tool.type, "function": {key: value for key, value in shown.items() if value is not None}}


def _choice(
    choice: str | dict[str, Any] | None, names: list[str]
) -> tuple[Literal["none", "auto", "required"], str | None]:
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise RequestError(
                "invalid 'tool_choice'",
                expected="'none', 'auto', 'required' or a function",
                found=repr(choice[:80]),
                param="tool_choice",
            )
        return choice, None  # type: ignore[return-value]  # one of the three literals, checked above
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
            expected=", ".join(names),
            found=name[:80],
            param="tool_choice",
        )
    return "required", name
