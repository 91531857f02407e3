"""Multi-head latent attention over ragged spans, and of single tokens.

Axes: N tokens laid end to end, B batch, L new tokens, T cached tokens, H heads, R kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from exo_kimi.arch.scratch import AttentionShape, LatentAttentionConfig, attention_bytes
from exo_kimi.models import ops
from exo_kimi.models.adapters import Adaptable
from exo_kimi.models.blocks import Span, Work, finish, head_groups, joined, query_blocks
from exo_kimi.models.decode import LONGEST_RUN, DecodeStep, Derived, RMSNorm
from exo_kimi.models.latent_cache import LatentCache8, PlainLatents, extend
from exo_kimi.models.ops import KVCache
from exo_kimi.models.projection import Projection
from exo_kimi.models.rope import Rope

__all__ = ["Attention", "Span"]

PerHead = Callable[[mx.array], mx.array]

LATENT_NORM_EPS = 1e-6
"""Kimi's q_a and kv_a norms use this whatever rms_norm_eps says. Source: DeepseekV3RMSNorm's default."""


class Attention(Adaptable):
    """softmax(scale * (q_nope k_nope^T + q_pe k_pe^T)) v, with k_nope and v expanded from a cached latent.

    Without rotary positions (`rope` None) q_pe and k_pe stay as projected: the heads share k_pe still.

    `kv_b_proj` holds the rows of k_nope and v of each head as published. Newer MLX checkpoints hold its two halves as
    `embed_q` and `unembed_out`: see `use_absorbed_modules`. `inputs` is the width of what it reads: hidden_size, but in a draft
    head twice that.

    Source: "DeepSeek-V2", section 2.1; DeepseekV3Attention in transformers.
    """

    together: ClassVar = ("q_a_proj", "kv_a_proj_with_mqa")
    called: ClassVar = (*together, "q_proj", "q_b_proj", "o_proj")
    projections: ClassVar = (*called, "kv_b_proj", "embed_q", "unembed_out")

    def __init__(self, config: LatentAttentionConfig, rope: Rope | None, *, inputs: int | None = None) -> None:
        super().__init__()
        self._halves = Derived(partial(_halves, config.num_attention_heads, config.qk_nope_head_dim))
        self.config, self.shape = config, AttentionShape.of(config)
        self.heads = config.num_attention_heads
        self.nope, self.pe, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank, self.q_rank = config.kv_lora_rank, config.q_lora_rank or 0
        self.scale = config.attention_scale
        self.scratch_bytes = ops.SCRATCH_BYTES
        self.rope = rope
        hidden, bias = config.hidden_size, config.attention_bias
        inputs = hidden if inputs is None else inputs
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(inputs, self.heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(inputs, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(inputs, self.rank + self.pe, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v, hidden, bias=bias)

    def make_cache(self, kv_bits: int | None) -> Any:
        """An empty cache: mlx-lm's KVCache, or `LatentCache8` for 8 bits."""
        return KVCache() if kv_bits is None else LatentCache8()

    def takes(self, cache: Any, length: int = 1) -> bool:
        """Whether `decode` can go on from a cache by so many tokens."""
        return length <= LONGEST_RUN and type(cache) in (KVCache, LatentCache8)

    def use_absorbed_modules(self) -> None:
        """Hold `embed_q` (H, R, nope) and `unembed_out` (H, v, R) in place of `kv_b_proj`."""
        if "kv_b_proj" in self:
            del self.kv_b_proj
            self.embed_q = ops.MultiLinear(self.nope, self.rank, self.heads)
            self.unembed_out = ops.MultiLinear(self.rank, self.v, self.heads)

    def __call__(self, x: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]) -> mx.array:
        """Attend.

        Args:
            x: (N, D) tokens of all spans, laid end to end.
            positions: (N,) int32.
            spans: rows that attend together; their batch * length sum to N.
            caches: one per span: an mlx-lm cache, which grows by the span's tokens, or None.

        Returns:
            (N, D).
        """
        q_nope, q_pe, latent, k_pe = self.project(x, positions)
        work = self._place(spans, caches, latent, k_pe)
        outputs: dict[int, mx.array] = {}
        few = [item for item in work if item.absorbed]
        if few:
            # All the few-token spans share one pass over kv_b_proj on the way in and one on the way out.
            queries = self.absorb(joined([q_nope[item.rows] for item in few]))
            attended, row = [], 0
            for item in few:
                rows = slice(row, row + item.rows.stop - item.rows.start)
                attended.append(self._attend_latent(queries[rows], q_pe[item.rows], item))
                row = rows.stop
            values, row = self.unembed(joined(attended)), 0
            for item in few:
                count = item.rows.stop - item.rows.start
                outputs[item.rows.start] = values[row : row + count]
                row += count
        for item in work:
            if not item.absorbed:
                values = self._attend_expanded(q_nope[item.rows], q_pe[item.rows], item)
                if len(work) > 1:
                    mx.eval(values)  # before the next span's keys are expanded
                outputs[item.rows.start] = values
        out = joined([outputs[item.rows.start] for item in work])
        return self.o_proj(out.reshape(x.shape[0], self.heads * self.v))

    def decode(self, x: mx.array, step: DecodeStep, caches: Sequence[Any]) -> mx.array:
        """Attend from one new token of each sequence, or a run of few, in latent space and in as few MLX primitives as possible.

        Its oracle is a call with a span for each sequence.

        Args:
            x: (N, 1, 1, D).
            step: what all layers share.
            caches: one per sequence, of ours, which grows by its tokens.

        Returns:
            (N, 1, 1, D).
        """
        tokens, heads = step.tokens, self.heads
        if self.adapted:
            spans = [Span(1, length, "causal" if length > 1 else None) for length in step.lengths]
            return self(x.reshape(tokens, -1), step.positions, spans, caches).reshape(tokens, 1, 1, -1)
        if self.fused is not None:
            q, latent, k_pe = mx.split(self.fused(x), [self.q_rank, self.q_rank + self.rank], axis=-1)
        else:
            latent, k_pe = mx.split(self["kv_a_proj_with_mqa"](x), [self.rank], axis=-1)
            q = self["q_proj"](x) if "q_proj" in self else self["q_a_proj"](x)
        if "q_proj" not in self:
            q = self["q_b_proj"](self["q_a_layernorm"].decode(q, step))
        q_nope, q_pe = mx.split(q.reshape(tokens, 1, heads, -1), [self.nope], axis=-1)
        q_pe, k_pe = step.turned(q_pe), step.turned(k_pe)
        latent = self["kv_a_layernorm"].decode(latent, step)
        absorb, unembed = self._per_head()
        q = _by_token(absorb(_by_head(q_nope, heads)), tokens, heads)
        if len(caches) == 1:
            attended = self._attend_run(q, q_pe, latent, k_pe, step, caches[0])
        else:
            ends = accumulate(step.lengths)
            rows = [slice(end - length, end) for end, length in zip(ends, step.lengths, strict=True)]
            attended = mx.concatenate(
                [
                    self._attend_run(q[row], q_pe[row], latent[row], k_pe[row], step, cache)
                    for row, cache in zip(rows, caches, strict=True)
                ]
            )
        values = unembed(_by_head(attended, heads))
        out = values if tokens == 1 else values.swapaxes(0, 1)
        return self["o_proj"](out.reshape(tokens, 1, 1, -1))

    def remember(self, x: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]) -> None:
        """Let the caches grow by these tokens as attending would, and attend to nothing; arguments as of a call."""
        _, _, latent, k_pe = self.project(x, positions)  # lazily: the queries are never computed
        self._place(spans, caches, latent, k_pe)

    def project(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """q_nope (N, H, nope), q_pe (N, H, rope), latent (N, R) and k_pe (N, rope) of tokens (N, D); rope is applied."""
        q = self.q_proj(x) if "q_proj" in self else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = mx.split(q.reshape(-1, self.heads, self.nope + self.pe), [self.nope], axis=-1)
        latent, k_pe = mx.split(self.kv_a_proj_with_mqa(x), [self.rank], axis=-1)
        if self.rope is not None:
            q_pe, k_pe = self.rope(q_pe, positions), self.rope(k_pe[:, None], positions)[:, 0]
        return q_nope, q_pe, self.kv_a_layernorm(latent), k_pe

    def prefers_absorbed(self, queries: int, keys: int) -> bool:
        """Whether attending in latent space is the cheaper way, see `arch.scratch`."""
        return self.shape.prefers_absorbed(queries, keys)

    def absorb(self, q_nope: mx.array) -> mx.array:
        """Queries (n, H, nope) in latent space, (n, H, R)."""
        q = q_nope.swapaxes(0, 1)
        if "kv_b_proj" in self:
            rows = slice(0, self.nope)
            q = ops.head_rows_matmul(q, self.kv_b_proj, rows, heads=self.heads, transpose=False)
        else:
            q = self.embed_q(q)
        return q.swapaxes(0, 1)

    def unembed(self, attended: mx.array) -> mx.array:
        """Values (n, H, v) of attended latents (n, H, R)."""
        out = attended.swapaxes(0, 1)
        if "kv_b_proj" in self:
            rows = slice(self.nope, None)
            out = ops.head_rows_matmul(out, self.kv_b_proj, rows, heads=self.heads, transpose=True)
        else:
            out = self.unembed_out(out)
        return out.swapaxes(0, 1)

    def _per_head(self) -> tuple[PerHead, PerHead]:
        """For `decode`: into latent space, (H, n, nope) to (H, n, R), and out of it, (H, n, R) to (H, n, v)."""
        if "kv_b_proj" not in self:
            return self["embed_q"], self["unembed_out"]
        kv_b = self["kv_b_proj"]
        return self._halves(kv_b, kv_b["weight"], kv_b.get("scales"), kv_b.get("biases"))

    def expand(self, latent: mx.array, heads: slice) -> tuple[mx.array, mx.array]:
        """k_nope (B, h, T, nope) and v (B, h, T, v) of latents (B, 1, T, R), for h of the heads."""
        if "kv_b_proj" in self:
            batch, _, keys, _ = latent.shape
            width = self.nope + self.v
            rows = slice(heads.start * width, heads.stop * width)
            kv = ops.rows_matmul(latent[:, 0], self.kv_b_proj, rows, transpose=True)
            k_nope, v = mx.split(kv.reshape(batch, keys, -1, width).swapaxes(1, 2), [self.nope], axis=-1)
            return k_nope, v
        k_nope = ops.rows_matmul(latent, self.embed_q, heads, transpose=False)
        return k_nope, ops.rows_matmul(latent, self.unembed_out, heads, transpose=True)

    def _place(self, spans: Sequence[Span], caches: Sequence[Any], latent: mx.array, k_pe: mx.array) -> list[Work]:
        work, row = [], 0
        for span, cache in zip(spans, caches, strict=True):
            rows = slice(row, row + span.batch * span.length)
            row = rows.stop
            new = latent[rows].reshape(span.batch, 1, span.length, self.rank)
            new_pe = k_pe[rows].reshape(span.batch, 1, span.length, self.pe)
            seen = PlainLatents(new, new_pe) if cache is None else extend(cache, new, new_pe)
            absorbed = self.prefers_absorbed(span.length, seen.keys)
            block_bytes = self._block_bytes(latent, seen.keys)
            work.append(Work(span, rows, seen, absorbed, block_bytes, latent.dtype.size))
        return work

    def _block_bytes(self, new: mx.array, keys: int) -> int:
        """What is left of the budget beside what every token of the pass takes."""
        taken = attention_bytes(self.config, new.shape[0], keys, element_bytes=new.dtype.size)
        return max(0, self.scratch_bytes - taken)

    def _attend_latent(self, queries: mx.array, q_pe: mx.array, item: Work) -> mx.array:
        """(n, H, R) attended latents of absorbed queries (n, H, R). Heads share the keys, so they are folded into rows."""
        queries, q_pe = (
            self._by_sequence(queries * self.scale, item.span),
            self._by_sequence(q_pe * self.scale, item.span),
        )
        batch, heads, length, _ = queries.shape
        blocks: list[mx.array] = []
        for rows, seen, mask in query_blocks(item, heads):
            keys = item.seen.first(seen)
            q = queries[:, :, rows].reshape(batch, 1, -1, self.rank)
            scores = keys.scores(q, q_pe[:, :, rows].reshape(batch, 1, -1, self.pe))
            if mask is not None:
                if isinstance(mask, str):
                    mask = item.span.causal(rows.stop - rows.start, seen)
                by_head = scores.reshape(batch, heads, -1, seen)
                lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
                scores = mx.where(mask, by_head, lowest).reshape(scores.shape)
            weights = mx.softmax(scores, axis=-1, precise=True)
            finish(blocks, keys.mixed(weights).reshape(batch, heads, -1, self.rank))
        return joined(blocks, axis=2).swapaxes(1, 2).reshape(batch * length, heads, self.rank)

    def _attend_expanded(self, q_nope: mx.array, q_pe: mx.array, item: Work) -> mx.array:
        """(n, H, v) values of queries (n, H, nope) and (n, H, rope), with keys and values of the whole cache expanded,
        as many heads at a time as fit the scratch budget."""
        queries = self._by_sequence(mx.concatenate([q_nope, q_pe], axis=-1), item.span)
        whole = item.seen.whole()
        groups: list[mx.array] = []
        for heads in head_groups(item, self.shape):
            k_nope, values = self.expand(whole.latent, heads)
            k_pe = mx.broadcast_to(whole.k_pe, (*k_nope.shape[:3], self.pe))
            keys = ops.turned(mx.concatenate([k_nope, k_pe], axis=-1), rows=item.span.length).swapaxes(-1, -2)
            count = heads.stop - heads.start
            spent_bytes = count * self.shape.head_elements(1) * item.key_bytes
            blocks: list[mx.array] = []
            for rows, seen, mask in query_blocks(item, count, spent_bytes=spent_bytes):
                output = mx.fast.scaled_dot_product_attention(
                    queries[:, heads, rows], keys[:, :, :seen], values[:, :, :seen], scale=self.scale, mask=mask
                )
                finish(blocks, output)
            groups.append(joined(blocks, axis=2))
            if heads.stop < self.heads:
                mx.eval(groups[-1])  # before the next group's keys are expanded
        return joined(groups, axis=1).swapaxes(1, 2).reshape(-1, self.heads, self.v)

    def _attend_run(
        self, q: mx.array, q_pe: mx.array, latent: mx.array, k_pe: mx.array, step: DecodeStep, cache: Any
    ) -> mx.array:
        """(L, 1, H, R) attended latents of L new tokens of a sequence, which its cache takes in: heads share the keys, so
        those of all tokens are rows of one product."""
        length = q.shape[0]
        if length == 1:
            seen = extend(cache, latent, k_pe)
            return seen.mixed(mx.softmax(seen.scores(q, q_pe, scale=self.scale), axis=-1, precise=True))
        q, q_pe, latent, k_pe = (each.reshape(1, 1, -1, each.shape[-1]) for each in (q, q_pe, latent, k_pe))
        seen = extend(cache, latent, k_pe)
        scores = seen.scores(q, q_pe, scale=self.scale, mask=step.mask(length, seen.keys, self.heads))
        attended = seen.mixed(mx.softmax(scores, axis=-1, precise=True))
        return attended.reshape(length, 1, self.heads, -1)

    def _by_sequence(self, rows: mx.array, span: Span) -> mx.array:
        """(B, H, L, width) of (B * L, H, width)."""
        return rows.reshape(span.batch, span.length, self.heads, -1).swapaxes(1, 2)


def _halves(heads: int, nope: int, kv_b: nn.Module, *_: mx.array | None) -> tuple[PerHead, PerHead]:
    """Products with each head's rows of k_nope and of v in kv_b_proj, which holds the arrays that follow."""
    whole = Projection.of(kv_b)
    k_nope, v = (whole.rows_of_heads(heads, rows) for rows in (slice(nope), slice(nope, None)))
    return partial(k_nope, transpose=False), v


def _by_head(x: mx.array, heads: int) -> mx.array:
    """(H, N, width) of single tokens (N, 1, H, width)."""
    return x.reshape(heads, 1, -1) if x.shape[0] == 1 else x[:, 0].swapaxes(0, 1)


def _by_token(x: mx.array, tokens: int, heads: int) -> mx.array:
    """(N, 1, H, width) of (H, N, width)."""
    return x.reshape(1, 1, heads, -1) if tokens == 1 else x.swapaxes(0, 1)[:, None]
