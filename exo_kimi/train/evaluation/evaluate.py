"""`exo-kimi eval`: ask a checkpoint held-out questions, judge its answers and measure it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.compare.replies import ModelReplier
from exo_kimi.compress.compare.score import score
from exo_kimi.compress.layers import Change, LayerWalk
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.reading import read_texts
from exo_kimi.compress.texts.vocabulary import check_same_vocabulary
from exo_kimi.models.adapters import AdaptedLinear
from exo_kimi.models.kimi_k2 import DecoderLayer
from exo_kimi.runtime.loading.adapters import adapt, arrays_of
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.data.conversations import TrainingConversation, single, tool_exchange
from exo_kimi.train.evaluation.cases import ToolCase, question_cases, tool_cases
from exo_kimi.train.evaluation.likelihood import likelihood
from exo_kimi.train.evaluation.report import EvaluationReport
from exo_kimi.train.tasks.registry import SHARES
from exo_kimi.train.tasks.turn import draw

Say = Callable[[str], None]


def evaluate(
    directory: Path,
    *,
    against: Path | None,
    count: int,
    seed: int,
    adapter: Path | None = None,
    texts: int = 200,
    files: Sequence[Path] = (),
    max_tokens: int = 96,
    say: Say = lambda _: None,
) -> EvaluationReport:
    """Ask, judge and measure.

    Args:
        directory: any Kimi checkpoint; activations are float32.
        against: a reference checkpoint with the same vocabulary.
        adapter: of this checkpoint, asked and measured with; the reference is without.
        count: the most questions of each task.
        texts: held-out answers that perplexity, KL and loads are measured on.
        files: texts to measure those on instead.
        max_tokens: the most tokens of a reply.
        say: called with progress messages.

    Raises:
        CheckpointError, TokenizerError, TemplateError: the directory cannot be read, or the reference has another tokenizer.
        UsageError: a text cannot be read, or the reference has another vocabulary.
    """
    if against is not None:
        check_same_vocabulary(Checkpoint(directory), Checkpoint(against))
    encoder = Encoder.from_directory(directory)
    model = load(directory, dtype="float32")
    own = None if adapter is None else resolve_adapter(adapter, Checkpoint(directory))
    if own is not None:
        adapt(model, own)
    subject = ModelReplier(
        model=model,
        tokenizer=encoder.tokenizer,
        template=encoder.template,
        max_tokens=max_tokens,
    )
    cases = question_cases(count, seed)
    say(f"{len(cases)} questions")
    by_task: dict[str, list[bool]] = {}
    wrong: list[tuple[str, str, str]] = []
    answers = subject.answer([(case.messages, None) for case in cases])
    for case, reply in zip(cases, answers, strict=True):
        right = reply.content in case.accepted and not reply.calls
        by_task.setdefault(case.task, []).append(right)
        if not right:
            wrong.append((case.messages[-1]["content"], case.accepted[0], f"<{reply.reasoning}> {reply.content}"))
    used = _use_tools(subject, tool_cases(count, seed), say)
    del subject, model  # texts are read a layer at a time
    measured_texts = read_texts(files, encoder) if files else held_out_texts(encoder, texts, seed)
    say(f"{len(measured_texts)} texts")
    walks = [LayerWalk(checkpoint=Checkpoint(directory), dtype="float32", change=None if own is None else _with(own))]
    walks += [] if against is None else [LayerWalk(checkpoint=Checkpoint(against), dtype="float32")]
    measured = likelihood(walks[0], measured_texts, walks[1] if len(walks) > 1 else None)
    return EvaluationReport(
        directory=str(directory) if adapter is None else f"{directory} with {adapter}",
        against=None if against is None else str(against),
        tasks={task: score(results) for task, results in by_task.items()},
        calls_valid=score(used.valid),
        calls_right=score(used.called),
        results_used=score(used.used),
        think_closed=score([reply.closed for reply in answers] + used.closed),
        likelihood=measured,
        wrong=wrong + used.wrong,
    )


def _parsed(arguments: str) -> Any:
    """A call's arguments; None for text that is no JSON, which a model that forgot how to call writes."""
    try:
        return json.loads(arguments)
    except ValueError:
        return None


def _with(adapter: AdapterManifest) -> Change:
    """Puts an adapter into layers as they are loaded, one by one."""

    def change(layer: int, decoder: DecoderLayer) -> None:
        for path, arrays in arrays_of(adapter.read(layer, layer + 1)).items():
            owner, name = decoder, path.split(".")[3:]
            for step in name[:-1]:
                owner = owner[step]
            owner[name[-1]] = AdaptedLinear(owner[name[-1]], arrays)
        decoder.eval()

    return change


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


@dataclass(slots=True, kw_only=True)
class _ToolUse:
    """Of each request: a valid call, the right one, its result used, think tags closed; and what went wrong."""

    valid: list[bool] = field(default_factory=list)
    called: list[bool] = field(default_factory=list)
    used: list[bool] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)


def _use_tools(subject: ModelReplier, cases: list[ToolCase], say: Say) -> _ToolUse:
    say(f"{len(cases)} requests for tools")
    made = _ToolUse()
    asked = [tool_exchange(case.request, 0) for case in cases]
    replies = subject.answer([(messages[:1], case.tools) for messages, case in zip(asked, cases, strict=True)])
    for case, reply in zip(cases, replies, strict=True):
        arguments = [(call.name, _parsed(call.arguments)) for call in reply.calls]
        made.closed.append(reply.closed)
        made.valid.append(len(arguments) == 1 and arguments[0][1] is not None)
        made.called.append(arguments == [(case.request.tool, case.request.arguments)])
        if not made.called[-1]:
            made.wrong.append((case.request.question, str(case.request.arguments), f"{arguments} {reply.content}"))
    replies = subject.answer([(messages[:3], case.tools) for messages, case in zip(asked, cases, strict=True)])
    for case, reply in zip(cases, replies, strict=True):
        made.closed.append(reply.closed)
        made.used.append(all(part in reply.content for part in case.request.used))
        if not made.used[-1]:
            made.wrong.append((case.request.question, case.request.answer, reply.content))
    return made
