"""What is trained of an adapter, and how long: mlx-lm's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.adapters.config import FineTuneType
from exo_kimi.checkpoint.adapters.manifest import check_adaptable
from exo_kimi.errors import UsageError

ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "k_proj", "v_proj", "o_proj")
SHARED = ("gate_proj", "up_proj", "down_proj")
DEFAULT_KEYS = (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.shared_experts.{name}" for name in SHARED))
"""Attention and shared experts; not kv_b_proj, which mlx-lm holds as other modules. A layer has those of them that it has."""

NUM_LAYERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe:
    """Shape, data order and rate of an adapter's training.

    Args:
        fine_tune_type: `lora` or `dora`.
        rank: of the two matrices of each module.
        scale: of their product.
        dropout: of the inputs of adapters.
        keys: paths inside a layer, as `self_attn.o_proj`.
        num_layers: the last so many; -1 for all. None takes 16, or all where there are fewer.
        batch_size: rows of a step.
        learning_rate: of AdamW, the same in every step.
        iters: steps.
        max_seq_length: rows are cut there.
        grad_checkpoint: compute each layer again in the backward pass in place of keeping what it computed.
        seed: of first values, order and dropout.
    """

    fine_tune_type: FineTuneType = "lora"
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] = DEFAULT_KEYS
    num_layers: int | None = None
    batch_size: int = 4
    learning_rate: float = 1e-5
    iters: int = 1000
    max_seq_length: int = 2048
    grad_checkpoint: bool = False
    seed: int = 0

    def layers_of(self, config: KimiConfig) -> int:
        """How many of the last layers are adapted.

        Raises:
            UsageError: more than there are.
        """
        total = config.num_hidden_layers
        if self.num_layers is None:
            return min(NUM_LAYERS, total)
        if self.num_layers > total or self.num_layers == 0 or self.num_layers < -1:
            raise UsageError(
                "no such number of layers",
                expected=f"1 to {total}, or -1 for all",
                found=self.num_layers,
                where="--num-layers",
            )
        return total if self.num_layers == -1 else self.num_layers

    def modules(self, config: KimiConfig) -> tuple[ModuleSpec, ...]:
        """The modules that are adapted, in the order of the model.

        Raises:
            UsageError: a key names no module of those layers, or one that stays as it is: routers and routed experts.
        """
        first = config.num_hidden_layers - self.layers_of(config)
        chosen, used = [], set()
        for spec in stage_modules(config, 0, config.num_hidden_layers):
            key = spec.path.removeprefix(f"model.layers.{spec.layer}.")
            if spec.layer is None or spec.layer < first or key not in self.keys:
                continue
            reason = check_adaptable(spec)
            if reason is not None:
                raise UsageError(f"{key}: {reason}", where="--keys")
            chosen.append(spec)
            used.add(key)
        unknown = set(self.keys) - used - set(DEFAULT_KEYS)
        if unknown or not chosen:
            raise UsageError(
                "no layer that is trained has such a module",
                expected=f"as {', '.join(DEFAULT_KEYS)}",
                found=", ".join(sorted(unknown) or self.keys),
                where="--keys",
            )
        return tuple(chosen)
