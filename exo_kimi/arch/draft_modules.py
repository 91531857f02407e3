"""The modules of an EAGLE-3 draft head, with the logical shape of each weight; and what they and its cache weigh by count."""

from __future__ import annotations

from dataclasses import dataclass

from exo_kimi.arch.draft_config import DraftConfig, DraftHeads, DraftLatent
from exo_kimi.arch.modules import ModuleSpec

LAYER = "layers.0"
"""The one layer, as we name it; files may say `midlayer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftParts:
    """What a head has of its own: an embedding, an output head, a choice of the vocabulary (`d2t`), a bias of `fc`."""

    embeds: bool = True
    heads: bool = True
    maps: bool = True
    fc_bias: bool = False


def draft_modules(config: DraftConfig, *, fc_bias: bool = False) -> tuple[ModuleSpec, ...]:
    """Every module that a head can have, in the order of a pass; `embed_tokens` and `lm_head` may be the target's.

    Args:
        config: of the head.
        fc_bias: whether `fc` has a bias, which `bias` in config.json allows and EAGLE-3 heads do not have.

    Source: `Eagle3LlamaForCausalLM` and `Eagle3DeepseekV2ForCausalLM` of vLLM.
    """
    hidden, width, wide = config.hidden_size, config.intermediate_size, config.target_hidden_size
    norms = range(config.features) if config.fc_norm else ()
    return (
        ModuleSpec(path="embed_tokens", kind="embedding", shape=(config.vocab_size, hidden)),
        *(ModuleSpec(path=f"fc_norm.{each}", kind="norm", shape=(wide,)) for each in norms),
        _linear("fc", hidden, config.features * wide, has_bias=config.bias and fc_bias),
        _norm(f"{LAYER}.input_layernorm", hidden),
        _norm(f"{LAYER}.hidden_norm", hidden),
        *_attention(config),
        _norm(f"{LAYER}.post_attention_layernorm", hidden),
        _linear(f"{LAYER}.mlp.gate_proj", width, hidden),
        _linear(f"{LAYER}.mlp.up_proj", width, hidden),
        _linear(f"{LAYER}.mlp.down_proj", hidden, width),
        _norm("norm", hidden),
        _linear("lm_head", config.draft_vocab_size, hidden),
    )


def _linear(path: str, out: int, into: int, *, has_bias: bool = False) -> ModuleSpec:
    return ModuleSpec(path=path, kind="linear", shape=(out, into), layer=_layer(path), has_bias=has_bias)


def _norm(path: str, width: int) -> ModuleSpec:
    return ModuleSpec(path=path, kind="norm", shape=(width,), layer=_layer(path))


def _layer(path: str) -> int | None:
    return 0 if path.startswith(LAYER) else None


def _attention(config: DraftConfig) -> tuple[ModuleSpec, ...]:
    attention, prefix = config.attention, f"{LAYER}.self_attn"
    both, hidden, bias = 2 * config.hidden_size, config.hidden_size, attention.attention_bias
    if isinstance(attention, DraftHeads):
        queries = attention.num_attention_heads * attention.head_dim
        keys = attention.num_key_value_heads * attention.head_dim
        return (
            _linear(f"{prefix}.q_proj", queries, both, has_bias=bias),
            _linear(f"{prefix}.k_proj", keys, both, has_bias=bias),
            _linear(f"{prefix}.v_proj", keys, both, has_bias=bias),
            _linear(f"{prefix}.o_proj", hidden, queries, has_bias=bias),
        )
    heads, rank, rope = attention.num_attention_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
    return (
        *_latent_queries(attention, prefix, both),
        _linear(f"{prefix}.kv_a_proj_with_mqa", rank + rope, both, has_bias=bias),
        _norm(f"{prefix}.kv_a_layernorm", rank),
        _linear(f"{prefix}.kv_b_proj", heads * (attention.qk_nope_head_dim + attention.v_head_dim), rank),
        _linear(f"{prefix}.o_proj", hidden, heads * attention.v_head_dim, has_bias=bias),
    )


def _latent_queries(attention: DraftLatent, prefix: str, into: int) -> tuple[ModuleSpec, ...]:
    queries, rank = attention.num_attention_heads * attention.qk_head_dim, attention.q_lora_rank
    if rank is None:
        return (_linear(f"{prefix}.q_proj", queries, into),)
    return (
        _linear(f"{prefix}.q_a_proj", rank, into, has_bias=attention.attention_bias),
        _norm(f"{prefix}.q_a_layernorm", rank),
        _linear(f"{prefix}.q_b_proj", queries, rank),
    )


def draft_kv_bytes_per_token(config: DraftConfig, *, bytes_per_element: int = 2) -> int:
    """Bytes of one token in the head's own cache: one layer (1,152 for an MLA head of K2 in bf16)."""
    return config.attention.kv_elements * bytes_per_element


def feature_bytes_per_token(config: DraftConfig, *, bytes_per_element: int = 2) -> int:
    """Bytes of one token's features (43,008 for K2 in bf16)."""
    return config.features * config.target_hidden_size * bytes_per_element
