"""One attention layer in both implementations, on the same arrays, with the same cache contents; what benches share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.deepseek_v3 import DeepseekV3Attention
from mlx_lm.models.deepseek_v3 import ModelArgs as TheirArgs

from exo_kimi.arch.config import KimiConfig
from exo_kimi.models.mla import Attention, Span
from exo_kimi.models.ops import KVCache, causal_mask
from exo_kimi.models.rope import Rope

K2_SCALING = {
    "type": "yarn",
    "factor": 32.0,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
SHARED = (
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "o_proj",
    "q_a_layernorm",
    "kv_a_layernorm",
)


def layer_config(*, heads: int, hidden: int, q_rank: int, rank: int = 512) -> KimiConfig:
    """A model of K2's attention widths per head: 128 without and 64 with rotary positions, 128 of values."""
    raw: dict[str, Any] = {
        "model_type": "kimi_k2",
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.827,
        "kv_lora_rank": rank,
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50_000.0,
        "rope_scaling": K2_SCALING,
    }
    return KimiConfig.from_dict(raw)


@dataclass(frozen=True, slots=True)
class Layers:
    """Both layers."""

    config: KimiConfig
    ours: Attention
    theirs: DeepseekV3Attention

    @classmethod
    def random(cls, config: KimiConfig) -> Layers:
        """Seeded float32 weights; the two hold the same arrays, but kv_b_proj, which mlx-lm keeps in two halves."""
        mx.random.seed(0)
        ours = Attention(config, Rope.of(config))
        theirs = DeepseekV3Attention(
            TheirArgs(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                q_lora_rank=config.q_lora_rank,
                kv_lora_rank=config.kv_lora_rank,
                qk_nope_head_dim=config.qk_nope_head_dim,
                qk_rope_head_dim=config.qk_rope_head_dim,
                v_head_dim=config.v_head_dim,
                rope_theta=config.rope_theta,
                rope_scaling=K2_SCALING,
                max_position_embeddings=config.max_position_embeddings,
            )
        )
        for name in SHARED:
            theirs[name] = ours[name]
        halves = ours.kv_b_proj.weight.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        theirs.embed_q.weight = mx.contiguous(halves[:, : config.qk_nope_head_dim].swapaxes(-1, -2))
        theirs.unembed_out.weight = mx.contiguous(halves[:, config.qk_nope_head_dim :])
        mx.eval(ours.parameters(), theirs.parameters())
        return cls(config, ours, theirs)

    def tokens(self, count: int) -> mx.array:
        """(count, D) random hidden states."""
        x = mx.random.normal((count, self.config.hidden_size))
        mx.eval(x)
        return x

    def contents(self, count: int) -> tuple[mx.array, mx.array]:
        """What a cache holds after `count` tokens, random."""
        latent = mx.random.normal((1, 1, count, self.config.kv_lora_rank))
        k_pe = mx.random.normal((1, 1, count, self.config.qk_rope_head_dim))
        mx.eval(latent, k_pe)
        return latent, k_pe

    def cache(self, contents: tuple[mx.array, mx.array], room: int) -> KVCache:
        """A cache with these contents and room for more tokens, so that neither side grows it in the run."""
        cache, held = KVCache(), contents[0].shape[2]
        more = [mx.zeros((1, 1, room, part.shape[3])) for part in contents]
        cache.update_and_fetch(
            *(mx.concatenate([part, zeros], axis=2) for part, zeros in zip(contents, more, strict=True))
        )
        cache.offset = held
        mx.eval(cache.keys, cache.values)
        return cache

    def run_ours(self, x: mx.array, cache: KVCache) -> mx.array:
        """(L, D), evaluated."""
        length, offset = x.shape[0], cache.offset
        span = Span(1, length, None if length == 1 else "causal")
        y = self.ours(x, mx.arange(offset, offset + length), [span], [cache])
        mx.eval(y)
        return y

    def run_theirs(self, x: mx.array, cache: KVCache) -> mx.array:
        """The same by mlx-lm, with the mask that its model makes."""
        length, offset = x.shape[0], cache.offset
        mask = None if length == 1 else causal_mask(length, offset + length)
        y: mx.array = self.theirs(x[None], mask, cache)[0]
        mx.eval(y)
        return y


def relative_gap(found: mx.array, expected: mx.array) -> float:
    """Largest difference over the largest value."""
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())
