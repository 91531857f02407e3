"""Replies of a model to prompts, and what can be said of them without knowing the right answer: loops, think tags, tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exo_kimi.chat.events import ContentDelta, ReasoningDelta, ToolCallEvent
from exo_kimi.chat.output import OutputParser
from exo_kimi.chat.template import ChatTemplate, Prompt
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.compress.compare.greedy import greedy
from exo_kimi.compress.compare.score import Score, score
from exo_kimi.compress.compare.tool_validity import call_problem
from exo_kimi.compress.texts.prompts import DomainPrompt
from exo_kimi.models.kimi_k2 import Model

LOOP_TURNS = 4
LOOP_UNITS = 24
"""A reply loops when its end is the same piece at least so many times over, and at least so many tokens long together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A model's reply, parsed.

    Args:
        content, reasoning: text.
        calls: of tools.
        closed: whether it closed every think tag that it opened, and ended by itself.
        looped: whether it ended in a loop.
    """

    content: str
    reasoning: str
    calls: list[ToolCallEvent]
    closed: bool
    looped: bool


class Replier(Protocol):
    """Whatever replies to conversations: a model in memory, or a server."""

    def answer(self, conversations: Sequence[tuple[list[Any], list[Any] | None]]) -> list[Reply]:
        """Greedy replies to prompts of messages and tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReplier:
    """A model in memory, with its tokenizer and template."""

    model: Model
    tokenizer: KimiTokenizer
    template: ChatTemplate
    max_tokens: int

    def answer(self, conversations: Sequence[tuple[list[Any], list[Any] | None]]) -> list[Reply]:
        """Greedy replies, prompts of one length together."""
        prompts = [self.template.render(messages, tools) for messages, tools in conversations]
        made = greedy(
            self.model, [prompt.ids for prompt in prompts], stop_ids=self.tokenizer.stop_ids, max_tokens=self.max_tokens
        )
        return [
            parse_reply(self.tokenizer, prompt, ids, tools, ended=len(ids) < self.max_tokens)
            for prompt, ids, (_, tools) in zip(prompts, made, conversations, strict=True)
        ]


def parse_reply(
    tokenizer: KimiTokenizer, prompt: Prompt, ids: Sequence[int], tools: list[Any] | None, *, ended: bool
) -> Reply:
    """A reply from its tokens.

    Args:
        prompt: that it answers.
        ids: without the token that stopped it.
        tools: that were declared.
        ended: whether it ended by itself.
    """
    parser = OutputParser(tokenizer, reasoning_open=prompt.reasoning_open, tools=tools or False)
    events = [event for token in ids for event in parser.feed(token)] + parser.finish()
    said = {
        kind: "".join(event.text for event in events if isinstance(event, kind))
        for kind in (ContentDelta, ReasoningDelta)
    }
    return Reply(
        content=said[ContentDelta].strip(),
        reasoning=said[ReasoningDelta].strip(),
        calls=[event for event in events if isinstance(event, ToolCallEvent)],
        closed=not parser.reasoning_open and ended,
        looped=ends_in_loop(ids),
    )


def ends_in_loop(units: Sequence[Any]) -> bool:
    """Whether the end of a reply is one piece over and over: `LOOP_TURNS` times at least, and `LOOP_UNITS` long at least.

    Args:
        units: token ids, or words.
    """
    for period in range(1, len(units) // LOOP_TURNS + 1):
        length = max(LOOP_TURNS * period, LOOP_UNITS)
        if length > len(units):
            return False
        end = units[len(units) - length :]
        if end[period:] == end[:-period]:
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How a model replied to the project's prompts, each a count of replies.

    Args:
        without_loop: that did not end in a loop.
        closed: that closed their think tags and ended by themselves.
        called: with a tool, where one is needed.
        calls_valid: calls that a program could carry out, of all calls.
    """

    without_loop: Score
    closed: Score
    called: Score
    calls_valid: Score


def behave(replier: Replier, prompts: Sequence[DomainPrompt]) -> Behaviour:
    """Ask every prompt and count.

    Raises:
        UsageError: a server cannot be reached.
    """
    replies = replier.answer([(prompt.messages[:-1], prompt.tools) for prompt in prompts])
    pairs = list(zip(replies, prompts, strict=True))
    problems = [
        call_problem(call.name, call.arguments, prompt.tools or ()) for reply, prompt in pairs for call in reply.calls
    ]
    return Behaviour(
        without_loop=score([not reply.looped for reply in replies]),
        closed=score([reply.closed for reply in replies]),
        called=score([bool(reply.calls) for reply, prompt in pairs if prompt.needs_call]),
        calls_valid=score([problem is None for problem in problems]),
    )
