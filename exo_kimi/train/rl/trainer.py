"""The GRPO loop: rollouts by the engine on the exported weights, rewards, and a few updates of the policy that drew them.

Resumable, and the same for the same seed on the same machine: prompts and seeds of a step are a function of the recipe's seed and
the step, and so is everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.config import KimiConfig
from exo_kimi.chat.template import Prompt
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.compare.replies import parse_reply
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import make_batch, training_groups
from exo_kimi.train.export import read_parameters, write_checkpoint
from exo_kimi.train.model.forward import Batch, forward_pass, loss_and_gradients, next_logits
from exo_kimi.train.model.layers import Floats, Parameters, add_gradient
from exo_kimi.train.model.parameters import BIAS, decays, fake_quant, is_expert, is_matrix
from exo_kimi.train.optimizers import Optimizer, clip
from exo_kimi.train.resumable import ResumableTraining
from exo_kimi.train.rl.advantages import GroupCounts, count_group, group_advantages
from exo_kimi.train.rl.objective import (
    CompletionTokens,
    ObjectiveOptions,
    ObjectivePart,
    ObjectiveSums,
    log_probabilities,
    objective,
)
from exo_kimi.train.rl.prompts import FOCUS, RewardedPrompt, draw_prompt
from exo_kimi.train.rl.recipe import GrpoRecipe
from exo_kimi.train.rl.rewards import Rewards, reward
from exo_kimi.train.rl.rollouts import Completion, RolloutRequest, RolloutSampler
from exo_kimi.train.trainer import balance, one_blas_thread, summed

_WORKERS = 2
_WHOLE = ("step", "mixed", "all_right", "all_wrong", "tokens")
_ENOUGH = 0.5
"""Of `prompts_per_step`: a step with so many mixed groups draws no other wave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoProgress:
    """One step, as it is reported and drawn.

    Args:
        step: counted from 1.
        reward: mean of all completions.
        right: share of right completions, of all kinds; `focus_right` of the focus; NaN where none was asked.
        mixed, all_right, all_wrong: groups.
        loss: of the objective in the first update of the step.
        kl, entropy: nats a token, in the last update.
        clipped: share of ratios that earned nothing more, in the last update.
        weight, capped: mean importance weight, and the share that was cut.
        difference: mean |trainer - sampler| of log-probabilities, in nats.
        norm: of the gradients before clipping, in the last update.
        length: mean tokens of a completion; `truncated` is the share that did not end.
        tokens: drawn.
        rollout_s, process_s: seconds of the rollouts; processor seconds of the whole step, all threads together.
    """

    step: int
    reward: float
    right: float
    focus_right: float
    mixed: int
    all_right: int
    all_wrong: int
    loss: float
    kl: float
    entropy: float
    clipped: float
    weight: float
    capped: float
    difference: float
    norm: float
    length: float
    truncated: float
    tokens: int
    rollout_s: float
    process_s: float

    @classmethod
    def of(cls, row: Sequence[float]) -> GrpoProgress:
        """The figures of a saved step, in the order of the fields."""
        values: dict[str, Any] = dict(zip(cls.__slots__, row, strict=True))
        return cls(**{**values, **{name: int(values[name]) for name in _WHOLE}})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rollout:
    """One completion of a step, with its rewards."""

    prompt: RewardedPrompt
    prompt_ids: tuple[int, ...]
    completion: Completion
    rewards: Rewards
    closed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """All completions of a step, by groups, and how many of them are mixed."""

    groups: list[list[_Rollout]]
    counts: GroupCounts

    @property
    def rollouts(self) -> list[_Rollout]:
        return [each for group in self.groups for each in group]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one worker learns from: a batch, and what is known of its tokens."""

    batch: Batch
    known: CompletionTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """Sums of the objective in one update, and the norm of the gradients before clipping; the defaults are those of none."""

    sums: ObjectiveSums = field(default_factory=ObjectiveSums)
    norm: float = 0.0


class GrpoTrainer(ResumableTraining):
    """A training: the policy's parameters, its optimizer, and the step it has reached.

    Args:
        recipe: what to do and how long.
        directory: the checkpoint that it begins from, which stays the reference.
        scratch: where the sampler's weights are written.
        stages: of the sampler's engine.
    """

    def __init__(self, recipe: GrpoRecipe, directory: Path, scratch: Path, *, stages: int = 1) -> None:
        self.recipe, self.directory, self.scratch = recipe, directory, scratch
        self.config: KimiConfig = Checkpoint(directory).config
        self.reference = read_parameters(directory)
        self.parameters = {name: value.copy() for name, value in self.reference.items()}
        self.step = 0
        self.losses: list[float] = []
        self.history: list[GrpoProgress] = []
        self._encoder = Encoder.from_directory(directory)
        self._wavelengths = np.array(Rope.of(self.config).wavelengths)
        self._options = ObjectiveOptions(
            epsilon=recipe.epsilon,
            epsilon_high=recipe.epsilon_high,
            beta=recipe.beta,
            importance_sampling_correction=recipe.importance_sampling_correction,
            importance_sampling_clip_max=recipe.importance_sampling_clip_max,
        )
        self._optimizer = Optimizer(
            {name: value for name, value in self.parameters.items() if is_trained(name)},
            is_matrix=lambda name: recipe.matrices == "muon" and is_matrix(name),
            decays=decays,
            weight_decay=recipe.weight_decay,
        )
        self._updates = 0
        self._sampler = RolloutSampler(
            directory=scratch,
            stop_ids=self._encoder.tokenizer.stop_ids,
            max_completion_length=recipe.max_completion_length,
            stages=stages,
        )

    def run(self, report: Callable[[GrpoProgress], None], *, until: int | None = None) -> None:
        """Train on from the step it has reached, to the end of the recipe or to step `until`."""
        last = self.recipe.steps if until is None else until
        with one_blas_thread(), ThreadPoolExecutor(_WORKERS) as pool:
            while self.step < last:
                self.history.append(self._advance(pool))
                report(self.history[-1])

    def export(self, directory: Path) -> None:
        """Write the policy in native INT4: what the sampler draws from."""
        write_checkpoint(directory, self.directory, self.parameters, layout="int4")

    def _more_state(self) -> dict[str, Any]:
        rows = [[getattr(step, name) for name in GrpoProgress.__slots__] for step in self.history]
        return {
            "history": np.array(rows, np.float64).reshape(len(rows), len(GrpoProgress.__slots__)),
            "updates": self._updates,
        }

    def _take_more_state(self, saved: Mapping[str, Any]) -> None:
        self._updates = int(saved["updates"])
        self.history = [GrpoProgress.of(row) for row in saved["history"].tolist()]

    def _advance(self, pool: ThreadPoolExecutor) -> GrpoProgress:
        began_s, began_process_s = time.monotonic(), time.process_time()
        if self.step % self.recipe.weight_sync_steps == 0:
            self.export(self.scratch)
        drawn = self._draw()
        rollout_s = time.monotonic() - began_s
        parts = self._parts(drawn, pool)
        self.step += 1
        updates = self._learn(parts, pool) if parts else [_Update()]
        first, final = updates[0].sums, updates[-1].sums
        self.losses.append(first.loss(self.recipe.beta))
        rollouts = drawn.rollouts
        focus = [each.rewards.right for each in rollouts if each.prompt.kind == FOCUS]
        return GrpoProgress(
            step=self.step,
            reward=_mean([each.rewards.total(self.recipe.reward_weights) for each in rollouts]),
            right=_mean([each.rewards.right for each in rollouts]),
            focus_right=_mean(focus),
            mixed=drawn.counts.mixed,
            all_right=drawn.counts.all_right,
            all_wrong=drawn.counts.all_wrong,
            loss=self.losses[-1],
            kl=final.kl / max(final.tokens, 1),
            entropy=final.entropy / max(final.tokens, 1),
            clipped=final.clipped / max(final.policy_tokens, 1),
            weight=final.weight / max(final.policy_tokens, 1),
            capped=final.capped / max(final.policy_tokens, 1),
            difference=final.difference / max(final.tokens, 1),
            norm=updates[-1].norm,
            length=_mean([len(each.completion.ids) for each in rollouts]),
            truncated=_mean([not each.closed for each in rollouts]),
            tokens=sum(len(each.completion.ids) for each in rollouts),
            rollout_s=rollout_s,
            process_s=time.process_time() - began_process_s,
        )

    # Rollouts

    def _draw(self) -> _Drawn:
        recipe = self.recipe
        groups: list[list[_Rollout]] = []
        counts = GroupCounts()
        for wave in range(recipe.max_waves):
            rng = Random(f"grpo {recipe.seed} {self.step} {wave}")
            prompts = [draw_prompt(rng, recipe.shares) for _ in range(recipe.prompts_per_step)]
            rendered = [self._encoder.template.render(prompt.messages, prompt.tools) for prompt in prompts]
            requests = [
                RolloutRequest(
                    prompt_ids=tuple(text.ids), seeds=tuple(rng.getrandbits(63) for _ in range(recipe.num_generations))
                )
                for text in rendered
            ]
            for prompt, text, completions in zip(prompts, rendered, self._sampler.draw(requests), strict=True):
                groups.append([self._judge(prompt, text, completion) for completion in completions])
                counts += count_group([each.rewards.right for each in groups[-1]])
            if counts.mixed >= _ENOUGH * recipe.prompts_per_step:
                break
        return _Drawn(groups=groups, counts=counts)

    def _judge(self, prompt: RewardedPrompt, text: Prompt, completion: Completion) -> _Rollout:
        ended = completion.ids[-1] in self._encoder.tokenizer.stop_ids
        said = completion.ids[:-1] if ended else completion.ids
        reply = parse_reply(self._encoder.tokenizer, text, said, prompt.tools, ended=ended)
        rewards = reward(
            prompt,
            reply,
            tokens=len(completion.ids),
            usual_tokens=len(self._encoder.reply(prompt.reply, text.reasoning)),
            most_tokens=self.recipe.max_completion_length,
        )
        return _Rollout(
            prompt=prompt, prompt_ids=tuple(text.ids), completion=completion, rewards=rewards, closed=reply.closed
        )

    # Learning

    def _parts(self, drawn: _Drawn, pool: ThreadPoolExecutor) -> list[_Part]:
        """What the workers learn from: every second completion by length each, as in supervised training."""
        items: list[tuple[Encoded, bool, float, tuple[float, ...]]] = []
        for group in drawn.groups:
            mixed = count_group([each.rewards.right for each in group]).mixed == 1
            totals = [each.rewards.total(self.recipe.reward_weights) for each in group]
            advantages = group_advantages(totals, self.recipe.scale_rewards)
            for each, advantage in zip(group, advantages.tolist(), strict=True):
                ids = np.array([*each.prompt_ids, *each.completion.ids], np.int32)
                counted = np.arange(len(ids)) >= len(each.prompt_ids)
                items.append((Encoded(ids=ids, counted=counted), mixed, advantage, each.completion.logprobs))
        if self.recipe.beta == 0:
            items = [item for item in items if item[1]]
        if not any(mixed for _, mixed, _, _ in items):
            return []
        items.sort(key=lambda item: len(item[0].ids), reverse=True)  # as `make_batch` lays them out
        chosen = [part for worker in range(_WORKERS) if (part := items[worker::_WORKERS])]
        return list(pool.map(self._part, chosen))

    def _part(self, items: Sequence[tuple[Encoded, bool, float, tuple[float, ...]]]) -> _Part:
        batch = make_batch([encoded for encoded, _, _, _ in items])
        lengths = [int(encoded.counted.sum()) for encoded, _, _, _ in items]
        known = CompletionTokens(
            mixed=np.repeat([mixed for _, mixed, _, _ in items], lengths),
            advantages=np.repeat(np.array([advantage for _, _, advantage, _ in items], np.float32), lengths),
            sampler=np.concatenate([np.array(logprobs, np.float32) for _, _, _, logprobs in items]),
            reference=self._log_probabilities(self.reference, batch),
        )
        return _Part(batch=batch, known=known)

    def _log_probabilities(self, parameters: Parameters, batch: Batch) -> Floats:
        return log_probabilities(next_logits(parameters, self.config, self._wavelengths, batch), batch.targets)

    def effective(self) -> Parameters:
        """The parameters that the forward pass uses: routed experts as they are exported."""
        return {name: fake_quant(value) if is_expert(name) else value for name, value in self.parameters.items()}

    def _learn(self, parts: Sequence[_Part], pool: ThreadPoolExecutor) -> list[_Update]:
        """All updates of a step on its completions."""
        made, first = self._update(parts, [None] * len(parts), pool)
        old = [part.log_probabilities for part in made]
        return [first, *(self._update(parts, old, pool)[1] for _ in range(self.recipe.num_iterations - 1))]

    def _update(
        self, parts: Sequence[_Part], old: Sequence[Floats | None], pool: ThreadPoolExecutor
    ) -> tuple[list[ObjectivePart], _Update]:
        effective = self.effective()
        counts = (
            sum(part.known.policy_tokens for part in parts),
            sum(len(part.batch.targets) for part in parts),
        )

        def learn(part: _Part, before: Floats | None) -> tuple[ObjectivePart, Parameters, dict[int, NDArray[np.int64]]]:
            passed = forward_pass(effective, self.config, self._wavelengths, part.batch)
            made = objective(passed.logits, part.batch.targets, part.known, before, self._options, counts=counts)
            return made, passed.backward(made.d_logits), passed.loads

        outcomes = list(pool.map(learn, parts, old))
        gradients = summed([gradients for _, gradients, _ in outcomes])
        self._updates += 1
        if self.recipe.replay_tokens:
            self._replay(effective, gradients, pool)
        norm = clip(gradients, self.recipe.clip_norm)
        trained = {name: value for name, value in gradients.items() if is_trained(name)}
        self._optimizer.update(trained, rate=self.recipe.rate_at(self.step), step=self._updates)
        balance(self.parameters, [loads for _, _, loads in outcomes], self.recipe.bias_rate)
        sums = ObjectiveSums()
        for made, _, _ in outcomes:
            sums += made.sums
        return [made for made, _, _ in outcomes], _Update(sums=sums, norm=norm)

    def _replay(self, effective: Parameters, gradients: Parameters, pool: ThreadPoolExecutor) -> None:
        """Add the gradient of supervised texts, so that what they teach is not forgotten."""
        texts = next(
            training_groups(
                self._encoder,
                self.recipe.seed + 2000,
                self.recipe.replay_tokens,
                start=self._updates,
                parts_from=(0, 0),
            )
        )
        ordered = sorted(texts, key=lambda item: len(item.ids))
        batches = [make_batch(part) for worker in range(_WORKERS) if (part := ordered[worker::_WORKERS])]
        outcomes = list(
            pool.map(lambda batch: loss_and_gradients(effective, self.config, self._wavelengths, batch), batches)
        )
        scale = np.float32(self.recipe.replay_weight / sum(len(batch.targets) for batch in batches))
        for outcome in outcomes:
            for name, value in outcome.gradients.items():
                add_gradient(gradients, name, value * scale)


def is_trained(name: str) -> bool:
    """Whether the optimizer changes a parameter: not norms, by whose gains a draft head knows its target, and not the correction
    bias, which follows the loads."""
    return BIAS not in name and "norm" not in name


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
