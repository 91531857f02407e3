"""`exo-kimi eval`: ask a checkpoint held-out questions, judge its answers and measure it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from exo_kimi.chat.events import ContentDelta, ReasoningDelta, ToolCallEvent
from exo_kimi.chat.output import OutputParser
from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.compress.compare.greedy import greedy
from exo_kimi.compress.compare.score import score
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.data.conversations import TrainingConversation, single, tool_exchange
from exo_kimi.train.evaluation.cases import ToolCase, question_cases, tool_cases
from exo_kimi.train.evaluation.likelihood import Likelihood, likelihood
from exo_kimi.train.evaluation.report import EvaluationReport
from exo_kimi.train.tasks.registry import SHARES
from exo_kimi.train.tasks.turn import draw

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A model's reply, parsed. `closed`: whether it closed every think tag that it opened."""

    content: str
    reasoning: str
    calls: list[ToolCallEvent]
    closed: bool


@dataclass(slots=True, kw_only=True)
class _EvaluatedModel:
    """The model under evaluation; `closed` collects whether each reply closed its think tags."""

    model: Model
    tokenizer: KimiTokenizer
    template: ChatTemplate
    max_tokens: int
    closed: list[bool] = field(default_factory=list)

    def answer(self, conversations: Sequence[tuple[list[Any], list[Any] | None]]) -> list[Reply]:
        """Greedy replies to prompts of messages and tools."""
        prompts = [self.template.render(messages, tools) for messages, tools in conversations]
        made = greedy(
            self.model, [prompt.ids for prompt in prompts], stop_ids=self.tokenizer.stop_ids, max_tokens=self.max_tokens
        )
        replies: list[Reply] = []
        for prompt, ids, (_, tools) in zip(prompts, made, conversations, strict=True):
            parser = OutputParser(self.tokenizer, reasoning_open=prompt.reasoning_open, tools=tools or False)
            events = [event for token in ids for event in parser.feed(token)] + parser.finish()
            said = {
                kind: "".join(event.text for event in events if isinstance(event, kind))
                for kind in (ContentDelta, ReasoningDelta)
            }
            replies.append(
                Reply(
                    content=said[ContentDelta].strip(),
                    reasoning=said[ReasoningDelta].strip(),
                    calls=[event for event in events if isinstance(event, ToolCallEvent)],
                    closed=not parser.reasoning_open and len(ids) < self.max_tokens,
                )
            )
        self.closed += [reply.closed for reply in replies]
        return replies


def evaluate(
    directory: Path,
    *,
    against: Path | None,
    count: int,
    seed: int,
    texts: int = 200,
    max_tokens: int = 96,
    say: Say = lambda _: None,
) -> EvaluationReport:
    """Ask, judge and measure.

    Args:
        directory: any Kimi checkpoint; activations are float32.
        against: a reference checkpoint with the same vocabulary.
        count: the most questions of each task.
        texts: held-out answers that perplexity, KL and loads are measured on.
        max_tokens: the most tokens of a reply.
        say: called with progress messages.

    Raises:
        CheckpointError, TokenizerError, TemplateError: the directory cannot be read.
    """
    tokenizer = KimiTokenizer.from_directory(directory)
    template = ChatTemplate.from_directory(directory, tokenizer)
    subject = _EvaluatedModel(
        model=load(directory, dtype="float32"), tokenizer=tokenizer, template=template, max_tokens=max_tokens
    )
    cases = question_cases(count, seed)
    say(f"{len(cases)} questions")
    by_task: dict[str, list[bool]] = {}
    wrong: list[tuple[str, str, str]] = []
    for case, reply in zip(cases, subject.answer([(case.messages, None) for case in cases]), strict=True):
        right = reply.content in case.accepted and not reply.calls
        by_task.setdefault(case.task, []).append(right)
        if not right:
            wrong.append((case.messages[-1]["content"], case.accepted[0], f"<{reply.reasoning}> {reply.content}"))
    valid, called, used, failed = _use_tools(subject, tool_cases(count, seed), say)
    encoder = Encoder(tokenizer, template)
    say(f"{texts} texts")
    reference = None if against is None else load(against, dtype="float32")
    measured: Likelihood = likelihood(subject.model, held_out_texts(encoder, texts, seed), reference)
    return EvaluationReport(
        directory=str(directory),
        against=None if against is None else str(against),
        tasks={task: score(results) for task, results in by_task.items()},
        calls_valid=score(valid),
        calls_right=score(called),
        results_used=score(used),
        think_closed=score(subject.closed),
        likelihood=measured,
        wrong=wrong + failed,
    )


def held_out_texts(encoder: Encoder, count: int, seed: int) -> list[Encoded]:
    """Held-out questions with their answers, of all tasks by their shares; each tenth a request for a tool."""
    rng = Random(f"texts {seed}")
    tasks, shares = list(SHARES), list(SHARES.values())
    requests = tool_cases(-(-count // 30), seed)
    rng.shuffle(requests)
    texts = [
        encoder.encode(TrainingConversation(messages=tool_exchange(case.request, 0), tools=case.tools))
        for case in requests[: -(-count // 10)]
    ]
    while len(texts) < count:
        task = rng.choices(tasks, shares)[0]
        if task.__module__.endswith("manners"):
            continue
        texts.append(encoder.encode(TrainingConversation(messages=single(draw(task, rng, evaluation=True)))))
    return texts


def _use_tools(
    subject: _EvaluatedModel, cases: list[ToolCase], say: Say
) -> tuple[list[bool], list[bool], list[bool], list[tuple[str, str, str]]]:
    """Judge the tool calls: whether they were valid, whether right, whether results were used, and what went wrong."""
    say(f"{len(cases)} requests for tools")
    wrong: list[tuple[str, str, str]] = []
    valid: list[bool] = []
    called: list[bool] = []
    asked = [tool_exchange(case.request, 0) for case in cases]
    replies = subject.answer([(messages[:1], case.tools) for messages, case in zip(asked, cases, strict=True)])
    for case, reply in zip(cases, replies, strict=True):
        arguments = [(call.name, json.loads(call.arguments)) for call in reply.calls]
        valid.append(len(arguments) == 1)
        called.append(arguments == [(case.request.tool, case.request.arguments)])
        if not called[-1]:
            wrong.append((case.request.question, str(case.request.arguments), f"{arguments} {reply.content}"))
    used: list[bool] = []
    replies = subject.answer([(messages[:3], case.tools) for messages, case in zip(asked, cases, strict=True)])
    for case, reply in zip(cases, replies, strict=True):
        used.append(all(part in reply.content for part in case.request.used))
        if not used[-1]:
            wrong.append((case.request.question, case.request.answer, reply.content))
    return valid, called, used, wrong
