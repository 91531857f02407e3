"""An EAGLE-3 draft head: one dense decoder layer that reads the target's features beside the tokens, and guesses the next one.

    f = fc([fc_norm_0(h_a); fc_norm_1(h_b); fc_norm_2(h_c)])      features that enter layers a, b, c; norms in 3.1 only
    x = [input_layernorm(e); hidden_norm(f)]                      e: the embedding of the token that follows f's position
    r = f + attention(x);  out = r + mlp(post_attention_layernorm(r))
    logits = lm_head(norm(out));  the next step's f is out, or norm(out) with norm_output

Attribute names are the checkpoint keys. Embedding and head may be the target's: see `borrow`.

Axes: N tokens laid end to end, T cached tokens, D hidden, F features times the target's hidden size.

Source: "EAGLE-3", Li et al. 2025, section 3; `Eagle3LlamaForCausalLM` and `Eagle3DeepseekV2ForCausalLM` of vLLM for the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import DraftConfig, DraftHeads
from exo_kimi.arch.draft_modules import DraftParts
from exo_kimi.errors import MissingTensorError
from exo_kimi.models import ops
from exo_kimi.models.adapters import Adaptable
from exo_kimi.models.blocks import joined
from exo_kimi.models.decode import RMSNorm
from exo_kimi.models.mla import Attention, Span
from exo_kimi.models.moe import MLP
from exo_kimi.models.ops import KVCache
from exo_kimi.models.rope import Rope

__all__ = ["BorrowedModules", "DraftHead", "DraftLayer", "DraftMultiHeadAttention"]

Segments = Sequence[tuple[int, Sequence[Any]]]
_Lookup = Callable[[mx.array], mx.array]


class DraftMultiHeadAttention(Adaptable):
    """softmax(q k^T / sqrt(head_dim)) v of each head, causal, on inputs of twice the hidden size."""

    together: ClassVar = ("q_proj", "k_proj", "v_proj")
    projections: ClassVar = (*together, "o_proj")

    def __init__(self, config: DraftHeads, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.scratch_bytes = ops.SCRATCH_BYTES
        self.rope = Rope.of_heads(config)
        bias = config.attention_bias
        self.q_proj = nn.Linear(2 * hidden, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(2 * hidden, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(2 * hidden, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias=bias)

    def __call__(self, x: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]) -> mx.array:
        """(N, 2 D) to (N, D); arguments as of `mla.Attention`."""
        q = self.rope(self.q_proj(x).reshape(-1, self.heads, self.width), positions)
        k = self.rope(self.k_proj(x).reshape(-1, self.kv_heads, self.width), positions)
        v = self.v_proj(x).reshape(-1, self.kv_heads, self.width)
        outputs, row = [], 0
        for span, cache in zip(spans, caches, strict=True):
            rows = slice(row, row + span.length)
            row = rows.stop
            queries, keys, values = (part[rows].swapaxes(0, 1)[None] for part in (q, k, v))
            if cache is not None:
                keys, values = ops.append_to_cache(cache, keys, values)
            outputs.append(self._attend(queries, keys, values))
        return self.o_proj(joined(outputs).reshape(x.shape[0], -1))

    def _attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """(L, H * width) of queries (1, H, L, width), the last of which sees every key; in blocks of rows that fit the budget."""
        length, held = q.shape[2], k.shape[2]
        step = max(1, self.scratch_bytes // (3 * self.heads * held * q.dtype.size))
        blocks: list[mx.array] = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            seen = held - length + stop
            mask = None if stop - start == 1 else "causal"
            blocks.append(
                mx.fast.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], scale=self.scale, mask=mask
                )
            )
            if stop < length:
                mx.eval(blocks[-1])  # or all blocks' scores would be held at once
        return joined(blocks, axis=2)[0].swapaxes(0, 1).reshape(length, -1)


class DraftLayer(nn.Module):
    """r + mlp(norm(r)) with r = f + attention([input_layernorm(e); hidden_norm(f)])."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        attention = config.attention
        self.self_attn = (
            DraftMultiHeadAttention(attention, hidden)
            if isinstance(attention, DraftHeads)
            else Attention(attention, Rope.of(attention), inputs=2 * hidden)
        )
        self.mlp = MLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.hidden_norm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def __call__(
        self, e: mx.array, f: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]
    ) -> mx.array:
        """(N, D) of embeddings and hidden inputs, both (N, D)."""
        normed = self.hidden_norm(f)
        x = mx.concatenate([self.input_layernorm(e), normed], axis=-1)
        r = (normed if self.norm_before_residual else f) + self.self_attn(x, positions, spans, caches)
        return r + self.mlp(self.post_attention_layernorm(r))


