"""The GRPO objective and its gradient, in NumPy.

    loss = mean over tokens of mixed groups of  -w min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
         + beta mean over all tokens of          exp(ref - p) - (ref - p) - 1

    r = exp(p - old)                        p, old, ref: log-probabilities of the token by the policy, by the policy before the
    w = min(exp(old - sampler), clip_max)   step's updates, by the reference; sampler: by the engine that drew it

w is not differentiated. Axes: M tokens, V vocabulary.

Source: "DeepSeekMath" 4.1; "DAPO" 3.1 and 3.3 (clip-higher, mean over tokens); "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training", Yao et al. 2025 (truncated importance sampling, token by token); k3 of "Approximating KL Divergence",
Schulman 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from exo_kimi.train.model.forward import Ids
from exo_kimi.train.model.layers import Floats

_MOST_LOG_RATIO = np.float32(20)
"""A logarithm of a ratio is cut there, so that no exponential overflows. Source: verl `SAFETY_BOUND`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOptions:
    """Of `GrpoRecipe`, what the objective needs."""

    epsilon: float
    epsilon_high: float
    beta: float
    importance_sampling_correction: bool
    importance_sampling_clip_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionTokens:
    """What is known of (M,) tokens of completions before an update.

    Args:
        mixed: of groups that are neither all right nor all wrong; the others only feel the KL divergence.
        advantages: of each token's completion.
        sampler: log-probabilities by the engine that drew the tokens.
        reference: by the reference.
    """

    mixed: NDArray[np.bool_]
    advantages: Floats
    sampler: Floats
    reference: Floats

    @property
    def policy_tokens(self) -> int:
        """How many are of mixed groups."""
        return int(self.mixed.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSums:
    """Sums over tokens: parts of a batch add up.

    Args:
        tokens, policy_tokens: all, and those of mixed groups.
        policy_loss: over those of mixed groups.
        kl, entropy: over all; in nats.
        clipped: of mixed groups, how many ratios earned nothing more.
        weight, capped: over mixed groups, importance weights after the cap, and how many were cut.
        difference: |old - sampler| over all.
    """

    tokens: int = 0
    policy_tokens: int = 0
    policy_loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: int = 0
    weight: float = 0.0
    capped: int = 0
    difference: float = 0.0

    def __add__(self, other: ObjectiveSums) -> ObjectiveSums:
        return ObjectiveSums(
            **{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        )

    def loss(self, beta: float) -> float:
        """The objective, in which both parts are means."""
        return self.policy_loss / max(self.policy_tokens, 1) + beta * self.kl / max(self.tokens, 1)


def log_probabilities(logits: Floats, targets: Ids) -> Floats:
    """(M,) log-softmax of (M, V) at the targets."""
    top = logits.max(-1)
    total = np.log(np.exp(logits - top[:, None]).sum(-1))
    chosen: Floats = logits[np.arange(len(targets)), targets] - top - total
    return chosen


def importance_weights(old: Floats, sampler: Floats, options: ObjectiveOptions) -> tuple[Floats, NDArray[np.bool_]]:
    """(M,) truncated weights, and which of them were cut; all 1 without the correction."""
    if not options.importance_sampling_correction:
        return np.ones_like(old), np.zeros(len(old), bool)
    ratios = np.exp(np.clip(old - sampler, -_MOST_LOG_RATIO, _MOST_LOG_RATIO))
    most = np.float32(options.importance_sampling_clip_max)
    return np.minimum(ratios, most), ratios > most


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectivePart:
    """What a part of a batch gives: its sums, the gradient (M, V) of the whole batch's loss by its logits, and (M,) the
    log-probabilities by the policy."""

    sums: ObjectiveSums
    d_logits: Floats
    log_probabilities: Floats


def objective(
    logits: Floats,
    targets: Ids,
    known: CompletionTokens,
    old: Floats | None,
    options: ObjectiveOptions,
    *,
    counts: tuple[int, int],
) -> ObjectivePart:
    """The objective on a part of a batch.

    Args:
        logits: (M, V) by the policy; their memory is used.
        targets: (M,) the tokens.
        known: of them.
        old: (M,) log-probabilities before the step's updates; None in the first, where they are the policy's own.
        counts: tokens of the whole batch, of mixed groups and in all, by which its means divide.
    """
    rows = np.arange(len(targets))
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[rows, targets].copy()
    probabilities = np.exp(logits)
    total = probabilities.sum(-1, keepdims=True)
    probabilities /= total
    log_total = np.log(total[:, 0])
    p = chosen - log_total
    old = p if old is None else old
    entropy = log_total - np.einsum("mv,mv->m", probabilities, logits)

    ratio = np.exp(np.clip(p - old, -_MOST_LOG_RATIO, _MOST_LOG_RATIO))
    kept = np.clip(ratio, np.float32(1 - options.epsilon), np.float32(1 + options.epsilon_high))
    weight, capped = importance_weights(old, known.sampler, options)
    free, bounded = ratio * known.advantages, kept * known.advantages
    clipped = bounded < free
    policy_loss = -weight * np.minimum(free, bounded)

    away = np.clip(known.reference - p, -_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    far = np.exp(away)
    kl = far - away - 1

    mixed = known.mixed
    of_policy, of_all = (np.float32(1 / max(count, 1)) for count in counts)
    d_p = np.where(mixed & ~clipped, -weight * free, np.float32(0)) * of_policy
    d_p += np.float32(options.beta) * (1 - far) * of_all
    probabilities *= -d_p[:, None]
    probabilities[rows, targets] += d_p
    sums = ObjectiveSums(
        tokens=len(targets),
        policy_tokens=int(mixed.sum()),
        policy_loss=_sum(policy_loss[mixed]),
        kl=_sum(kl),
        entropy=_sum(entropy),
        clipped=int((clipped & mixed).sum()),
        weight=_sum(weight[mixed]),
        capped=int((capped & mixed).sum()),
        difference=_sum(np.abs(old - known.sampler)),
    )
    return ObjectivePart(sums=sums, d_logits=probabilities, log_probabilities=p)


def _sum(values: Floats) -> float:
    return float(values.sum(dtype=np.float64))
