"""Declarations of tools as TypeScript, the form that K2.5 and later were trained on.

The checkpoint's own tokenizer class computes this text and hands it to the template as `tools_ts_str`; no code from a checkpoint
is ever run, so the text is computed here.

Source: the output format of `tool_declaration_ts.py` beside moonshotai/Kimi-K2.5's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INDENT = "  "
_SCALAR_LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION_NAMES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}


class Undeclarable(ValueError):
    """A schema that has no TypeScript form; the template then falls back to JSON, as the original does."""


def sorted_deep(value: Any) -> Any:
    """The same JSON value with the keys of every object in order, as the original tokenizer prepares tools."""
    if isinstance(value, Mapping):
        return {key: sorted_deep(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [sorted_deep(item) for item in value]
    return value


def declare_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The declaration of OpenAI tools (`{"type": "function", "function": {...}}`); empty when there is no function.

    Raises:
        Undeclarable: a schema uses what the format cannot say.
    """
    functions = [tool["function"] for tool in tools if tool.get("type") == "function" and tool.get("function")]
    if not functions:
        return ""
    declared = "\n".join(_Function(function).declare() for function in functions)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{declared}\n}}\n"


class _Function:
    """One function with the `$defs` of its parameters, which become interfaces."""

    def __init__(self, function: Mapping[str, Any]) -> None:
        self._function = function
        self._definitions: dict[str, Any] = {}
        self._refers_to_itself = False

    def declare(self) -> str:
        parameters = self._function.get("parameters") or {}
        # Types are spelled before the interfaces are listed: spelling registers the definitions it meets.
        spelled = self._object(parameters, "")
        interfaces: list[str] = []
        if self._refers_to_itself:
            interfaces.append(f"interface parameters {self._object(parameters, '', in_order=True)}")
            spelled = "parameters"
        for name, schema in list(self._definitions.items()):
            if not isinstance(schema, Mapping):
                raise Undeclarable(f"a definition that is no object: {schema!r}")
            comment = _comment(schema.get("description", ""), "")
            interfaces.append(f"{comment}interface {name} {self._type(schema, '')}")
        name = self._function.get("name", "function")
        lines = ["\n".join(interfaces), _comment(self._function.get("description") or "", "").rstrip("\n")]
        return "\n".join([*filter(None, lines), f"type {name} = (_: {spelled}) => any;"])

    def _type(self, schema: Any, indent: str) -> str:
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if not isinstance(schema, Mapping):
            raise Undeclarable(f"no JSON schema: {schema!r}")
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join(self._type(option, indent) for option in schema["anyOf"])
        if "enum" in schema:
            return _enum(schema)
        kind = schema.get("type")
        if isinstance(kind, list):
            return " | ".join(_union_name(name) for name in kind)
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema, indent)
        if kind is None and schema:
            raise Undeclarable(f"a schema with neither type, enum, anyOf nor $ref: {schema!r}")
        return {None: "any", "integer": "number"}.get(kind, str(kind))

    def _reference(self, target: Any) -> str:
        if target == "#":
            self._refers_to_itself = True
            return "parameters"
        name = str(target).removeprefix("#/$defs/")
        if name == target or name.split("/")[-1] not in self._definitions:
            raise Undeclarable(f"a reference to {target!r}")
        return name.split("/")[-1]

    def _array(self, schema: Mapping[str, Any], indent: str) -> str:
        items = schema.get("items")
        if not items:
            return "Array<any>"
        inner = indent + _INDENT
        comment = _schema_comment(items, inner)
        if not comment:
            return f"Array<{self._type(items, indent)}>"
        return f"Array<\n{comment}{inner}{self._type(items, inner)}\n{indent}>"

    def _object(self, schema: Mapping[str, Any], indent: str, *, in_order: bool = False) -> str:
        if not isinstance(schema, Mapping):
            raise Undeclarable(f"no JSON schema: {schema!r}")
        self._definitions.update(schema.get("$defs") or {})
        inner = indent + _INDENT
        properties = schema.get("properties") or {}
        required = set(schema.get("required") or ())
        # Required ones first, each group by name; the original keeps file order where the object refers to itself.
        names = list(properties) if in_order else sorted(properties, key=lambda name: (name not in required, name))
        fields = [self._field(name, properties[name], name not in required, inner) for name in names]
        extra = schema.get("additionalProperties")
        if extra is not None and not in_order:
            spelled = {True: "any", False: "never"}[extra] if isinstance(extra, bool) else self._type(extra, inner)
            fields.append(f"{inner}[k: string]: {spelled}")
        if not fields:
            return "{}"
        return "{\n" + ",\n".join(fields) + f"\n{indent}}}"

    def _field(self, name: str, schema: Any, optional: bool, indent: str) -> str:
        comment = _schema_comment(schema, indent)
        default = schema.get("default") if isinstance(schema, Mapping) else None
        if default is not None:
            spelled = repr(default) if isinstance(default, int | float) else json.dumps(default, ensure_ascii=False)
            comment += f"{indent}// Default: {spelled}\n"
        return f"{comment}{indent}{name}{'?' if optional else ''}: {self._type(schema, indent)}"


def _schema_comment(schema: Any, indent: str) -> str:
    """Description and limits, as comment lines."""
    if not isinstance(schema, Mapping):
        return ""
    comment = _comment(schema.get("description", ""), indent)
    plain = not any(key in schema for key in ("$ref", "anyOf", "enum"))
    kind = schema.get("type")
    limits = _SCALAR_LIMITS.get(kind, ()) if plain and isinstance(kind, str) else ()
    stated = ", ".join(f"{key}: {schema[key]}" for key in limits if key in schema)
    return comment + (f"{indent}// {stated}\n" if stated else "")


def _comment(description: str, indent: str) -> str:
    if not description:
        return ""
    return "\n".join(f"{indent}// {line}" if line else "" for line in description.split("\n")) + "\n"


def _enum(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type")
    if isinstance(kinds, str):
        kinds = [kinds]
    allowed: dict[str, type | tuple[type, ...]] = {
        "string": str,
        "number": (int, float),
        "integer": int,
        "boolean": bool,
    }
    named = [kind for kind in kinds or () if kind != "null"]
    if len(named) > 1:
        raise Undeclarable(f"an enum of several types: {kinds!r}")
    for value in schema["enum"]:
        if named and value is not None and named[0] in allowed and not isinstance(value, allowed[named[0]]):
            raise Undeclarable(f"an enum value that is no {named[0]}: {value!r}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])


def _union_name(name: str) -> str:
    if name not in _UNION_NAMES:
        raise Undeclarable(f"an unknown type: {name!r}")
    return _UNION_NAMES[name]
