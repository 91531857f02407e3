"""The modules of a Kimi in checkpoint order, with the logical shape of each weight.

Paths are the checkpoint keys of the stacked (MLX) layout without prefix. Shapes are unpacked: what a bf16 tensor would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.kimi_k3 import decay_rows
from exo_kimi.arch.linear import LinearAttention
from exo_kimi.errors import SplitError

ModuleKind = Literal["embedding", "linear", "heads", "experts", "router", "norm", "conv", "decay"]

FLOAT32_PARAMETERS = ("e_score_correction_bias", "A_log", "dt_bias")
"""Names of parameters that are float32 in every checkpoint and stay so, whatever activations are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSpec:
    """One module of the model.

    Args:
        path: its checkpoint key without prefix and without `.weight`.
        kind: what it is; the shape follows from it.
        shape: embedding (vocab, hidden), linear (out, in), experts (E, out, in), heads (H, out, in), router (E, hidden),
            norm (dim,), conv (channels, taps, 1), decay (H, Dk): A_log of each head and dt_bias of each channel, in the module
            that the path names.
        layer: None outside the decoder layers.
        has_bias: whether a linear has a bias vector.
        is_float32: whether published weights are float32 where most are bf16.
        a_log: elements of A_log where it is padded beyond a decay's heads.
        packs: whether a checkpoint may have a router packed, as Kimi Linear's MLX conversions do.
    """

    path: str
    kind: ModuleKind
    shape: tuple[int, ...]
    layer: int | None = None
    has_bias: bool = False
    packs: bool = False
    is_float32: bool = False
    a_log: int = 0

    @property
    def quantizable(self) -> bool:
        """Whether checkpoints may pack it: norms, convolutions and decays stay plain in every published one, and K2's routers,
        which pick the experts."""
        return self.packs if self.kind == "router" else self.kind not in ("norm", "conv", "decay")

    @property
    def parameters(self) -> int:
        """Number of weights, with the router's correction bias and a linear's bias."""
        count = 1
        for size in self.shape:
            count *= size
        extra = self.shape[0] if self.kind in ("router", "decay") or self.has_bias else 0
        if self.a_log:
            extra = self.a_log
        return count + extra


def check_range(config: KimiConfig, start_layer: int, end_layer: int) -> None:
    """Refuse a half-open layer range that is empty or outside the model.

    Raises:
        SplitError: with the range and the model's layers.
    """
    if not 0 <= start_layer < end_layer <= config.num_hidden_layers:
        raise SplitError(
            "no such layer range",
            expected=f"0 <= start < end <= {config.num_hidden_layers} (half-open)",
            found=f"{start_layer}:{end_layer}",
        )


def stage_modules(config: KimiConfig, start_layer: int, end_layer: int) -> tuple[ModuleSpec, ...]:
    """Modules of a half-open layer range: embeddings only with layer 0, final norm and head only with the last layer.

    Raises:
        SplitError: the range is empty or outside the model.
    """
    check_range(config, start_layer, end_layer)
    specs: list[ModuleSpec] = []
    if start_layer == 0:
        specs.append(
            ModuleSpec(path="model.embed_tokens", kind="embedding", shape=(config.vocab_size, config.hidden_size))
        )
    for layer in range(start_layer, end_layer):
        specs += layer_modules(config, layer)
    if end_layer == config.num_hidden_layers:
        if config.k3 is not None:
            specs += _residual_attention("model.output_attn_res", None, config.hidden_size)
        specs.append(ModuleSpec(path="model.norm", kind="norm", shape=(config.hidden_size,)))
        specs.append(ModuleSpec(path="lm_head", kind="linear", shape=(config.vocab_size, config.hidden_size)))
    return tuple(specs)


def layer_modules(config: KimiConfig, layer: int) -> tuple[ModuleSpec, ...]:
    """Modules of one decoder layer.

    Source: DeepseekV3DecoderLayer in transformers, names as in mlx-lm.
    """
    prefix = f"model.layers.{layer}"
    hidden = config.hidden_size
    specs = [
        ModuleSpec(path=f"{prefix}.input_layernorm", kind="norm", shape=(hidden,), layer=layer),
        *attention_modules(config, layer),
        ModuleSpec(path=f"{prefix}.post_attention_layernorm", kind="norm", shape=(hidden,), layer=layer),
    ]
    if config.k3 is not None:
        for name in ("self_attention_res", "mlp_res"):
            specs += _residual_attention(f"{prefix}.{name}", layer, hidden)
    if not config.is_moe(layer):
        return (*specs, *_mlp(f"{prefix}.mlp", layer, hidden, config.intermediate_size))
    experts, width = config.routed_experts(layer), config.moe_intermediate_size
    packs = config.linear_attention is not None
    gate = ModuleSpec(path=f"{prefix}.mlp.gate", kind="router", shape=(experts, hidden), layer=layer, packs=packs)
    specs.append(gate)
    into = hidden
    if config.k3 is not None:
        into = config.k3.routed_expert_hidden_size
        specs += _latent_experts(f"{prefix}.mlp", layer, hidden, into)
    for name, shape in (("gate_proj", (width, into)), ("up_proj", (width, into)), ("down_proj", (into, width))):
        specs.append(
            ModuleSpec(path=f"{prefix}.mlp.switch_mlp.{name}", kind="experts", shape=(experts, *shape), layer=layer)
        )
    if config.n_shared_experts:
        specs += _mlp(f"{prefix}.mlp.shared_experts", layer, hidden, width * config.n_shared_experts)
    return tuple(specs)


