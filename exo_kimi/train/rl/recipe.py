"""Options of a GRPO training, named as TRL's `GRPOConfig` and verl's rollout correction name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from exo_kimi.errors import UsageError
from exo_kimi.train.recipe import Matrices
from exo_kimi.train.rl.prompts import FOCUSED_SHARES

ScaleRewards = Literal["group", "none"]

_COUNTS = ("steps", "prompts_per_step", "max_completion_length", "max_waves", "num_iterations", "weight_sync_steps")
TEMPERATURE = 1.0
"""Of all rollouts. The engine tells log-probabilities of the raw logits, which are the sampler's own at this one only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoRecipe:
    """Schedule, objective, prompts and seed of a training.

    Args:
        steps: rounds of rollouts, each followed by `num_iterations` updates.
        prompts_per_step: groups of one wave of rollouts.
        num_generations: completions of a group.
        max_completion_length: tokens of a completion at most.
        max_waves: waves of a step at most. A step draws another while it has fewer than half of `prompts_per_step` mixed groups:
            dynamic sampling, as DAPO calls it.
        num_iterations: updates on one step's completions; the ratios of the first are 1.
        epsilon, epsilon_high: a ratio earns nothing outside of 1 - epsilon to 1 + epsilon_high. Source: "DAPO", section 3.1.
        beta: weight of the KL divergence to the reference, which is the checkpoint that the training began from.
        importance_sampling_correction: weigh each token with the trainer's probability over the sampler's.
        importance_sampling_clip_max: the most of that weight: truncated importance sampling, token by token.
        scale_rewards: what a group's advantages are divided by: its standard deviation, or nothing.
        weight_sync_steps: how often the sampler gets the current weights; beyond 1 it is stale.
        learning_rate: highest, of both optimizers; rises over `warmup_steps` and falls over the last `decay_share` of the steps.
        bias_rate: how far an expert's correction bias moves against its load in an update.
        matrices: the optimizer of the matrices.
        replay_tokens: of supervised texts in each update, approximately; 0 for none.
        replay_weight: of their mean loss beside the objective.
        reward_weights: of right answers, of the format, of the length.
        shares: of the kinds of prompts, see `prompts.KINDS`.
    """

    steps: int = 60
    prompts_per_step: int = 12
    num_generations: int = 8
    max_completion_length: int = 64
    max_waves: int = 1
    num_iterations: int = 2
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    beta: float = 0.04
    importance_sampling_correction: bool = True
    importance_sampling_clip_max: float = 2.0
    scale_rewards: ScaleRewards = "group"
    weight_sync_steps: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 4
    decay_share: float = 0.5
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    bias_rate: float = 1e-4
    matrices: Matrices = "muon"
    replay_tokens: int = 2048
    replay_weight: float = 1.0
    reward_weights: tuple[float, float, float] = (1.0, 0.1, 0.1)
    shares: dict[str, float] = field(default_factory=lambda: dict(FOCUSED_SHARES))
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            **dict.fromkeys(_COUNTS, 1),
            "num_generations": 2,  # a group is compared with itself
            "epsilon": 0,
            "epsilon_high": 0,
            "beta": 0,
            "importance_sampling_clip_max": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name} cannot be used", expected=f"at least {value}", found=getattr(self, name))

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        rising = min(1.0, step / max(self.warmup_steps, 1))
        falling = (self.steps - step + 1) / max(self.decay_share * self.steps, 1)
        return self.learning_rate * min(rising, falling, 1.0)
