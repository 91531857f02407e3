"""Shape and schedule of a draft head's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import TARGET_KEY
from exo_kimi.checkpoint.tiny.draft import draft_raw_config


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRecipe:
    """What to train and how long.

    Args:
        steps: updates in all; the rate rises over `warmup_steps` and falls to zero from there on.
        rollout_steps: guesses of a chain that are trained together, each by `step_weight` of the one before.
        group_tokens: tokens of one update, approximately.
        rate: highest learning rate.
        draft_vocab_size: tokens that the head drafts, those that the assistant says most often; None for all.
        seed: of weights and texts.
    """

    steps: int = 700
    warmup_steps: int = 40
    rollout_steps: int = 4
    step_weight: float = 0.8
    group_tokens: int = 2048
    rate: float = 4e-3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    draft_vocab_size: int | None = 1024
    seed: int = 0

    def raw_config(self, target: KimiConfig, fingerprint: str) -> dict[str, Any]:
        """config.json of the head: MLA and the norms of EAGLE-3.1, with the target's widths."""
        size = None if self.draft_vocab_size is None else min(self.draft_vocab_size, target.vocab_size)
        raw = draft_raw_config(target, kind="mla", version="3.1", draft_vocab_size=size)
        return {**raw, TARGET_KEY: fingerprint}

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        rising = min(1.0, step / max(self.warmup_steps, 1))
        falling = (self.steps - step + 1) / max(self.steps - self.warmup_steps, 1)
        return self.rate * min(rising, falling)
