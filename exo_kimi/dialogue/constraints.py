"""What a reply must look like, as the constraint that the engine follows: calls, JSON, a cap on the reasoning."""

from __future__ import annotations

from dataclasses import dataclass

from exo_kimi.chat.budget import ReasoningBudget
from exo_kimi.chat.constraint import (
    GrammarConstraint,
    StrictToolsConstraint,
    calls_or_json,
    json_schema,
    strict_tools,
    tool_call,
)
from exo_kimi.chat.template import ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.dialogue.request import ConversationRequest, ToolMode
from exo_kimi.errors import UnsupportedError
from exo_kimi.runtime.requests import TokenConstraint

_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyForm:
    """What is known of a reply before it begins.

    Args:
        mode: whether it must, may or must not call tools.
        reasoning: how it may begin.
        next_index: number of its first call.
        told: gets a sentence for each schema that is not enforced in full.
    """

    mode: ToolMode
    reasoning: ReasoningMode
    next_index: int
    told: list[str]


def reply_constraint(request: ConversationRequest, tokenizer: KimiTokenizer, form: ReplyForm) -> TokenConstraint | None:
    """A fresh constraint for one reply, or None for a reply that is free.

    A call that must be made leaves no text, so a response format has nothing to say then.

    Raises:
        RequestError: a schema is malformed, or cannot be enforced and must be.
        UnsupportedError: a form for a begun reply; a vocabulary without tool markers.
    """
    grammar = _grammar(request, tokenizer, form)
    if request.reasoning_budget is None or form.reasoning == "none":
        return grammar
    return ReasoningBudget(tokenizer, request.reasoning_budget, reasoning=form.reasoning, then=grammar)


def _grammar(
    request: ConversationRequest, tokenizer: KimiTokenizer, form: ReplyForm
) -> GrammarConstraint | StrictToolsConstraint | None:
    answer, choice, mode = request.response_format, request.tool_choice, form.mode
    passed_over = None if request.exact else form.told
    if request.begun_reply is not None and (mode == "required" or answer is not None):
        raise UnsupportedError("a reply that is begun already cannot be held to a form", param="messages")
    if mode == "required":
        return tool_call(
            tokenizer,
            request.tools,
            choice.name,
            parallel=choice.parallel,
            reasoning=form.reasoning,
            next_index=form.next_index,
            passed_over=passed_over,
        )
    if answer is None:
        return strict_tools(tokenizer, request.tools, passed_over=passed_over) if mode == "auto" else None
    schema = _ANY_OBJECT if answer.schema is None else answer.schema
    if mode == "auto":
        return calls_or_json(
            tokenizer,
            request.tools,
            schema,
            parallel=choice.parallel,
            reasoning=form.reasoning,
            next_index=form.next_index,
            passed_over=passed_over,
        )
    return json_schema(tokenizer, schema, reasoning=form.reasoning, passed_over=passed_over)
