"""The training loop of a draft head: resumable, and the same for the same seed on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.draft_config import DraftConfig, DraftLatent
from exo_kimi.arch.draft_modules import draft_modules
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.errors import UsageError
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import training_groups
from exo_kimi.train.data.conversations import training_conversation
from exo_kimi.train.draft.batches import DraftLesson, TargetModel, make_lesson, softmax
from exo_kimi.train.draft.recipe import DraftRecipe
from exo_kimi.train.draft.rollout import rollout
from exo_kimi.train.model.layers import Floats, Parameters, add_gradient
from exo_kimi.train.optimizers import Optimizer, clip
from exo_kimi.train.resumable import ResumableTraining
from exo_kimi.train.trainer import one_blas_thread

_WORKERS = 2
_SAMPLED_TEXTS = 3000
"""Texts that say which tokens the assistant says most often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftProgress:
    """One step, as it is reported: cross entropy with the target in nats a judged guess, shares of guesses that are the target's
    first choice by step of the chain, norm of the gradients before clipping, tokens read."""

    step: int
    loss: float
    right: tuple[float, ...]
    norm: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    loss: float
    judged: NDArray[np.int64]
    right: NDArray[np.int64]
    gradients: Parameters
    tokens: int


class DraftTrainer(ResumableTraining):
    """A training: the head's parameters, the optimizer and the step it has reached.

    Args:
        recipe: how long.
        config: of the head.
        target: that it drafts for.
        encoder: encodes the texts.
        target_ids: (draft vocab,) which tokens of the target it drafts, ascending.
    """

    def __init__(
        self,
        recipe: DraftRecipe,
        config: DraftConfig,
        target: TargetModel,
        encoder: Encoder,
        target_ids: NDArray[np.int64],
    ) -> None:
        if not isinstance(config.attention, DraftLatent):
            raise UsageError("only heads with MLA are trained here", found=config.architecture)
        self.recipe, self.config, self.target, self.target_ids = recipe, config, target, target_ids
        self.parameters = first_values(config, target.parameters, target_ids, recipe.seed)
        self.step = 0
        self.losses: list[float] = []
        self._encoder = encoder
        self._wavelengths = np.array(Rope.of(config.attention).wavelengths)
        self._optimizer = Optimizer(
            self.parameters,
            is_matrix=lambda name: "_proj" in name or name.startswith("fc."),
            decays=lambda name: "norm" not in name,
            weight_decay=recipe.weight_decay,
        )

    def run(self, report: Callable[[DraftProgress], None], *, until: int | None = None) -> None:
        """Train on from the step it has reached, to the end of the recipe or to step `until`."""
        last = self.recipe.steps if until is None else until
        groups = training_groups(self._encoder, self.recipe.seed + 1000, self.recipe.group_tokens, start=self.step)
        with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
            coming = pool.submit(next, groups)
            while self.step < last:
                group = coming.result()
                coming = pool.submit(next, groups)
                # Every worker takes each second conversation by length: the same work, and sums in a fixed order.
                ordered = sorted(group, key=lambda item: len(item.ids))
                report(self._update([ordered[worker::_WORKERS] for worker in range(_WORKERS)], pool))

    def lesson(self, texts: Sequence[Encoded]) -> DraftLesson:
        """The target's run over texts, and the head's rollout over them."""
        return make_lesson(texts, self.target, steps=self.recipe.rollout_steps)

    def _update(self, parts: Sequence[Sequence[Encoded]], pool: ThreadPoolExecutor) -> DraftProgress:
        outcomes = list(pool.map(self._learn, [part for part in parts if part]))
        judged, right = (sum(getattr(each, name) for each in outcomes) for name in ("judged", "right"))
        gradients, *others = (outcome.gradients for outcome in outcomes)
        for other in others:
            for name, value in other.items():
                add_gradient(gradients, name, value)
        for value in gradients.values():
            value /= np.float32(max(judged[0], 1))
        norm = clip(gradients, self.recipe.clip_norm)
        self.step += 1
        self._optimizer.update(gradients, rate=self.recipe.rate_at(self.step), step=self.step)
        self.losses.append(sum(outcome.loss for outcome in outcomes) / max(int(judged.sum()), 1))
        return DraftProgress(
            step=self.step,
            loss=self.losses[-1],
            right=tuple((right / np.maximum(judged, 1)).tolist()),
            norm=norm,
            tokens=sum(outcome.tokens for outcome in outcomes),
        )

    def _learn(self, texts: Sequence[Encoded]) -> _Outcome:
        lesson = self.lesson(texts)
        gradients: Parameters = {}
        logits, backward = rollout(self.parameters, gradients, self.config, self._wavelengths, lesson.rollout)
        loss, judged, right, d_logits = 0.0, [], [], []
        weight = 1.0
        for step, (given, lines) in enumerate(zip(logits, lesson.lines, strict=True)):
            told = lesson.teacher[lines]
            best = told.argmax(-1)
            wanted = softmax(told[:, self.target_ids])
            # What the head cannot draft it need not learn.
            known = np.isin(best, self.target_ids)
            guessed = softmax(given)
            chosen = self.target_ids[given.argmax(-1)]
            loss -= float((wanted * np.log(guessed + np.float32(1e-20)))[known].sum())
            judged.append(len(best))
            right.append(int((chosen == best).sum()))
            guessed -= wanted
            guessed *= (known * np.float32(weight))[:, None]
            d_logits.append(guessed)
            weight *= self.recipe.step_weight if step < self.recipe.rollout_steps else 1.0
        backward(d_logits)
        return _Outcome(
            loss=loss,
            judged=np.array(judged),
            right=np.array(right),
            gradients=gradients,
            tokens=len(lesson.rollout.features),
        )


def first_values(config: DraftConfig, target: Parameters, target_ids: NDArray[np.int64], seed: int) -> Parameters:
    """Seeded first values: output head and norm are the target's, what writes to the residual begins at zero. There is no
    embedding: it is the target's."""
    rng = np.random.default_rng([seed, 11])
    values: Parameters = {}
    for spec in draft_modules(config):
        name = f"{spec.path}.weight"
        if spec.path == "embed_tokens":
            continue
        if spec.path == "lm_head":
            values[name] = np.ascontiguousarray(target["lm_head.weight"][target_ids])
        elif spec.path == "norm":
            values[name] = target["model.norm.weight"].copy()
        elif spec.kind == "norm":
            values[name] = np.ones(spec.shape, np.float32)
        elif spec.path.endswith(("o_proj", "down_proj")):
            values[name] = np.zeros(spec.shape, np.float32)
        else:
            values[name] = _normal(rng, spec.shape)
    return values


def common_tokens(encoder: Encoder, count: int, seed: int) -> NDArray[np.int64]:
    """The tokens that the assistant says most often in the training's texts, ascending; those of one count by their ids."""
    rng = Random(f"draft vocabulary {seed}")
    said = np.zeros(encoder.tokenizer.vocab_size, np.int64)
    for _ in range(_SAMPLED_TEXTS):
        text = encoder.encode(training_conversation(rng))
        np.add.at(said, text.ids[text.counted], 1)
    return np.sort(np.argsort(-said, kind="stable")[:count]).astype(np.int64)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.6 * shape[-1] ** -0.5)
