"""One layer with Kimi Delta Attention in both implementations, on the same arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.kimi_linear import KimiDeltaAttention
from mlx_lm.models.kimi_linear import ModelArgs as TheirArgs

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.tiny.config import text_config
from exo_kimi.models import projection
from exo_kimi.models.blocks import Span
from exo_kimi.models.decode import DecodeStep
from exo_kimi.models.kda.attention import DeltaAttention
from exo_kimi.models.kda.recurrent_cache import RecurrentCache


@dataclass(frozen=True, slots=True)
class DeltaLayers:
    """Both layers, with float32 weights, and what is in their caches."""

    config: KimiConfig
    ours: DeltaAttention
    theirs: KimiDeltaAttention

    @classmethod
    def random(cls, *, heads: int, head_dim: int, hidden: int) -> DeltaLayers:
        """Seeded weights; our projections of one input lie together, as a loaded model's do."""
        sizes = {"num_heads": heads, "head_dim": head_dim, "short_conv_kernel_size": 4}
        changes = {"hidden_size": hidden, "linear_attn_config": {**sizes, "kda_layers": [1], "full_attn_layers": [2]}}
        raw = text_config({"model_type": "kimi_linear", "num_hidden_layers": 2, **changes}, dtype="F32")
        config = KimiConfig.from_dict(raw)
        if config.linear_attention is None:
            raise ValueError("the configuration has no KDA layer")
        mx.random.seed(0)
        theirs = KimiDeltaAttention(TheirArgs.from_dict(raw), 0)
        theirs.dt_bias = mx.random.normal((heads * head_dim,))
        theirs.eval()  # in training it would not take its kernels
        ours = DeltaAttention(config, config.linear_attention)
        ours.load_weights(tree_flatten(theirs.parameters()))
        ours.fused = projection.fuse([ours[name] for name in ours.together])
        mx.eval(ours.parameters(), theirs.parameters())
        return cls(config, ours, theirs)

    def tokens(self, count: int) -> mx.array:
        """(count, D) random hidden states."""
        x = mx.random.normal((count, self.config.hidden_size))
        mx.eval(x)
        return x

    def prefill_ours(self, x: mx.array) -> tuple[mx.array, RecurrentCache]:
        """(L, D) of a prompt, and the state after it, lazy where the layer leaves them so."""
        cache = RecurrentCache()
        return self.ours(x, mx.arange(x.shape[0]), [Span(1, x.shape[0], None)], [cache]), cache

    def prefill_theirs(self, x: mx.array) -> tuple[mx.array, Any]:
        """The same by mlx-lm."""
        cache = ArraysCache(4)
        return self.theirs(x[None], None, cache)[0], cache

    def decode_ours(self, x: mx.array, cache: RecurrentCache) -> list[mx.array]:
        """(1, D) of one token (1, D), and the states after it, not evaluated."""
        step = DecodeStep(None, [cache.offset], x.dtype, chosen=1)
        y = self.ours.decode(x.reshape(1, 1, 1, -1), step, [cache])
        return [y.reshape(1, -1), *arrays(cache)]

    def decode_theirs(self, x: mx.array, cache: Any) -> list[mx.array]:
        """The same by mlx-lm."""
        return [self.theirs(x[None], None, cache)[0], *arrays(cache)]


def arrays(cache: Any) -> list[mx.array]:
    """The state that a cache of either side holds, the recurrent one last; mlx-lm's `state` nests it by version."""
    return [cache[index] for index in range(4)] if isinstance(cache, ArraysCache) else [*cache.state]
