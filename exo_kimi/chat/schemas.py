"""JSON schemas as rules of a grammar: what can be enforced is, and the rest is refused or named.

Between two tokens of JSON a grammar allows one space, one line end, or nothing: a weak model that may write blanks writes as
many as it may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from exo_kimi.errors import RequestError

_STYLE = {"whitespace_pattern": r"[\x20\x0A]?"}
_ANY_OBJECT = {"type": "object"}
_MAX_REASON_CHARS = 160


def json_rule(schema: object, *, param: str, passed_over: list[str] | None) -> str:
    """The rule `%json {...}` of a schema, which compiles.

    Args:
        schema: a JSON schema.
        param: the request field to blame.
        passed_over: gets a sentence for what of the schema is not enforced; None refuses such a schema.

    Raises:
        RequestError: it is no JSON schema, or uses a keyword that cannot be enforced and may not be passed over.
    """
    if not isinstance(schema, Mapping | bool):
        raise RequestError("the JSON schema is no object", param=param, found=type(schema).__name__)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    try:
        plain = _without_ids(schema)
        rule, problem, _ = _compiled(plain, lenient=False)
        if problem and passed_over is not None:
            return _relaxed(plain, param, problem, passed_over)
    except (ValueError, TypeError, RecursionError) as error:
        raise bad_schema(param, error) from error
    if problem:
        raise bad_schema(param, problem)
    return rule


def bad_schema(param: str, reason: object) -> RequestError:
    """The error of a schema that cannot be enforced."""
    return RequestError(
        "the JSON schema cannot be enforced",
        param=param,
        found=_short(reason),
        code="invalid_schema",
        fix="leave the keyword out, or do without the constraint",
    )


def _relaxed(schema: Mapping[str, Any], param: str, problem: str, passed_over: list[str]) -> str:
    """The rule of as much of a schema as can be enforced."""
    for lenient_schema in (schema, _without_wild_patterns(schema)):
        rule, worse, warnings = _compiled(lenient_schema, lenient=True)
        if not worse:
            reasons = warnings or [problem]
            passed_over.append(f"'{param}' is not enforced in full: {'; '.join(map(_short, reasons))}")
            return rule
    if param.startswith("response_format"):
        raise bad_schema(param, worse)
    passed_over.append(f"'{param}' is not enforced: {_short(worse)}")
    return _compiled(_ANY_OBJECT, lenient=True)[0]


def _compiled(schema: Mapping[str, Any], *, lenient: bool) -> tuple[str, str, list[str]]:
    """The rule of a schema, why it does not compile (empty: it does), and what it passes over."""
    style = {**_STYLE, "lenient": lenient}
    rule = f"%json {json.dumps({**schema, 'x-guidance': style})}"
    failed, messages = _validated(LLMatcher.grammar_from_lark(f"start: {rule}"))
    return (rule, "\n".join(messages) or "it does not compile", []) if failed else (rule, "", list(messages))


def _validated(grammar: str) -> tuple[bool, list[str]]:
    try:
        found: tuple[bool, list[str]] = LLMatcher.validate_grammar_with_warnings(grammar)
        return found
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception and can be imported from nowhere
            raise
        return True, [f"llguidance fails on it: {error}"]


def _without_ids(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema whose names for itself are gone, where nothing refers to them: then they have no effect."""
    text = json.dumps(schema, allow_nan=False)
    if '"$id"' not in text:
        return schema
    references = [value for value in _values_of(schema, "$ref") if isinstance(value, str)]
    if any(not reference.startswith("#") for reference in references):
        return schema
    found: Mapping[str, Any] = _mapped(
        schema, lambda each: {key: value for key, value in each.items() if key != "$id" or not isinstance(value, str)}
    )
    return found


def _without_wild_patterns(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema without the regular expressions that the grammar's engine does not have (look-around, back-references)."""

    def tame(each: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in each.items() if key != "pattern" or _is_pattern(value)}
        named = kept.get("patternProperties")
        if isinstance(named, Mapping):
            kept["patternProperties"] = {key: value for key, value in named.items() if _is_pattern(key)}
        return kept

    found: Mapping[str, Any] = _mapped(schema, tame)
    return found


def _is_pattern(value: object) -> bool:
    if isinstance(value, Mapping):
        return True  # a property of the name `pattern`
    return not _compiled({"type": "string", "pattern": value}, lenient=False)[1]


def _mapped(value: Any, change: Any) -> Any:
    """A copy of a schema with each of its objects changed, those inside first. Constants stay as they are."""
    if isinstance(value, Mapping):
        return change(
            {key: item if key in ("const", "enum", "default") else _mapped(item, change) for key, item in value.items()}
        )
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _values_of(value: Any, key: str) -> list[Any]:
    if isinstance(value, Mapping):
        own = [value[key]] if key in value else []
        return own + [found for item in value.values() for found in _values_of(item, key)]
    return [found for item in value for found in _values_of(item, key)] if isinstance(value, list) else []


def _short(reason: object) -> str:
    """The first lines of a message, without the place in our own grammar and without our own additions."""
    text = " ".join(str(reason).split()).split(" 1 | start:")[0].removeprefix("at 1(8): ")
    text = text.removeprefix("failed to compile JSON schema: ")
    return text[: _MAX_REASON_CHARS - 1] + "…" if len(text) > _MAX_REASON_CHARS else text
