"""Constrained decoding: the tokens that may come next, so that a reply is JSON or a tool call.

JSON schemas and Kimi's tool-call format are compiled to llguidance grammars. A constraint follows one request: `mask()` gives
the allowed tokens, `accept()` advances by the token that was sampled. Reasoning comes first where the prompt allows it, and is
free: only control tokens other than `</think>` are barred from it, so that it cannot end the reply.
"""

from __future__ import annotations

import copy
import json
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from exo_kimi.chat.call_names import PREFIX
from exo_kimi.chat.family import THINK_CLOSE, THINK_OPEN
from exo_kimi.chat.schemas import bad_schema, json_rule
from exo_kimi.chat.template import ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.chat.tool_calls import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, TOOL_MARKERS
from exo_kimi.errors import ChatError, RequestError, UnsupportedError

SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"

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


def schema_grammar(schema: object, *, param: str, passed_over: list[str] | None = None) -> str:
    """The grammar of JSON texts that obey a schema.

    Args:
        schema: a JSON schema.
        param: the request field to blame.
        passed_over: gets a sentence for what is not enforced; None refuses a schema that cannot be enforced in full.

    Raises:
        RequestError: it is no JSON schema, or uses a keyword that cannot be enforced.
    """
    return checked(f"start: {json_rule(schema, param=param, passed_over=passed_over)}", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """The grammar's rules of calls to some tools, in Kimi's format.

    Args:
        first: what the first call of a reply is, behind its begin marker: it has the next number of the conversation.
        any: the same for a call with any number.
        rules: what both refer to.
    """

    first: str
    any: str
    rules: tuple[str, ...]

    @classmethod
    def of(
        cls,
        tokenizer: KimiTokenizer,
        tools: Sequence[Mapping[str, Any]],
        *,
        next_index: int | None = None,
        passed_over: list[str] | None = None,
    ) -> CallRules:
        """Rules for tools.

        Args:
            tokenizer: names the markers' ids.
            tools: OpenAI-shaped function tools, at least one.
            next_index: number of the first call; None leaves it open.
            passed_over: gets a sentence for each schema that is not enforced in full. None refuses a `strict` tool with such
                a schema; in any other, keywords that cannot be enforced are always passed over.

        Raises:
            RequestError: a tool is malformed or its schema cannot be enforced.
            UnsupportedError: the vocabulary has no tool markers.
        """
        firsts, others, rules = [], [], []
        any_index = "/0|[1-9][0-9]{0,3}/"
        first_index = any_index if next_index is None else f'"{next_index}"'
        for number, tool in enumerate(tools):
            function = tool.get("function")
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise RequestError(f"tools[{number}] is no function", param="tools", expected="a function with a name")
            rules.append(f"arguments{number}: {_arguments_rule(function, number, passed_over)}")
            head = json.dumps(f"{PREFIX}{function['name']}:", ensure_ascii=False)
            rest = f"{_marker(tokenizer, ARGUMENT_BEGIN)} arguments{number}"
            firsts.append(f"{head} {first_index} {rest}")
            others.append(f"{head} {any_index} {rest}")
        end = _marker(tokenizer, CALL_END)
        return cls(first=f"({' | '.join(firsts)}) {end}", any=f"({' | '.join(others)}) {end}", rules=tuple(rules))

    def section(self, tokenizer: KimiTokenizer, *, several: bool) -> str:
        """A section with one call, or with one or more."""
        begin = _marker(tokenizer, CALL_BEGIN)
        more = f" ({begin} {self.any})*" if several else ""
        return f"{_marker(tokenizer, SECTION_BEGIN)} {begin} {self.first}{more} {_marker(tokenizer, SECTION_END)}"


def _arguments_rule(function: Mapping[str, Any], number: int, passed_over: list[str] | None) -> str:
    param = f"tools[{number}].function.parameters"
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise RequestError("the tool's parameters are no JSON schema", param=param, found=type(schema).__name__)
    if passed_over is None and function.get("strict") is not True:
        passed_over = []
    return json_rule({**schema, "type": "object"}, param=param, passed_over=passed_over)


def checked(lark: str, *, param: str) -> str:
    """Compile a grammar to see that it can be followed, and return it in llguidance's form.

    Raises:
        RequestError: llguidance cannot compile it.
    """
    grammar: str = LLMatcher.grammar_from_lark(lark)
    message = LLMatcher.validate_grammar(grammar)
    if message:
        raise bad_schema(param, message)
    return grammar


def _marker(tokenizer: KimiTokenizer, name: str) -> str:
    if name not in tokenizer.special:
        raise UnsupportedError(
            "this model cannot be made to call tools", param="tool_choice", expected=f"a control token {name}"
        )
    return f"<[{tokenizer.special[name]}]>"


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

    def fork(self) -> Self:
        """One that stands where this one does; neither moves the other."""
        made = copy.copy(self)
        made._matcher = self._matcher.deep_copy()
        return made


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

    def fork(self) -> Self:
        """One that stands where this one does; neither moves the other."""
        made = copy.copy(self)
        made._matcher = None if self._matcher is None else self._matcher.deep_copy()
        return made


def json_object(
    tokenizer: KimiTokenizer, *, reasoning: ReasoningMode = "none", vocab_size: int | None = None
) -> GrammarConstraint:
    """Constraint to any JSON object: `response_format` of type json_object."""
    return json_schema(tokenizer, {"type": "object"}, reasoning=reasoning, vocab_size=vocab_size)


def json_schema(
    tokenizer: KimiTokenizer,
    schema: object,
    *,
    reasoning: ReasoningMode = "none",
    vocab_size: int | None = None,
    passed_over: list[str] | None = None,
) -> GrammarConstraint:
    """Constraint to JSON that obeys a schema: `response_format` of type json_schema, strict or not.

    Args:
        tokenizer: the tokenizer of the model that replies.
        schema: a JSON schema.
        reasoning: how the reply may begin.
        vocab_size: rows of the model's logits.
        passed_over: gets a sentence for what is not enforced; None refuses a schema that cannot be enforced in full.

    Raises:
        RequestError: the schema is malformed or cannot be enforced.
    """
    grammar = schema_grammar(schema, param="response_format", passed_over=passed_over)
    return GrammarConstraint(tokenizer, grammar, reasoning=reasoning, vocab_size=vocab_size)


def tool_call(
    tokenizer: KimiTokenizer,
    tools: Sequence[Mapping[str, Any]],
    name: str | None = None,
    *,
    parallel: bool = True,
    reasoning: ReasoningMode = "none",
    vocab_size: int | None = None,
    next_index: int | None = None,
    passed_over: list[str] | None = None,
) -> GrammarConstraint:
    """Constraint to a section of tool calls: `tool_choice` "required", or one named function, called once.

    Args:
        tokenizer: the tokenizer of the model that replies.
        tools: OpenAI-shaped function tools.
        name: the only function allowed, when one is named.
        parallel: whether there may be several calls.
        reasoning: how the reply may begin.
        vocab_size: rows of the model's logits.
        next_index: number of the first call; None leaves it open.
        passed_over: as `CallRules.of` takes it.

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
    calls = CallRules.of(tokenizer, chosen, next_index=next_index, passed_over=passed_over)
    section = calls.section(tokenizer, several=parallel and name is None)
    grammar = checked("\n".join([f"start: {section}", *calls.rules]), param="tools")
    return GrammarConstraint(tokenizer, grammar, reasoning=reasoning, vocab_size=vocab_size)


def calls_or_json(
    tokenizer: KimiTokenizer,
    tools: Sequence[Mapping[str, Any]],
    schema: object,
    *,
    parallel: bool = True,
    reasoning: ReasoningMode = "none",
    next_index: int | None = None,
    passed_over: list[str] | None = None,
) -> GrammarConstraint:
    """Constraint of a `response_format` beside tools that may be called: a section of calls, or JSON that obeys the schema.

    Args:
        tokenizer: the tokenizer of the model that replies.
        tools: OpenAI-shaped function tools, at least one.
        schema: a JSON schema.
        parallel: whether there may be several calls.
        reasoning: how the reply may begin.
        next_index: number of the first call; None leaves it open.
        passed_over: as `CallRules.of` takes it.

    Raises:
        RequestError: a schema is malformed or cannot be enforced.
        UnsupportedError: the vocabulary has no tool markers.
    """
    calls = CallRules.of(tokenizer, tools, next_index=next_index, passed_over=passed_over)
    answer = json_rule(schema, param="response_format", passed_over=passed_over)
    section = calls.section(tokenizer, several=parallel)
    lark = "\n".join([f"start: {section} | answer", f"answer: {answer}", *calls.rules])
    return GrammarConstraint(tokenizer, checked(lark, param="response_format"), reasoning=reasoning)


def strict_tools(
    tokenizer: KimiTokenizer,
    tools: Sequence[Mapping[str, Any]],
    *,
    vocab_size: int | None = None,
    passed_over: list[str] | None = None,
) -> StrictToolsConstraint | None:
    """Constraint for `tool_choice` "auto" with `strict` functions: calls may be left out but not be wrong; None without any.

    Raises:
        RequestError: the schema of a strict function cannot be enforced.
        UnsupportedError: the vocabulary has no tool markers.
    """
    if not any((tool.get("function") or {}).get("strict") is True for tool in tools):
        return None
    calls = CallRules.of(tokenizer, tools, passed_over=passed_over)
    grammar = checked("\n".join([f"start: {calls.any}", *calls.rules]), param="tools")
    return StrictToolsConstraint(tokenizer, grammar, vocab_size=vocab_size)


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
