"""Scratch memory: the bytes that a step takes besides weights and caches, and how many tokens fit a budget of them.

Counted are the arrays that live at the same time at the worst moment of a layer, as `models` computes it. Attention makes its
own blocks smaller when a budget is small; what it cannot make smaller is one head's keys and values and one row of scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.rope import RopeScaling

CHUNK_FLOOR = 16
"""A step is not cut into less: below it, every expert that a step touches is read for too few tokens."""


class LatentAttentionConfig(Protocol):
    """What latent attention asks a config: a model's, or a draft head's."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def qk_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float | None: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def attention_scale(self) -> float: ...


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The widths of one attention layer: number of heads, their nope, rope and value widths, and the rank of the latent."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int

    @classmethod
    def of(cls, config: LatentAttentionConfig) -> AttentionShape:
        """The widths that a config states."""
        return cls(
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )

    def prefers_absorbed(self, queries: int, keys: int) -> bool:
        """Whether attending in latent space takes fewer multiplications than expanding every cached key and value.

        For K2 and a long cache, absorbed wins below about 170 query tokens.
        """
        absorbed, expanded = self.products(queries, keys)
        return absorbed < expanded

    def products(self, queries: int, keys: int) -> tuple[int, int]:
        """Multiplications per head of L queries and T keys: in latent space, and with keys and values expanded."""
        up = self.rank * (self.nope + self.value)
        absorbed = queries * (up + keys * (2 * self.rank + self.rope))
        expanded = keys * up + queries * keys * (self.nope + self.rope + self.value)
        return absorbed, expanded

    def head_elements(self, keys: int) -> int:
        """Elements of one head's expanded keys and values: as projected, with the rotary part, and copied for a product."""
        return keys * (3 * self.nope + 2 * self.rope + 2 * self.value)

    @staticmethod
    def row_elements(keys: int) -> int:
        """Elements of the scores of one query row of one head, three rows of T at once.

        A mask or softmax writes a second row before the first is freed, and MLX allocates a third before that is done.
        """
        return 3 * keys

    def query_elements(self, queries: int, *, absorbed: bool) -> int:
        """Elements that L queries take in the whole attention, apart from its blocks.

        Queries as projected, rotated and put together; absorbed ones as well, scaled and laid out by head; outputs in parts,
        joined and laid out by token.
        """
        per_head = 3 * (self.nope + self.rope) + 3 * self.value
        if absorbed:
            per_head += 5 * self.rank
        return queries * self.heads * per_head


def feed_forward_elements(config: KimiConfig) -> int:
    """Elements that one token takes in the wider of MLP and mixture of experts.

    K rows of D are gathered, then gate, up and their product beside them; or three times K rows of D on the way out, as they
    are weighted in float32.
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    routed = config.num_experts_per_tok * max(hidden + 3 * width, 3 * hidden)
    shared = 3 * config.n_shared_experts * width if config.n_shared_experts else 0
    return max(routed + shared, 3 * config.intermediate_size)


def attention_bytes(config: LatentAttentionConfig, queries: int, keys: int, *, element_bytes: int = 2) -> int:
    """Bytes that L new tokens over T cached ones (themselves included) take in attention, apart from its blocks.

    Four hidden states stand for the residual, its norm, and what comes in and goes out. A cache that grows is copied whole.
    """
    shape = AttentionShape.of(config)
    elements = 4 * queries * config.hidden_size + keys * (shape.rank + shape.rope)
    elements += shape.query_elements(queries, absorbed=shape.prefers_absorbed(queries, keys))
    return elements * element_bytes


def scratch_needed(config: KimiConfig, queries: int, keys: int, *, element_bytes: int = 2) -> int:
    """The least bytes in which a step of L new tokens over T cached ones (themselves included) can be computed.

    Args:
        config: the model's configuration.
        queries: L, of the whole step.
        keys: T, the longest of the step.
        element_bytes: bytes of one element of an activation.
    """
    shape = AttentionShape.of(config)
    if shape.prefers_absorbed(queries, keys):
        block = shape.row_elements(keys) * shape.heads
    else:
        block = shape.row_elements(keys) + shape.head_elements(keys)
    attention = attention_bytes(config, queries, keys, element_bytes=element_bytes) + block * element_bytes
    feed_forward = queries * (feed_forward_elements(config) + 4 * config.hidden_size) * element_bytes
    return max(attention, feed_forward)


def fitting_chunk(
    config: KimiConfig, queries: int, keys: int, *, scratch_bytes: int, element_bytes: int = 2, floor: int = CHUNK_FLOOR
) -> int:
    """How many of L new tokens may be computed at once: L halved until the step fits the budget, not below the floor.

    Args:
        config: the model's configuration.
        queries: L.
        keys: T once all of them are cached.
        scratch_bytes: the budget.
        element_bytes: bytes of one element of an activation.
        floor: the smallest chunk; it is returned even where it exceeds the budget.
    """
    chunk = max(1, queries)
    while chunk > floor and scratch_needed(config, chunk, keys, element_bytes=element_bytes) > scratch_bytes:
        chunk = max(floor, -(-chunk // 2))
    return chunk
