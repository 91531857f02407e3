"""The tools of a Responses request as functions of a dialogue, and the way back from a call to the tool it means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from exo_kimi.dialogue.request import ToolChoice
from exo_kimi.errors import RequestError
from exo_kimi.serve.request.parts import list_field
from exo_kimi.serve.request.schemas import TOOL_NAME

CUSTOM_INPUT = "input"  # the one argument of a custom tool
_MODES: Mapping[str, Literal["none", "auto", "required"]] = {"none": "none", "auto": "auto", "required": "required"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedTool:
    """A tool as its client knows it.

    Args:
        kind: `custom` tools take free text, which the model writes as one argument.
        name: in its namespace.
        namespace: None for a tool of its own.
    """

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None

    @property
    def declared(self) -> str:
        """Its name for the model."""
        return declared_name(self.name, self.namespace)


def declared_name(name: str, namespace: object = None) -> str:
    """One name for a tool of a namespace."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name


@dataclass(slots=True, kw_only=True)
class ToolBox:
    """What the model may call.

    Args:
        functions: OpenAI-shaped, for the dialogue.
        offered: the client's tools by their declared names.
        warnings: tools that were left out.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    offered: dict[str, OfferedTool] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tools: Sequence[Any]) -> ToolBox:
        """From `tools`; kinds that only OpenAI's own servers can run are left out and named.

        Raises:
            RequestError: a tool without a usable name or parameters, or two of one name.
        """
        box = cls()
        for index, tool in enumerate(tools):
            box._add(tool, f"tools[{index}]", None)
        return box

    def tool_of(self, declared: str) -> OfferedTool:
        """The tool that a call means; one that was not declared is a function of that name."""
        return self.offered.get(declared) or OfferedTool(kind="function", name=declared)

    def choose(self, choice: str | Mapping[str, Any] | None, *, parallel: bool) -> ToolChoice:
        """`tool_choice`; a choice among several tools leaves the others out.

        Raises:
            RequestError: it names no tool of this request, or is none of OpenAI's forms.
        """
        if choice is None or not self.functions:
            wanted = choice if isinstance(choice, str) else None
            if wanted in (None, "auto", "none"):
                return ToolChoice(parallel=parallel)
            raise _wrong_choice(choice, self.offered)
        if isinstance(choice, str):
            if choice not in _MODES:
                raise _wrong_choice(choice, self.offered)
            return ToolChoice(mode=_MODES[choice], parallel=parallel)
        if choice.get("type") == "allowed_tools":
            self._keep_only(self._named(choice.get("tools"), choice))
            return self.choose(str(choice.get("mode", "auto")), parallel=parallel)
        name = self._named([choice], choice)[0]
        return ToolChoice(mode="required", name=name, parallel=parallel)

    def _add(self, tool: object, where: str, namespace: str | None) -> None:
        if not isinstance(tool, Mapping):
            raise RequestError(f"'{where}' is no tool", expected="an object", param=where, code="invalid_type")
        kind = tool.get("type")
        if kind == "namespace" and namespace is None:
            for index, each in enumerate(list_field(tool, "tools", where)):
                self._add(each, f"{where}.tools[{index}]", str(tool.get("name") or "") or None)
            return
        if kind not in ("function", "custom"):
            self.warnings.append(f"the tool {str(kind)[:40]!r} was left out: this server cannot run it")
            return
        # Chat completions' nested form is read, too: clients mix them up.
        nested = tool.get(str(kind))
        source = nested if isinstance(nested, Mapping) else tool
        name = source.get("name")
        declared = declared_name(name, namespace) if isinstance(name, str) else ""
        if not re.fullmatch(TOOL_NAME, declared):
            raise RequestError(f"invalid '{where}.name'", found=repr(name)[:80], param=f"{where}.name")
        if declared in self.offered:
            raise RequestError(f"two tools have the name '{declared}'", param=f"{where}.name")
        parameters = _custom_parameters() if kind == "custom" else source.get("parameters")
        if not isinstance(parameters, Mapping | None):
            param = f"{where}.parameters"
            raise RequestError(f"'{param}' is no schema", expected="an object", param=param, code="invalid_type")
        description = _custom_description(source) if kind == "custom" else source.get("description")
        function = {"name": declared, "description": description, "parameters": parameters}
        function = {key: value for key, value in function.items() if value is not None}
        if source.get("strict") is True:
            function["strict"] = True
        self.offered[declared] = OfferedTool(kind=kind, name=str(name), namespace=namespace)
        self.functions.append({"type": "function", "function": function})

    def _named(self, tools: object, choice: object) -> list[str]:
        """Declared names of the tools that a choice lists; those of OpenAI's own servers have no name."""
        names = []
        for tool in tools if isinstance(tools, list) else ():
            name = tool.get("name") if isinstance(tool, Mapping) else None
            if isinstance(tool, Mapping) and name is None:
                continue
            declared = declared_name(name, tool.get("namespace")) if isinstance(name, str) else ""
            if declared not in self.offered:
                raise _wrong_choice(choice, self.offered)
            names.append(declared)
        if not names:
            raise _wrong_choice(choice, self.offered)
        return names

    def _keep_only(self, names: Sequence[str]) -> None:
        self.functions = [tool for tool in self.functions if tool["function"]["name"] in names]


def _custom_parameters() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {CUSTOM_INPUT: {"type": "string", "description": "The whole input, as free text."}},
        "required": [CUSTOM_INPUT],
        "additionalProperties": False,
    }


def _custom_description(tool: Mapping[str, Any]) -> str | None:
    form = tool.get("format")
    parts = [tool.get("description")]
    if isinstance(form, Mapping) and form.get("type") == "grammar" and isinstance(form.get("definition"), str):
        parts.append(f"The input follows this {form.get('syntax', '')} grammar:\n{form['definition']}")
    return "\n\n".join(part for part in parts if isinstance(part, str) and part) or None


def _wrong_choice(choice: object, offered: Mapping[str, OfferedTool]) -> RequestError:
    return RequestError(
        "invalid 'tool_choice'",
        expected="'none', 'auto', 'required', or tools of this request"
        + (f": {', '.join(offered)}" if offered else ""),
        found=repr(choice)[:120],
        param="tool_choice",
    )
