"""Wishes about reasoning and what a checkpoint's template can do of them: carried out, approximated by a cap, or told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from exo_kimi.chat.template import ChatTemplate, Prompt
from exo_kimi.dialogue.request import ConversationRequest
from exo_kimi.errors import UnsupportedError

# Where the template has no levels: the lower ones cap the reasoning, the others leave it to the model.
EFFORT_BUDGETS: Mapping[str, int | None] = {
    "minimal": 512,
    "low": 2048,
    "medium": None,
    "high": None,
    "xhigh": None,
    "max": None,
}


def settle_effort(request: ConversationRequest, template: ChatTemplate, told: list[str]) -> ConversationRequest:
    """The request with an effort that the template reads, or with a cap in place of it.

    Raises:
        UnsupportedError: the template reads none, and what is asked for must be carried out exactly.
    """
    effort = request.reasoning_effort
    if effort is None or template.reads_effort:
        return request
    if request.exact:
        raise UnsupportedError(
            "this model has no levels of reasoning", found=effort, param="reasoning_effort", code="unsupported_value"
        )
    budget = EFFORT_BUDGETS.get(effort)
    if budget is not None and request.reasoning_budget is None:
        told.append(f"effort '{effort}' caps the reasoning at {budget} tokens: Kimi has no levels of its own")
        return replace(request, reasoning_effort=None, reasoning_budget=budget)
    if effort != "max":
        told.append(f"effort '{effort}' is reasoning without a level: Kimi has none of its own")
    return replace(request, reasoning_effort=None)


def check_reasoning(request: ConversationRequest, prompt: Prompt, template: ChatTemplate, told: list[str]) -> None:
    """Tell what the template cannot carry out of the wishes about reasoning.

    Raises:
        UnsupportedError: what is asked for must be carried out exactly.
    """
    wish = request.thinking
    if wish is not None and request.begun_reply is None and wish != (prompt.reasoning != "none"):
        what = "this model does not reason" if wish else "this model's reasoning cannot be turned off"
        if request.exact:
            raise UnsupportedError(
                what,
                fix="leave 'thinking' and 'reasoning_effort' out",
                param="thinking",
                code="unsupported_value",
            )
        told.append(what)
    if request.keep_reasoning and not template.keeps_reasoning:
        told.append("the reasoning of earlier turns is not kept: this model's template does not show it")