def absorbed_modules(config: KimiConfig, layer: int) -> tuple[ModuleSpec, ModuleSpec]:
    """`embed_q` (H, kv_lora, nope) and `unembed_out` (H, v, kv_lora): what newer MLX checkpoints hold instead of kv_b_proj."""
    prefix = f"model.layers.{layer}.self_attn"
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    return (
        ModuleSpec(path=f"{prefix}.embed_q", kind="heads", shape=(heads, rank, config.qk_nope_head_dim), layer=layer),
        ModuleSpec(path=f"{prefix}.unembed_out", kind="heads", shape=(heads, config.v_head_dim, rank), layer=layer),
    )


def attention_modules(config: KimiConfig, layer: int) -> list[ModuleSpec]:
    """Modules of a layer's attention, of the kind that it has."""
    linear = config.linear_attention
    if linear is None or not config.is_linear(layer):
        return _latent_attention(config, layer)
    return _delta_attention(config, linear, layer)


def _delta_attention(config: KimiConfig, linear: LinearAttention, layer: int) -> list[ModuleSpec]:
    prefix, hidden, width = f"model.layers.{layer}.self_attn", config.hidden_size, linear.width
    gate: list[tuple[str, ModuleKind, tuple[int, ...]]] = [
        ("g_a_proj", "linear", (linear.head_dim, hidden)),
        ("g_b_proj", "linear", (width, linear.head_dim)),
    ]
    if config.k3 is not None:
        gate = [("g_proj", "linear", (width, hidden))]
    shapes: list[tuple[str, ModuleKind, tuple[int, ...]]] = [
        *((f"{name}_proj", "linear", (width, hidden)) for name in ("q", "k", "v")),
        *((f"{name}_conv.conv", "conv", (width, linear.short_conv_kernel_size, 1)) for name in ("q", "k", "v")),
        ("f_a_proj", "linear", (linear.head_dim, hidden)),
        ("f_b_proj", "linear", (width, linear.head_dim)),
        ("b_proj", "linear", (linear.num_heads, hidden)),
        *gate,
        ("o_norm", "norm", (linear.head_dim,)),
        ("o_proj", "linear", (hidden, width)),
    ]
    wide = () if config.k3 is None else ("conv", "norm")
    specs = [
        ModuleSpec(path=f"{prefix}.{name}", kind=kind, shape=shape, layer=layer, is_float32=kind in wide)
        for name, kind, shape in shapes
    ]
    a_log = 0 if config.k3 is None else decay_rows(linear.num_heads)
    decay = ModuleSpec(path=prefix, kind="decay", shape=(linear.num_heads, linear.head_dim), layer=layer, a_log=a_log)
    return [*specs, decay]


def _residual_attention(prefix: str, layer: int | None, hidden: int) -> list[ModuleSpec]:
    """Scores of the vectors that blocks of layers left: a norm, and a product with one row."""
    return [
        ModuleSpec(path=f"{prefix}_proj", kind="linear", shape=(1, hidden), layer=layer),
        ModuleSpec(path=f"{prefix}_norm", kind="norm", shape=(hidden,), layer=layer),
    ]


def _latent_experts(prefix: str, layer: int, hidden: int, latent: int) -> list[ModuleSpec]:
    """Ways into the space of routed experts and out of it."""
    return [
        ModuleSpec(path=f"{prefix}.routed_expert_down_proj", kind="linear", shape=(latent, hidden), layer=layer),
        ModuleSpec(path=f"{prefix}.routed_expert_norm", kind="norm", shape=(latent,), layer=layer),
        ModuleSpec(path=f"{prefix}.routed_expert_up_proj", kind="linear", shape=(hidden, latent), layer=layer),
    ]


def _latent_attention(config: KimiConfig, layer: int) -> list[ModuleSpec]:
    prefix = f"model.layers.{layer}.self_attn"
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    bias = config.attention_bias

    def linear(name: str, out: int, into: int, *, has_bias: bool = False) -> ModuleSpec:
        return ModuleSpec(path=f"{prefix}.{name}", kind="linear", shape=(out, into), layer=layer, has_bias=has_bias)

    def norm(name: str, width: int) -> ModuleSpec:
        return ModuleSpec(path=f"{prefix}.{name}", kind="norm", shape=(width,), layer=layer)

    if config.q_lora_rank is None:
        query = [linear("q_proj", heads * config.qk_head_dim, hidden)]
    else:
        query = [
            linear("q_a_proj", config.q_lora_rank, hidden, has_bias=bias),
            norm("q_a_layernorm", config.q_lora_rank),
            linear("q_b_proj", heads * config.qk_head_dim, config.q_lora_rank),
        ]
    return [
        *query,
        linear("kv_a_proj_with_mqa", rank + config.qk_rope_head_dim, hidden, has_bias=bias),
        norm("kv_a_layernorm", rank),
        linear("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), rank),
        linear("o_proj", hidden, heads * config.v_head_dim, has_bias=bias),
        *([] if config.k3 is None else [linear("g_proj", heads * config.v_head_dim, hidden)]),
    ]


def _mlp(prefix: str, layer: int, hidden: int, width: int) -> list[ModuleSpec]:
    shapes = (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width)))
    return [ModuleSpec(path=f"{prefix}.{name}", kind="linear", shape=shape, layer=layer) for name, shape in shapes]
