"""The configuration of a Kimi text model of any family, checked key by key from a parsed config.json.

Every key that changes the maths is required or has one value that this project implements. A missing key is an error and
never a default: a silent `routed_scaling_factor` of 1.0 would answer fluently and wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exo_kimi.arch.keys import (
    FAMILIES,
    K2,
    NESTED,
    KeyFamily,
    check_layer_kinds,
    check_other_keys,
    contradictions,
    read_experts_per_layer,
    read_q_lora_rank,
    read_required,
)
from exo_kimi.arch.kimi_k3 import K3Layers, read_k3_layers
from exo_kimi.arch.linear import LinearAttention, read_linear_attention
from exo_kimi.arch.rope import RopeScaling, read_rope, yarn_mscale
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError, UnsupportedModelError

TEXT_MODEL_TYPES = K2.model_types
NESTED_MODEL_TYPES = tuple(NESTED)
MODEL_TYPES = tuple(name for family in FAMILIES for name in family.model_types)
_GIVE = "give the directory of a Kimi K2, K2-Thinking, K2.5-2.7 or Kimi Linear checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiConfig:
    """Configuration of a Kimi text model; the fields are the Hugging Face keys.

    `key_prefix` is what checkpoint keys carry in front (`language_model.` from K2.5 on). `rope_theta` None means no rotary
    positions at all, `rope_scaling` None plain ones. `linear_attention` None means that every layer attends to the whole
    context. `n_routed_experts_per_layer` has the experts of each layer (0 where it is dense) if layers differ, `n_routed_experts`
    the most of any then. Layer and head counts are numbers of things, `*_dim`, `*_rank` and `*_size` are widths.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    first_k_dense_replace: int
    moe_layer_freq: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float | None
    rope_scaling: RopeScaling | None
    attention_bias: bool
    key_prefix: str
    # Names and shapes of tensors say it too: in the repr, which fingerprints are made of, it would change those of every K2.
    linear_attention: LinearAttention | None = field(default=None, repr=False)
    k3: K3Layers | None = field(default=None, repr=False)
    n_routed_experts_per_layer: tuple[int, ...] | None = field(default=None, repr=False)
    ignored_keys: tuple[str, ...] = ()

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: nope and rope parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores: qk_head_dim^-0.5 times yarn's (0.1 * mscale_all_dim * ln(factor) + 1)^2.

        Source: DeepseekV3Attention in transformers.
        """
        scale = float(self.qk_head_dim**-0.5)
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; the first `first_k_dense_replace` are dense."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def routed_experts(self, layer: int) -> int:
        """Routed experts of a layer; 0 where it is dense."""
        if self.n_routed_experts_per_layer is not None:
            return self.n_routed_experts_per_layer[layer]
        return self.n_routed_experts if self.is_moe(layer) else 0

    @property
    def is_even(self) -> bool:
        """Whether all layers with experts have as many, which every loader but this project's takes for granted."""
        return self.n_routed_experts_per_layer is None

    def is_linear(self, layer: int) -> bool:
        """Whether a layer has Kimi Delta Attention, and so a state of one size in place of latents of every token."""
        return self.linear_attention is not None and layer in self.linear_attention.layers

    @property
    def link_vectors(self) -> int:
        """Vectors of `hidden_size` that a token takes on a link between stages at most: 1, but for Kimi K3."""
        return 1 if self.k3 is None else self.k3.link_vectors(self.num_hidden_layers)

    @property
    def has_states(self) -> bool:
        """Whether some layers hold a state of one size, which cannot be cut at a token."""
        return self.linear_attention is not None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: object = "config.json") -> KimiConfig:
        """Read a parsed config.json: check every key and keep what the maths needs.

        Args:
            raw: the parsed JSON object; K2.5 and later nest the text model under `text_config`.
            where: named in errors.

        Raises:
            UnsupportedModelError: model_type is not one of Kimi's.
            ConfigError: one finding.
            CheckpointProblems: several findings at once.
        """
        text, family, prefix = _text_model(raw, where)
        problems: list[CheckpointError] = []
        text = family.fields(text, where, problems)
        values = read_required(text, family, where, problems)
        values["q_lora_rank"] = read_q_lora_rank(text, where, problems)
        values["moe_layer_freq"] = text.get("moe_layer_freq", 1)
        values["attention_bias"] = bool(text.get("attention_bias", False))
        values["rope_theta"], values["rope_scaling"] = (
            read_rope(text, where, problems) if family.rotates else (None, None)
        )
        ignored = check_other_keys(text, family, where, problems)
        if not problems:
            problems += contradictions(values, where)
        if not problems and family.linear:
            values["linear_attention"] = read_linear_attention(text, values["num_hidden_layers"], where, problems)
        if not problems and family.residuals:
            values["k3"] = read_k3_layers(text, where, problems)
        if not problems:
            values["n_routed_experts_per_layer"] = read_experts_per_layer(text, values, where, problems)
        if not problems:
            problems += check_layer_kinds(text, values, family, where)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise CheckpointProblems(problems, where=where)
        model_type = text.get("model_type", family.model_types[0])
        return cls(model_type=str(model_type), key_prefix=prefix, ignored_keys=ignored, **values)


def with_experts(config: KimiConfig, counts: Sequence[int]) -> KimiConfig:
    """The same architecture with other numbers of routed experts.

    Args:
        config: of the model.
        counts: of each layer that stays, 0 where it is dense.
    """
    even = len({count for count in counts if count}) <= 1
    return replace(
        config,
        num_hidden_layers=len(counts),
        n_routed_experts=max(counts) or config.n_routed_experts,
        n_routed_experts_per_layer=None if even else tuple(counts),
    )


def _text_model(raw: Mapping[str, Any], where: object) -> tuple[Mapping[str, Any], KeyFamily, str]:
    """The text model's keys, their family, and what tensor names have in front.

    Raises:
        UnsupportedModelError: model_type is not one of Kimi's.
        ConfigError: the text model is missing.
    """
    outer = raw.get("model_type")
    families = {name: family for family in FAMILIES for name in family.model_types}
    if isinstance(outer, str) and outer in NESTED:
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError("text_config is missing", expected="an object with the text model's keys", where=where)
        family = NESTED[outer]
        inner = text.get("model_type", family.model_types[0])
        if inner not in family.model_types:
            raise UnsupportedModelError(
                f"the text model is not a {family.name}",
                expected=f"text_config.model_type one of {', '.join(family.model_types)}",
                found=f"model_type {inner!r}",
                where=where,
                fix=_GIVE,
            )
        return text, family, "language_model."
    if not isinstance(outer, str) or outer not in families:
        raise UnsupportedModelError(
            "this is not a Kimi checkpoint",
            expected=f"model_type one of {', '.join((*MODEL_TYPES, *NESTED_MODEL_TYPES))}",
            found=f"model_type {outer!r}",
            where=where,
            fix=_GIVE,
        )
    return raw, families[outer], ""
