"""Constrained decoding: the tokens that may come next, so that a reply is JSON or a tool call.

JSON schemas and Kimi's tool-call format are compiled to llguidance grammars. A constraint follows one request: `mask()` gives
the allowed tokens, `accept()` advances by the token that was sampled. Reasoning comes first where the prompt allows it, and is
free: only control tokens other than `</think>` are barred from it, so that it cannot end the reply.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from exo_kimi.chat.call_names import PREFIX
from exo_kimi.chat.family import THINK_CLOSE, THINK_OPEN
from exo_kimi.chat.template import ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.chat.tool_calls import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, TOOL_MARKERS
from exo_kimi.errors import ChatError, RequestError, UnsupportedError

SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
# Unbounded blanks between JSON tokens let a model write blanks for ever; this still allows readable indentation.
_JSON_STYLE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}

_tokenizers: weakref.WeakKeyDictionary[KimiTokenizer, dict[int, LLTokenizer]] = weakref.WeakKeyDictionary()
_tokenizers_lock = threading.Lock()


def grammar_tokenizer(tokenizer: KimiTokenizer, vocab_size: int | None = None) -> LLTokenizer:
    """llguidance's view of a tokenizer; built once per tokenizer and vocabulary size (about a second for the real one).

    Args:
        tokenizer: Kimi's.
        vocab_size: rows of the model's logits, at least the tokenizer's ids; None means as many.
    """
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size {size} is less than the tokenizer's {tokenizer.vocab_size}")
    with _tokenizers_lock:
        by_size = _tokenizers.setdefault(tokenizer, {})
        if size not in by_size:
            by_size[size] = lltokenizer_from_encoding(
                tokenizer.encoding, n_vocab=size, eos_token=sorted(tokenizer.stop_ids)
            )
        return by_size[size]


def schema_grammar(schema: object, *, param: str) -> str:
    """The grammar of JSON texts that obey a schema.

    Raises:
        RequestError: it is no JSON schema, or uses a keyword that cannot be enforced.
    """
    if not isinstance(schema, Mapping | bool):
        raise RequestError("the JSON schema is no object", param=param, found=type(schema).__name__)
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_STYLE)
    except (ValueError, TypeError, RecursionError) as error:
        raise _bad_schema(param, error) from error
    return checked(grammar, param=param)


def tools_grammar(
    tokenizer: KimiTokenizer, tools: Sequence[Mapping[str, Any]], *, form: str, param: str = "tools"
) -> str:
    """The grammar of calls to any of some tools, in Kimi's format.

    Args:
        tokenizer: names the markers' ids.
        tools: OpenAI-shaped function tools, at least one. The schema of a `strict` one is enforced or refused; in any
            other, keywords that cannot be enforced are passed over.
        form: "one" (a section with one call), "some" (a section with one or more) or "rest" (the rest of a call whose
            begin marker is written already).
        param: the request field to blame.

    Raises:
        RequestError: a tool is malformed or its schema cannot be enforced.
        UnsupportedError: the vocabulary has no tool markers.
    """
    calls = []
    rules = []
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{param}[{number}] is no function", param=param, expected="a function with a name")
        calls.append(f"call{number}")
        rules.append(_call_rule(tokenizer, number, function, f"{param}[{number}].function.parameters"))
    any_call = f"({' | '.join(calls)}) {_marker(tokenizer, CALL_END)}"
    whole_call = f"{_marker(tokenizer, CALL_BEGIN)} {any_call}"
    begin, end = _marker(tokenizer, SECTION_BEGIN), _marker(tokenizer, SECTION_END)
    start = {
        "one": f"{begin} {whole_call} {end}",
        "some": f"{begin} ({whole_call})+ {end}",
        "rest": any_call,
    }[form]
    return checked(LLMatcher.grammar_from_lark("\n".join([f"start: {start}", *rules])), param=param)


def checked(grammar: str, *, param: str) -> str:
    """Check that a grammar compiles, and return it.

    Raises:
        RequestError: llguidance cannot compile it.
    """
    message = LLMatcher.validate_grammar(grammar)
    if message:
        raise _bad_schema(param, message)
    return grammar


def _call_rule(tokenizer: KimiTokenizer, number: int, function: Mapping[str, Any], param: str) -> str:
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise RequestError("the tool's parameters are no JSON schema", param=param, found=type(schema).__name__)
    strict = function.get("strict") is True
    style = {**_JSON_STYLE, "lenient": not strict}
    try:
        text = json.dumps({**schema, "type": "object", "x-guidance": style})
    except (ValueError, TypeError, RecursionError) as error:
        raise _bad_schema(param, error) from error
    rule = f"%json {text}"
    checked(LLMatcher.grammar_from_lark(f"start: {rule}"), param=param)
    head = json.dumps(f"{PREFIX}{function['name']}:", ensure_ascii=False)
    return (
        f"call{number}: {head} /[0-9]{{1,4}}/ {_marker(tokenizer, ARGUMENT_BEGIN)} arguments{number}\n"
        f"arguments{number}: {rule}"
    )


def _marker(tokenizer: KimiTokenizer, name: str) -> str:
    if name not in tokenizer.special:
        raise UnsupportedError(
            "this model cannot be made to call tools", param="tool_choice", expected=f"a control token {name}"
        )
    return f"<[{tokenizer.special[name]}]>"


def _bad_schema(param: str, reason: object) -> RequestError:
    return RequestError(
        "the JSON schema cannot be enforced",
        param=param,
        code="invalid_schema",
        found=str(reason).splitlines()[0][:300] if str(reason) else type(reason).__name__,
        fix="leave the keyword out, or do without the constraint",
    )


_BARRED = -1.0e9  # finite, so that it survives JSON and cannot make a NaN


class GrammarConstraint:
    """Constraint of a whole reply: reasoning where allowed, then exactly what a grammar describes, then the end.

    Args:
        tokenizer: the tokenizer of the model that replies.
        grammar: an llguidance grammar that compiles.
        reasoning: how the reply may begin, as `Prompt.reasoning` says.
        vocab_size: rows of the model's logits; None means the tokenizer's ids.
    """

    def __init__(
        self,
        tokenizer: KimiTokenizer,
        grammar: str,
        *,
        reasoning: ReasoningMode = "none",
        vocab_size: int | None = None,
    ) -> None:
        self._matcher = LLMatcher(grammar_tokenizer(tokenizer, vocab_size), grammar, log_level=0)
        _check(self._matcher)
        self._stop_ids = tokenizer.stop_ids
        self._open_id = tokenizer.special.get(THINK_OPEN)
        self._close_id = tokenizer.special.get(THINK_CLOSE)
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._phase: ReasoningMode = "none" if self._open_id is None or self._close_id is None else reasoning
        self._free_mask = b"" if self._phase == "none" else _reasoning_mask(tokenizer, size)

    def mask(self) -> bytes | None:
        """Allowed next tokens: bit i of little-endian uint32 word i // 32 is token i.

        Raises:
            ChatError: the grammar became too complex to follow.
        """
        if self._phase == "open":
            return self._free_mask
        allowed: bytes = self._matcher.compute_bitmask()
        _check(self._matcher)
        if self._phase == "may_open" and self._open_id is not None:
            with_open = bytearray(allowed)
            with_open[self._open_id // 8] |= 1 << self._open_id % 8
            return bytes(with_open)
        return allowed

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token.

        Raises:
            ChatError: the mask did not allow it.
        """
        if self._phase == "open":
            if token_id == self._close_id:
                self._phase = "none"
        elif self._phase == "may_open" and token_id == self._open_id:
            self._phase = "open"
        else:
            self._phase = "none"
            _consume(self._matcher, token_id, self._stop_ids)


