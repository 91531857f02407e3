"""Which grammar, if any, a request's answer must obey; it knows nothing of how a grammar masks tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from exo_kimi.chat.constraint import json_object, json_schema, strict_tools, tool_call
from exo_kimi.chat.template import ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.runtime.requests import TokenConstraint
from exo_kimi.serve.request.schemas import ChatRequest, JsonSchema
from exo_kimi.serve.request.tools import ToolPlan

MakeConstraint = Callable[[], TokenConstraint | None]


def constraint_factory(
    request: ChatRequest, plan: ToolPlan, tokenizer: KimiTokenizer, *, reasoning: ReasoningMode
) -> MakeConstraint:
    """What makes a fresh constraint for each choice; what it makes may be None, for an answer that is free.

    A call that must be made leaves no text, so a response format has nothing to say then.

    Raises:
        RequestError: the response format lacks its schema. Making a constraint raises it for a schema that is malformed.
        UnsupportedError: a response format beside tools that the model may or may not call.
    """
    if plan.mode == "required":
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        return partial(tool_call, tokenizer, tools, plan.name, parallel=plan.parallel, reasoning=reasoning)
    form = request.response_format
    if form is not None and form.type != "text":
        if plan.mode == "auto":
            raise UnsupportedError(
                "'response_format' is not supported beside tools that the model may call",
                fix="send tool_choice 'none' or 'required', or no tools",
                param="response_format",
                code="unsupported_value",
            )
        if form.type == "json_object":
            return partial(json_object, tokenizer, reasoning=reasoning)
        return partial(json_schema, tokenizer, _schema(form.json_schema), reasoning=reasoning)
    if plan.mode == "auto":
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        return partial(strict_tools, tokenizer, tools)
    return _free


def _free() -> None:
    """The answer of a request that asks for no form."""


def _schema(form: JsonSchema | None) -> dict[str, object]:
    if form is None:
        param = "response_format.json_schema"
        raise RequestError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    if form.schema_ is None:
        param = "response_format.json_schema.schema"
        raise RequestError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    return form.schema_
