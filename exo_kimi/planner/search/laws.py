"""Cost laws of one layer and of one hop: seconds, one law a function with its source.

Constants are fitted to published measurements, which `planner/published/` holds with their sources; a measurement that
judges the laws is never one that they were fitted to (`exo-kimi bench plan --published`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import layer_modules
from exo_kimi.arch.scratch import AttentionShape
from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.question import Question
from exo_kimi.planner.streaming import Numbers, Streaming
from exo_kimi.planner.weights.bytes import ModelBytes
from exo_kimi.planner.weights.draft import DraftBytes

# Rows of one tile of a grouped product. A tile that two experts share is computed for each of them, so every expert that a
# chunk touches costs up to one tile beside its own rows: 384 experts are 6,144 rows, against 16,384 of a chunk of 2,048.
# Source: `bm` of `gather_qmm_rhs`, mlx/backend/metal/quantized.cpp; of 0, 8, 16, 24 and 32 rows it also fits the published
# prefill best (2 % instead of 5 to 34 % root mean square over the five fitted points).
EXPERT_TILE_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlops:
    """Floating-point operations of a prefill chunk in one layer: products with weights, and attention over the cache."""

    weights: float
    attention: float


def chunk_flops(config: KimiConfig, layer: int, *, tokens: float, keys: float) -> LayerFlops:
    """Floating-point operations of a chunk in one layer.

    Two per weight and row: `tokens` rows everywhere, and in the experts K rows a token and a tile for each distinct expert.
    Attention is the cheaper of latent space and expanded keys and values, whose expansion counts with it.
    Source: "Training compute-optimal large language models", Hoffmann et al. 2022, appendix F; DeepSeek-V2, MLA.

    Args:
        config: the model's.
        layer: its index.
        tokens: of the chunk, on average.
        keys: cached tokens that each of them is multiplied with, the chunk's own among them, on average.
    """
    rows = 0.0
    for spec in layer_modules(config, layer):
        if spec.kind == "experts":
            chosen, experts = config.num_experts_per_tok, spec.shape[0]
            touched = experts * (1.0 - (1.0 - chosen / experts) ** tokens)
            rows += spec.parameters / experts * (chosen * tokens + EXPERT_TILE_ROWS * touched)
        elif not spec.path.endswith("kv_b_proj"):
            rows += spec.parameters * tokens
    if config.is_linear(layer):
        return LayerFlops(weights=2.0 * rows, attention=tokens * attention_flops(config, layer, keys))
    products = min(AttentionShape.of(config).products(max(1, round(tokens)), max(1, round(keys))))
    return LayerFlops(weights=2.0 * rows, attention=2.0 * products * config.num_attention_heads)


def prefill_layer_s(model: ModelBytes, machine: Machine, layer: int, *, tokens: float, flops: LayerFlops) -> float:
    """One prefill chunk of one layer: the greater of compute and reading the weights that the chunk needs, and overhead.

    Source: roofline, Williams et al. 2009; distinct experts of a chunk as `ModelBytes.active_layer_bytes`.

    Args:
        model: bytes.
        machine: of the stage.
        layer: its index.
        tokens: of the chunk, on average.
        flops: of the chunk, see `chunk_flops`.
    """
    compute_s = flops.weights / machine.prefill.number + flops.attention / machine.attention_speed.number
    memory_s = model.active_layer_bytes(layer, max(1, round(tokens))) / machine.bandwidth.number
    return max(compute_s, memory_s) + machine.overhead.number


def attention_flops(config: KimiConfig, layer: int, cached_tokens: float) -> float:
    """Floating-point operations of one new token in the attention of one layer, products with weights apart.

    In latent space 2 H (2 R + rope) for each cached token: 139,264 for K2, whose 64 heads each multiply a query with a latent and
    its rope key, and weigh the latent. With Kimi Delta Attention 7 H D^2 at any length: a state decays, is multiplied with the
    key and the query, and takes an outer product in.
    Source: DeepSeek-V2, section 2.1, absorbed; `Attention.decode` here and mlx-lm's `deepseek_v3` since its #839; "Kimi Linear",
    arXiv 2510.26692, section 3.
    """
    if config.linear_attention is not None and config.is_linear(layer):
        return 7.0 * config.linear_attention.recurrent_elements
    return cached_tokens * 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)


def attention_s(model: ModelBytes, machine: Machine, layer: int, cached_tokens: float) -> float:
    """What a context adds to the step of one token in one layer: its bytes are read, and its arithmetic is done. A state is read
    and written.

    On an M3 Ultra and for K2's 61 layers that is 0.5 ms for 1,000 cached tokens: 0.09 ms of bytes, 0.41 ms of arithmetic.
    Source: mlx-lm#839, DeepSeek-V3 with twice the heads: 0.91 ms measured, 0.90 by this law.
    """
    moved_bytes = cached_tokens * model.kv_layer_bytes(layer) + 2 * model.state_layer_bytes(layer)
    flops = attention_flops(model.config, layer, cached_tokens)
    return moved_bytes / machine.bandwidth.number + flops / machine.attention_speed.number


def decode_layer_s(model: ModelBytes, machine: Machine, layer: int, *, batch: int, cached_tokens: float) -> float:
    """One decode step of one layer: active bytes / bandwidth, attention of each sequence over its context, and overhead.

    The overhead is what the fitted point leaves over beside bytes and attention. Source: `planner/published/`.
    """
    read_s = model.active_layer_bytes(layer, batch) / machine.bandwidth.number
    return read_s + batch * attention_s(model, machine, layer, cached_tokens) + machine.overhead.number


def missed_bytes(model: ModelBytes, layer: int, *, tokens: float, hit_rate: Numbers) -> Numbers:
    """Bytes of one layer that a step reads from disk: each different expert that its tokens choose and that is not there, once.

    Args:
        model: bytes.
        layer: its index.
        tokens: of the step.
        hit_rate: of the experts asked for.
    """
    return model.expert_disk_bytes[layer] * model.touched_share(layer, tokens) * (1.0 - hit_rate)


def sweep_hit_rate(slots: Numbers, experts: int) -> Numbers:
    """Hit rate of a prefill chunk that asks for nearly every expert: those that have a slot are there, the others are read."""
    shares: Numbers = np.minimum(slots / experts, 1.0)
    return shares


def streamed_s(
    streaming: Streaming, machine: Machine, *, compute_s: float, read_bytes: Numbers, ahead: bool
) -> Numbers:
    """One layer of a step with experts from disk: the ids are read back, then bytes / SSD, beside or after the rest.

    Args:
        streaming: hit rates, and which end of the band.
        machine: of the stage.
        compute_s: the same layer with every expert in memory.
        read_bytes: from disk.
        ahead: whether experts are read while others are computed: in a chunk of a prompt, which asks for all of them in a known
            order; when single tokens are decoded, only as far as the next layer's choice is guessed.
    """
    read_s = read_bytes / streaming.ssd_bytes_per_s(machine)
    together = {"slow": False, "expected": ahead, "fast": True}[streaming.case]
    layer_s: Numbers = np.maximum(compute_s, read_s) if together else compute_s + read_s
    return streaming.read_back_s + layer_s


def head_s(model: ModelBytes, machine: Machine) -> float:
    """The final norm and lm_head of one step, bound by their bytes."""
    return model.head_bytes / machine.bandwidth.number


def hop_s(question: Question, one: Machine, other: Machine, tokens: float, *, features: int = 0) -> float:
    """Hidden states of some tokens from one machine to the next: handover + latency + tokens * hidden * 2 / bandwidth.

    Args:
        question: whose link and hidden size.
        one, other: machines.
        tokens: whose hidden states travel.
        features: other hidden states of each that travel with it, for a draft head behind.
    """
    link = question.cluster.link(one, other)
    return link.handover_s + link.transfer_s(tokens * (1 + features) * question.hop_bytes_per_token)


def draft_chunk_s(draft: DraftBytes, machine: Machine, tokens: float) -> float:
    """A draft head's pass over a chunk of a prompt: the greater of compute and its bytes, and one layer's overhead."""
    compute_s = 2.0 * draft.parameters * tokens / machine.prefill.number
    read_s = (draft.step_bytes + draft.enter_bytes) / machine.bandwidth.number
    return max(compute_s, read_s) + machine.overhead.number


def draft_chain_s(question: Question, machine: Machine, guesses: int) -> float:
    """A chain of guesses: each reads the head's layer, its cache as in the middle of the timed request, and the output head, be
    it the target's; the first of them `fc` too; and a layer's overhead each."""
    draft = question.draft
    if draft is None or not guesses:
        return 0.0
    each_bytes = draft.step_bytes + (question.model.head_bytes if draft.borrows_head else 0)
    each_bytes += question.workload.mean_cached_tokens * draft.kv_token_bytes
    read_s = (guesses * each_bytes + draft.enter_bytes) / machine.bandwidth.number
    return read_s + guesses * machine.overhead.number