class StrictToolsConstraint:
    """Constraint of tool calls alone: once the model begins one, it is a call to a declared tool with valid arguments.

    Args:
        tokenizer: the tokenizer of the model that replies.
        grammar: an llguidance grammar of the rest of one call, after its begin marker.
        vocab_size: rows of the model's logits; None means the tokenizer's ids.
    """

    def __init__(self, tokenizer: KimiTokenizer, grammar: str, *, vocab_size: int | None = None) -> None:
        self._fresh = LLMatcher(grammar_tokenizer(tokenizer, vocab_size), grammar, log_level=0)
        _check(self._fresh)
        self._begin_id = tokenizer.special[CALL_BEGIN]
        self._stop_ids = tokenizer.stop_ids
        self._matcher: LLMatcher | None = None

    def mask(self) -> bytes | None:
        """Allowed next tokens (see `GrammarConstraint.mask`); None, all of them, outside of a call.

        Raises:
            ChatError: the grammar became too complex to follow.
        """
        if self._matcher is None:
            return None
        allowed: bytes = self._matcher.compute_bitmask()
        _check(self._matcher)
        return allowed

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token.

        Raises:
            ChatError: the mask did not allow it.
        """
        if self._matcher is not None:
            _consume(self._matcher, token_id, self._stop_ids)
            if self._matcher.is_stopped():
                self._matcher = None
        elif token_id == self._begin_id:
            self._matcher = self._fresh.deep_copy()


def json_object(
    tokenizer: KimiTokenizer, *, reasoning: ReasoningMode = "none", vocab_size: int | None = None
) -> GrammarConstraint:
    """Constraint to any JSON object: `response_format` of type json_object."""
    grammar = schema_grammar({"type": "object"}, param="response_format")
    return GrammarConstraint(tokenizer, grammar, reasoning=reasoning, vocab_size=vocab_size)


def json_schema(
    tokenizer: KimiTokenizer, schema: object, *, reasoning: ReasoningMode = "none", vocab_size: int | None = None
) -> GrammarConstraint:
    """Constraint to JSON that obeys a schema: `response_format` of type json_schema, strict or not.

    Raises:
        RequestError: the schema is malformed or cannot be enforced.
    """
    grammar = schema_grammar(schema, param="response_format")
    return GrammarConstraint(tokenizer, grammar, reasoning=reasoning, vocab_size=vocab_size)


def tool_call(
    tokenizer: KimiTokenizer,
    tools: Sequence[Mapping[str, Any]],
    name: str | None = None,
    *,
    parallel: bool = True,
    reasoning: ReasoningMode = "none",
    vocab_size: int | None = None,
) -> GrammarConstraint:
    """Constraint to a section of tool calls: `tool_choice` "required", or one named function, called once.

    Args:
        tokenizer: the tokenizer of the model that replies.
        tools: OpenAI-shaped function tools.
        name: the only function allowed, when one is named.
        parallel: whether there may be several calls.
        reasoning: how the reply may begin.
        vocab_size: rows of the model's logits.

    Raises:
        RequestError: there is no such tool, or a schema cannot be enforced.
        UnsupportedError: the vocabulary has no tool markers.
    """
    chosen = [tool for tool in tools if name is None or (tool.get("function") or {}).get("name") == name]
    if not chosen:
        raise RequestError(
            "tool_choice needs a tool that is declared"
            if name is None
            else f"tool_choice names no declared tool: {name}",
            param="tool_choice",
            expected=", ".join(str((tool.get("function") or {}).get("name")) for tool in tools) or "at least one tool",
        )
    grammar = tools_grammar(tokenizer, chosen, form="some" if parallel and name is None else "one")
    return GrammarConstraint(tokenizer, grammar, reasoning=reasoning, vocab_size=vocab_size)


def strict_tools(
    tokenizer: KimiTokenizer, tools: Sequence[Mapping[str, Any]], *, vocab_size: int | None = None
) -> StrictToolsConstraint | None:
    """Constraint for `tool_choice` "auto" with `strict` functions: calls may be left out but not be wrong; None without any.

    Raises:
        RequestError: the schema of a strict function cannot be enforced.
        UnsupportedError: the vocabulary has no tool markers.
    """
    if not any((tool.get("function") or {}).get("strict") is True for tool in tools):
        return None
    return StrictToolsConstraint(tokenizer, tools_grammar(tokenizer, tools, form="rest"), vocab_size=vocab_size)


def no_tools_bias(tokenizer: KimiTokenizer) -> tuple[tuple[int, float], ...]:
    """Logit bias that keeps a reply from calling tools: `tool_choice` "none" while tools are declared."""
    return tuple((tokenizer.special[name], _BARRED) for name in sorted(TOOL_MARKERS) if name in tokenizer.special)


def pack_mask(ids: Iterable[int], vocab_size: int) -> bytes:
    """Pack token ids into a mask of little-endian uint32 words."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
    bits[np.fromiter(ids, dtype=np.int64)] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _reasoning_mask(tokenizer: KimiTokenizer, vocab_size: int) -> bytes:
    barred = tokenizer.stop_ids | set(tokenizer.special.values()) - {tokenizer.special[THINK_CLOSE]}
    return pack_mask((token_id for token_id in range(tokenizer.vocab_size) if token_id not in barred), vocab_size)


def _consume(matcher: LLMatcher, token_id: int, stop_ids: frozenset[int]) -> None:
    if token_id in stop_ids and (matcher.is_stopped() or matcher.is_accepting()):
        return
    if not matcher.consume_token(token_id):
        raise ChatError("the grammar does not allow this token", found=token_id, where=matcher.get_error())


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise ChatError("the grammar cannot be followed", found=matcher.get_error())