class BorrowedModules(nn.Module):
    """What a head needs of its target and the stage beside it does not hold, under the target's names.

    Args:
        config: of the target.
        names: `embed_tokens`, `lm_head`, or both.
    """

    def __init__(self, config: KimiConfig, names: Sequence[str]) -> None:
        super().__init__()
        if "embed_tokens" in names:
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if "lm_head" in names:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class DraftHead(nn.Module):
    """A head for one target.

    Args:
        config: its configuration.
        parts: what it has of its own; embedding and output head are else the target's, see `borrow`, and ids are the target's.
    """

    def __init__(self, config: DraftConfig, parts: DraftParts) -> None:
        super().__init__()
        self.config = config
        hidden, wide, eps = config.hidden_size, config.target_hidden_size, config.rms_norm_eps
        if parts.embeds:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        if config.fc_norm:
            self.fc_norm = [RMSNorm(wide, eps=eps) for _ in range(config.features)]
        self.fc = nn.Linear(config.features * wide, hidden, bias=parts.fc_bias)
        self.layers = [DraftLayer(config)]
        self.norm = RMSNorm(hidden, eps=eps)
        if parts.heads:
            self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self._borrowed: dict[str, _Lookup] = {}
        self._target_ids: mx.array | None = mx.arange(config.draft_vocab_size) if parts.maps else None

    def borrow(self, *, embed_tokens: _Lookup | None = None, lm_head: _Lookup | None = None) -> None:
        """Use the target's modules where the head has none of its own; they are no parameters of it."""
        for name, module in (("embed_tokens", embed_tokens), ("lm_head", lm_head)):
            if module is not None and name not in self:
                self._borrowed[name] = module

    def set_draft_to_target(self, differences: mx.array) -> None:
        """Take `d2t`, (draft vocab,) integers: of each token that can be drafted, its id in the target less its own."""
        self._target_ids = mx.arange(self.config.draft_vocab_size) + differences.astype(mx.int32)
        mx.eval(self._target_ids)

    def set_scratch_bytes(self, scratch_bytes: int) -> None:
        """What a pass may take at most beside weights and caches, as of `Model.set_scratch_bytes`."""
        self.layers[0].self_attn.scratch_bytes = scratch_bytes

    def make_cache(self) -> list[Any]:
        """The empty cache of one sequence, as a model makes one for each layer: mlx-lm's KVCache, which can be trimmed."""
        return [KVCache()]

    def fuse(self, features: mx.array) -> mx.array:
        """(N, D) hidden inputs of features (N, F), laid end to end in the order of the config's layers."""
        if self.config.fc_norm:
            parts = mx.split(features, self.config.features, axis=-1)
            features = mx.concatenate([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], axis=-1)
        return self.fc(features)

    def __call__(self, token_ids: mx.array, hidden: mx.array, segments: Segments) -> mx.array:
        """One pass over several sequences laid end to end.

        Args:
            token_ids: (N,) of the target; of each position the token that follows it.
            hidden: (N, D) hidden inputs of the positions: `fuse` of true features, or `next_hidden` of the step before.
            segments: of each sequence its number of tokens here (they sum to N) and its caches, which grow by it.

        Returns:
            (N, D), before the final norm: see `logits` and `next_hidden`.
        """
        offsets = [(int(caches[0].offset), length) for length, caches in segments]
        positions = joined([mx.arange(start, start + length, dtype=mx.int32) for start, length in offsets])
        spans = [Span(1, length, None if length == 1 else "causal") for length, _ in segments]
        e = self._module("embed_tokens")(token_ids).astype(hidden.dtype)
        out: mx.array = self.layers[0](e, hidden, positions, spans, [caches[0] for _, caches in segments])
        return out

    def logits(self, out: mx.array) -> mx.array:
        """(N, draft vocab) float32 logits of what a pass gave; `to_target_ids` tells whose they are."""
        return self._module("lm_head")(self.norm(out)).astype(mx.float32)

    def next_hidden(self, out: mx.array) -> mx.array:
        """(N, D) hidden inputs of the next step, of what a pass gave."""
        return self.norm(out) if self.config.norm_output else out

    def to_target_ids(self, draft_ids: mx.array) -> mx.array:
        """The target's ids of tokens of the head's vocabulary, any shape."""
        return draft_ids if self._target_ids is None else mx.take(self._target_ids, draft_ids)

    def _module(self, name: str) -> _Lookup:
        module: _Lookup | None = self[name] if name in self else self._borrowed.get(name)
        if module is None:
            raise MissingTensorError(
                f"the head has no {name} of its own, and the target's was not given",
                expected="the target's, see `DraftHead.borrow`",
            )
        return module
