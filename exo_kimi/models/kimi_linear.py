"""Kimi Linear for any range of layers, on mlx-lm's contract: layers of Kimi Delta Attention, and between them a few of latent
attention without positions.

All but the attention of a layer is that of `kimi_k2`; attribute names are the checkpoint keys.

Source: "Kimi Linear", arXiv 2510.26692; KimiLinearForCausalLM in transformers. Of two rules for the correction bias this is
that of transformers, sglang and mlx-lm: it takes part in the choice of experts alone. The published remote code adds it to the
scores in place, so that biased scores weigh there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from exo_kimi.arch.config import KimiConfig
from exo_kimi.models import kimi_k2
from exo_kimi.models.features import FeatureTap
from exo_kimi.models.kda.attention import DeltaAttention
from exo_kimi.models.kda.recurrent_cache import RecurrentCache
from exo_kimi.models.mla import Attention
from exo_kimi.models.rope import Rope

__all__ = ["KimiLinear", "Model", "ModelArgs"]

ModelArgs = KimiConfig


class LinearDecoderLayer(kimi_k2.DecoderLayer):
    """h + mlp(norm(h)) with h = x + attention(norm(x)), of either kind."""

    @staticmethod
    def attention(config: KimiConfig, layer: int, rope: Rope | None) -> Any:
        """As of every layer by its number."""
        if config.linear_attention is not None and config.is_linear(layer):
            return DeltaAttention(config, config.linear_attention)
        return Attention(config, rope)


class KimiLinearModel(kimi_k2.KimiK2Model):
    """The decoder without its head."""

    layer_type: ClassVar = LinearDecoderLayer


class KimiLinear(kimi_k2.Model):
    """A Kimi Linear, or the stage of it that owns the layers `start_layer` to `end_layer`; see `kimi_k2.Model`."""

    decoder_type: ClassVar = KimiLinearModel

    def forward_ragged(
        self,
        x: mx.array,
        segments: Sequence[tuple[int, Sequence[Any]]],
        *,
        asked: Sequence[int] | None = None,
        tap: FeatureTap | None = None,
    ) -> mx.array:
        """As of `kimi_k2.Model`; states can be taken back to what they were before."""
        for _, caches in segments:
            for cache in caches:
                if isinstance(cache, RecurrentCache):
                    cache.begin_pass()
        return super().forward_ragged(x, segments, asked=asked, tap=tap)


Model = KimiLinear
"""As mlx-lm calls it."""
