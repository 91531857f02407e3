"""Counts that follow from the architecture alone: parameters, active parameters and KV-cache bytes."""

from __future__ import annotations

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import check_range, layer_modules, stage_modules
from exo_kimi.errors import UsageError

KV_GROUPS = 64, 32
"""Elements of an 8-bit cache that share a scale and a bias: the first of these that divides the cache's width."""


def total_parameters(config: KimiConfig) -> int:
    """Every weight of the text model, embeddings and head included (1,026.4 B for K2)."""
    return sum(spec.parameters for spec in stage_modules(config, 0, config.num_hidden_layers))


def layer_parameters(config: KimiConfig, layer: int) -> int:
    """Weights of one decoder layer."""
    return sum(spec.parameters for spec in layer_modules(config, layer))


def active_parameters(config: KimiConfig) -> int:
    """Weights that one token is multiplied with (31.7 B for K2): K of E experts, and no embedding, which is a lookup."""
    active = 0
    for spec in stage_modules(config, 0, config.num_hidden_layers):
        if spec.kind == "experts":
            active += spec.parameters // spec.shape[0] * config.num_experts_per_tok
        elif spec.kind != "embedding":
            active += spec.parameters
    return active


def mean_routed_experts(config: KimiConfig) -> float:
    """Routed experts of a layer that has any, on the average (384 for K2); what the config says where none has."""
    counts = [count for layer in range(config.num_hidden_layers) if (count := config.routed_experts(layer))]
    return sum(counts) / len(counts) if counts else float(config.n_routed_experts)


def kv_elements_per_token(config: KimiConfig) -> int:
    """Cached elements per token and layer: the latent and the shared rope key (512 + 64 for K2)."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def kv_bytes_per_token(
    config: KimiConfig, start_layer: int, end_layer: int, *, bytes_per_element: int = 2, kv_bits: int | None = None
) -> int:
    """Cache bytes of one token over a half-open layer range (70,272 for all 61 layers of K2 in bf16, 8,064 for the 7 of Kimi
    Linear that attend to every token; its others hold a state, see `state_bytes_per_sequence`).

    With 8 `kv_bits` (37,332): a byte each, and a scale and a bias per group.

    Raises:
        SplitError: the range is empty or outside the model.
    """
    check_range(config, start_layer, end_layer)
    elements = kv_elements_per_token(config)
    layer_bytes = elements * bytes_per_element
    if kv_bits is not None:
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        layer_bytes = sum(width + 2 * width // kv_group(width) * bytes_per_element for width in widths)
    return sum(not config.is_linear(layer) for layer in range(start_layer, end_layer)) * layer_bytes


def state_bytes_per_sequence(
    config: KimiConfig, start_layer: int, end_layer: int, *, bytes_per_element: int = 2
) -> int:
    """Bytes that a sequence of any length takes over a half-open layer range beside its cached tokens: 43,417,600 for the 20
    layers of Kimi Linear with Kimi Delta Attention, 0 for K2.

    Raises:
        SplitError: the range is empty or outside the model.
    """
    check_range(config, start_layer, end_layer)
    if config.linear_attention is None:
        return 0
    layers = sum(map(config.is_linear, range(start_layer, end_layer)))
    return layers * config.linear_attention.state_bytes(bytes_per_element=bytes_per_element)


def served_state_bytes(config: KimiConfig, start_layer: int, end_layer: int, *, bytes_per_element: int = 2) -> int:
    """Bytes of states that a sequence takes where it is served: twice `state_bytes_per_sequence`, for the states before its
    newest pass are kept until the next, so that guesses and steps that ran ahead can be taken back.

    Raises:
        SplitError: the range is empty or outside the model.
    """
    return 2 * state_bytes_per_sequence(config, start_layer, end_layer, bytes_per_element=bytes_per_element)


def kv_group(width: int) -> int:
    """Elements of a group in an 8-bit cache of this width (64 for K2); the smallest group where none divides the width."""
    return next((group for group in KV_GROUPS if width % group == 0), KV_GROUPS[-1])


def check_quantizable(config: KimiConfig) -> None:
    """Refuse a model whose latents do not divide into groups.

    Raises:
        UsageError: with the widths.
    """
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    if any(width % kv_group(width) for width in widths):
        raise UsageError(
            "an 8-bit cache has groups of 64 or 32, and this model's latents do not divide into them",
            expected="kv_lora_rank and qk_rope_head_dim that 32 divides",
            found=f"{widths[0]} and {widths[1]}",
            where="--kv-bits",
            fix="serve it without --kv-bits",
        )
