"""How many tokens a step a draft head gives its target, greedily, on held-out questions: by kind of text, and by guess.

A step of the target verifies a chain of guesses: those that are right are kept, up to the first that is not, and one token of the
target's own follows. So n right guesses are n + 1 tokens of that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from exo_kimi.arch.draft_config import DraftConfig, DraftLatent
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.compare.greedy import greedy
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.errors import UsageError
from exo_kimi.models.draft_head import DraftHead
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.models.rope import Rope
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.draft.batches import TargetModel, make_lesson
from exo_kimi.train.draft.rollout import rollout
from exo_kimi.train.evaluation.cases import question_cases, tool_cases
from exo_kimi.train.export import read_parameters
from exo_kimi.train.model.layers import Parameters

STEPS = 3
MAX_TOKENS = 96
TOOL_CALLS = "tool calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class KindAcceptance:
    """Acceptance of one kind of text.

    Args:
        kind: a task of the tiny Kimi, or tool calls.
        texts: replies.
        tokens: of them, but for the first of each, which the prompt's own step gives.
        steps: of the target that they took.
        tried: of each guess of the chain, how often it came to it: the guesses before it were right.
        right: of each, how often it was right.
    """

    kind: str
    texts: int
    tokens: int
    steps: int
    tried: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def tokens_per_step(self) -> float:
        """1 for no guess that is right, and one more than the length of the chain at most."""
        return self.tokens / self.steps if self.steps else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceReport:
    """Of all kinds, and in sum."""

    directory: str
    draft: str
    kinds: tuple[KindAcceptance, ...]

    @property
    def total(self) -> KindAcceptance:
        """All texts together."""
        return _summed("all", self.kinds)

    def to_text(self) -> str:
        """A table for people."""
        rows = [f"{'kind of text':<16} {'texts':>6} {'tokens':>7} {'a step':>7}   right, of those tried"]
        for each in (*self.kinds, self.total):
            shares = " ".join(f"{r / t:.2f}" if t else "-" for r, t in zip(each.right, each.tried, strict=True))
            rows.append(f"{each.kind:<16} {each.texts:>6} {each.tokens:>7} {each.tokens_per_step:>7.2f}   {shares}")
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        kinds = {
            each.kind: {**asdict(each), "tokens_per_step": each.tokens_per_step} for each in (*self.kinds, self.total)
        }
        return {"directory": self.directory, "draft": self.draft, "greedy": True, "chain": STEPS, "kinds": kinds}


def measure_acceptance(directory: Path, draft: Path, *, count: int, seed: int) -> AcceptanceReport:
    """Let a target reply to held-out questions, greedily and in float32, and count what a head would have guessed of it.

    Args:
        directory: the target, small enough for memory.
        draft: of its head.
        count: the most questions of each kind.
        seed: of the questions.

    Raises:
        CheckpointError: one of them cannot be read, or the head is not for the target.
        UsageError: the head has another kind of attention than its target.
    """
    checkpoint = Checkpoint(directory)
    head = load_draft_head(draft, checkpoint, dtype="float32")
    target = read_target(checkpoint, head.config)
    texts = replies(load(directory, dtype="float32"), Encoder.from_directory(directory), count=count, seed=seed)
    ids = np.array(head.to_target_ids(mx.arange(head.config.draft_vocab_size))).astype(np.int64)
    kinds = accepted(head_parameters(head, checkpoint), head.config, target, texts, ids)
    return AcceptanceReport(directory=str(directory), draft=str(draft), kinds=kinds)


def read_target(checkpoint: Checkpoint, head: DraftConfig) -> TargetModel:
    """A target in NumPy.

    Raises:
        CheckpointError: it cannot be read, or has not the head's layers.
    """
    config = checkpoint.config
    return TargetModel(
        parameters=read_parameters(checkpoint.directory),
        config=config,
        wavelengths=np.array(Rope.of(config).wavelengths),
        layers=head.feature_layers(config.num_hidden_layers),
    )


def head_parameters(head: DraftHead, target: Checkpoint) -> Parameters:
    """Float32 values of a head by the names of its modules; its output head is the target's where it has none."""
    values: Parameters = {}
    for path, module in head.named_modules():
        if "weight" not in module:
            continue
        weight = module["weight"]
        if "scales" in module:
            biases = module.get("biases")
            weight = mx.dequantize(weight, module.scales, biases, group_size=module.group_size, bits=module.bits)
        values[f"{path}.weight"] = np.array(weight.astype(mx.float32))
    if "lm_head.weight" not in values:
        last = target.config.num_hidden_layers
        model = load(target.directory, last - 1, last, dtype="float32")
        values["lm_head.weight"] = np.array(dict(tree_flatten(model.parameters()))["lm_head.weight"])
    return values


