"""What the layers of Kimi K3 have beside those of Kimi Linear, in numbers: planned and inspected, and not run yet.

Source: text_config of moonshotai/Kimi-K3's config.json; mlx-lm's kimi_k3 for names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exo_kimi.arch.numbers import is_number
from exo_kimi.errors import CheckpointError, ConfigError

_SIZES = ("routed_expert_hidden_size", "attn_res_block_size")
_SWITCHES = ("mla_use_output_gate", "latent_moe_use_norm")
KEYS = (*_SIZES, *_SWITCHES, "activation_situ_beta", "activation_situ_linear_beta")


@dataclass(frozen=True, slots=True, kw_only=True)
class K3Layers:
    """Experts in a latent space, attention over the residuals of blocks of layers, and gates of full rank.

    Args:
        routed_expert_hidden_size: width in which routed experts compute.
        attn_res_block_size: layers of a block, of which each adds a vector that later layers attend to.
    """

    routed_expert_hidden_size: int
    attn_res_block_size: int

    def link_vectors(self, layers: int) -> int:
        """Vectors of a token that the last boundary between stages carries: one for each block before it, and its own."""
        return -(-layers // self.attn_res_block_size) + 1


def decay_rows(heads: int) -> int:
    """Elements of a layer's A_log, which is padded: 128 for K3's 96 heads."""
    return 1 << (heads - 1).bit_length()


def read_k3_layers(text: Mapping[str, Any], where: object, problems: list[CheckpointError]) -> K3Layers | None:
    """Read the keys that K3 has beside Kimi Linear's; what is wrong is appended to `problems`."""
    linear = text.get("linear_attn_config")
    full_rank = linear.get("use_full_rank_gate") if isinstance(linear, Mapping) else None
    off = [key for key in _SWITCHES if text.get(key) is not True]
    off += [] if full_rank is True else ["linear_attn_config.use_full_rank_gate"]
    wrong = [key for key in _SIZES if not is_number(text.get(key), int) or text[key] < 1]
    if off or wrong:
        problems.append(
            ConfigError(
                "this is no Kimi K3 that is known",
                expected=f"true for {', '.join((*_SWITCHES, 'use_full_rank_gate'))}, and whole numbers for {', '.join(_SIZES)}",
                found=f"otherwise: {', '.join((*off, *wrong))}",
                where=where,
                fix="copy config.json from the source",
            )
        )
        return None
    return K3Layers(**{key: int(text[key]) for key in _SIZES})
