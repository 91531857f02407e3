"""Shape and schedule of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.tiny.config import text_config

Matrices = Literal["muon", "adamw"]

_SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """Shape, schedule and seed of a training.

    Args:
        steps: updates in all; the rate rises over `warmup_steps`, stays, and falls over the last `decay_share`.
        later_from: the step from which slow tasks are shown more often.
        last_from: the step from which tasks that are still below the rest are shown more often.
        group_tokens: tokens of one update, approximately.
        slow_from: the step from which the rate falls from `slow_rate` to zero instead: sums are learnt at small rates only.
        rate: highest learning rate, of both optimizers, since Muon's update is scaled to AdamW's.
        aware_share: share of the steps, the last ones, in which experts are rounded to INT4 in the forward pass.
        bias_rate: how far an expert's correction bias moves against its load in a step. Source: "DeepSeek-V3", 2.1.2.
        matrices: the optimizer of the matrices.
        ranks: ordinary tokens of the vocabulary.
        shape: keys of config.json.
    """

    steps: int = 4000
    warmup_steps: int = 60
    decay_share: float = 0.725
    later_from: int = 1100
    last_from: int = 3200
    slow_from: int = 1600
    slow_rate: float = 1.6e-3
    group_tokens: int = 2048
    rate: float = 4e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    aware_share: float = 0.12
    bias_rate: float = 1e-3
    matrices: Matrices = "muon"
    ranks: int = 2000
    seed: int = 0
    shape: dict[str, Any] = field(default_factory=lambda: dict(_SHAPE))

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json of the model, without a quantization."""
        return text_config({**self.shape, "vocab_size": self.ranks + 256}, dtype="BF16")

    @property
    def config(self) -> KimiConfig:
        """The model's architecture."""
        return KimiConfig.from_dict(self.raw_config, where="the recipe")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        if step > self.slow_from:
            return self.slow_rate * (self.steps - step + 1) / (self.steps - self.slow_from)
        rising = min(1.0, step / max(self.warmup_steps, 1))
        falling = (self.steps - step + 1) / max(self.decay_share * self.steps, 1)
        return self.rate * min(rising, max(min(falling, 1.0), 0.0))

    def is_aware(self, step: int) -> bool:
        """Whether experts are rounded to INT4 in this step."""
        return step > self.steps * (1 - self.aware_share)