def replies(model: Model, encoder: Encoder, *, count: int, seed: int) -> dict[str, list[Encoded]]:
    """Greedy replies to held-out questions with their prompts, by kind; the reply's tokens are those that count."""
    asked: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]] = [
        (case.task, case.messages, None) for case in question_cases(count, seed)
    ]
    asked += [
        (TOOL_CALLS, [{"role": "user", "content": case.request.question}], case.tools)
        for case in tool_cases(-(-count // 3), seed)
    ]
    prompts = [encoder.template.render(messages, tools).ids for _, messages, tools in asked]
    made = greedy(model, prompts, stop_ids=encoder.tokenizer.stop_ids, max_tokens=MAX_TOKENS)
    end = encoder.tokenizer.special["<|im_end|>"]
    found: dict[str, list[Encoded]] = {}
    for (kind, _, _), prompt, reply in zip(asked, prompts, made, strict=True):
        ids = [*prompt, *reply] + ([end] if len(reply) < MAX_TOKENS else [])
        counted = np.arange(len(ids)) >= len(prompt)
        found.setdefault(kind, []).append(Encoded(ids=np.array(ids, np.int32), counted=counted, domain=kind))
    return found


def accepted(
    parameters: Parameters,
    config: DraftConfig,
    target: TargetModel,
    texts: dict[str, list[Encoded]],
    target_ids: NDArray[np.int64],
) -> tuple[KindAcceptance, ...]:
    """Count along replies.

    Args:
        parameters: of the head.
        config: of the head.
        target: that it drafts for.
        texts: by kind; what counts is the reply, at the end.
        target_ids: of every token of the head.

    Raises:
        UsageError: the head has another kind of attention than its target.
    """
    if not isinstance(config.attention, DraftLatent):
        raise UsageError(
            "only heads with MLA are measured here", found=config.architecture, fix="`exo-kimi bench drafts`"
        )
    wavelengths = np.array(Rope.of(config.attention).wavelengths)
    found = []
    for kind, some in texts.items():
        walks = [_walk(text, _right(parameters, config, wavelengths, target, text, target_ids)) for text in some]
        found.append(_summed(kind, walks))
    return tuple(found)


def _right(
    parameters: Parameters,
    config: DraftConfig,
    wavelengths: NDArray[np.float32],
    target: TargetModel,
    text: Encoded,
    target_ids: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """(rows, guesses) whether the guesses of a chain that begins at a row are the text's own tokens."""
    lesson = make_lesson([text], target, steps=STEPS)
    logits, _ = rollout(parameters, {}, config, wavelengths, lesson.rollout)
    right = np.zeros((len(text.ids), STEPS), bool)
    for step, (given, judged) in enumerate(zip(logits, lesson.rollout.judged, strict=True)):
        rows = judged if step == 0 else lesson.rollout.going[judged]
        right[rows, step] = target_ids[given.argmax(-1)] == text.ids[rows + 2 + step]
    return right


def _walk(text: Encoded, right: NDArray[np.bool_]) -> KindAcceptance:
    """Go along one reply as drafting does."""
    first, last = int(np.argmax(text.counted)), len(text.ids) - 1
    place, steps = first, 0
    tried, hits = [0] * STEPS, [0] * STEPS
    while place < last:
        kept = 0
        # A guess beyond the end of the text is none.
        while kept < STEPS and place + 1 + kept <= last:
            tried[kept] += 1
            if not right[place - 1, kept]:
                break
            hits[kept] += 1
            kept += 1
        place, steps = place + kept + 1, steps + 1
    return KindAcceptance(
        kind=text.domain, texts=1, tokens=last - first, steps=steps, tried=tuple(tried), right=tuple(hits)
    )


def _summed(kind: str, parts: Sequence[KindAcceptance]) -> KindAcceptance:
    tried, right = (
        tuple(sum(getattr(part, name)[guess] for part in parts) for guess in range(STEPS))
        for name in ("tried", "right")
    )
    return KindAcceptance(
        kind=kind,
        texts=sum(part.texts for part in parts),
        tokens=sum(part.tokens for part in parts),
        steps=sum(part.steps for part in parts),
        tried=tried,
        right=right,
    )
