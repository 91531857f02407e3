"""Kimi Delta Attention over ragged spans, and of single tokens.

Axes: N tokens laid end to end, B batch, L new tokens, H heads, D width of a head, C = H * D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.linear import LinearAttention
from exo_kimi.models import ops
from exo_kimi.models.adapters import Adaptable
from exo_kimi.models.blocks import Span, joined
from exo_kimi.models.decode import DecodeStep, Derived
from exo_kimi.models.kda.delta_rule import DeltaInputs, delta_rule
from exo_kimi.models.kda.recurrent_cache import RecurrentCache

__all__ = ["DeltaAttention"]

BLOCK = 64
"""Tokens whose queries, keys, values and gates are made at a time, in float32."""

L2_EPS = 1e-6
"""Added to the sum of squares of a query or key. Source: l2norm of flash-linear-attention; mlx-lm 0.31 adds it to their mean."""


class ShortConv(nn.Module):
    """Taps of a causal convolution of every channel, the last one for the token itself; under mlx-lm's names."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.weight = mx.zeros((channels, taps, 1))


class DeltaAttention(Adaptable):
    """o_proj(norm(o) * sigmoid(g_b(g_a x))) with o of the gated delta rule, a state in place of a cache of tokens.

    q, k, v = silu(short convolutions of projections of x), q and k of length 1, q times D^-0.5; a channel decays by
    exp(-exp(A_log) softplus(f_b(f_a x) + dt_bias)), and a head learns at the rate sigmoid(b x).

    Source: "Kimi Linear", arXiv 2510.26692, section 3; KimiLinearDeltaAttention in transformers.
    """

    together: ClassVar = ("q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj")
    projections: ClassVar = (*together, "f_b_proj", "g_b_proj", "o_proj")
    called: ClassVar = projections

    def __init__(self, config: KimiConfig, linear: LinearAttention) -> None:
        super().__init__()
        hidden, width, taps = config.hidden_size, linear.width, linear.short_conv_kernel_size
        self.heads, self.dims, self.width, self.taps = linear.num_heads, linear.head_dim, width, taps
        self.eps = config.rms_norm_eps
        self.scratch_bytes = ops.SCRATCH_BYTES
        self._operands = Derived(self._in_float32)
        for name in ("q", "k", "v"):
            self[f"{name}_proj"] = nn.Linear(hidden, width, bias=False)
            self[f"{name}_conv"] = ShortConv(width, taps)
        for name in ("f", "g"):
            self[f"{name}_a_proj"] = nn.Linear(hidden, self.dims, bias=False)
            self[f"{name}_b_proj"] = nn.Linear(self.dims, width, bias=False)
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.A_log = mx.zeros((1, 1, self.heads, 1))
        self.dt_bias = mx.zeros((width,))
        self.o_norm = nn.RMSNorm(self.dims, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def make_cache(self, kv_bits: int | None) -> RecurrentCache:
        """An empty state; it is float32 whatever bits the caches of other layers have."""
        return RecurrentCache()

    def takes(self, cache: Any, length: int = 1) -> bool:
        """Whether `decode` can go on from a cache by so many tokens: one, as each changes the state that the next one meets."""
        return length == 1 and type(cache) is RecurrentCache

    def __call__(self, x: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]) -> mx.array:
        """Run every span's tokens through its state.

        Args:
            x: (N, D) tokens of all spans, laid end to end.
            positions: (N,) int32, of no meaning here.
            spans: rows that belong together; their batch * length sum to N.
            caches: one per span: a `RecurrentCache`, which takes the span's tokens in, or None.

        Returns:
            (N, D).
        """
        qkv, f_a, g_a, b = self.project(x)
        outputs, row = [], 0
        for span, cache in zip(spans, caches, strict=True):
            rows = slice(row, row + span.batch * span.length)
            row = rows.stop
            parts = [each[rows].reshape(span.batch, span.length, -1) for each in (qkv, f_a, b)]
            o = self._attend(parts[0], parts[1], parts[2], cache)
            outputs.append(o.reshape(span.batch * span.length, self.heads, self.dims))
        return self["o_proj"](self._gated(joined(outputs), g_a))

    def decode(self, x: mx.array, step: DecodeStep, caches: Sequence[Any]) -> mx.array:
        """The same from one new token of each of N sequences, (N, 1, 1, D) to (N, 1, 1, D), in as few MLX primitives as possible.

        Its oracle is a call with a span for each sequence.
        """
        tokens, heads, dims = step.tokens, self.heads, self.dims
        if self.adapted or any(cache.recurrent_state is None for cache in caches):
            spans = [Span(1, 1, None)] * tokens
            return self(x.reshape(tokens, -1), step.positions, spans, caches).reshape(tokens, 1, 1, -1)
        taps, rates, dt_bias, scales = self._parameters()
        qkv, f_a, g_a, b = self.project(x.reshape(tokens, -1))
        qkv = qkv.reshape(tokens, 1, -1)
        f = (self["f_b_proj"](f_a).astype(mx.float32) + dt_bias).reshape(tokens, heads, 1, dims)
        decays = mx.exp(nn.softplus(f) * rates[:, None])
        beta = mx.sigmoid(b.astype(mx.float32)).reshape(tokens, heads, 1)
        rows = [slice(row, row + 1) for row in range(tokens)]
        windows = [
            mx.concatenate([cache.conv_state, qkv[row] if tokens > 1 else qkv], axis=1)
            for row, cache in zip(rows, caches, strict=True)
        ]
        mixed = nn.silu((joined(windows) * taps).sum(axis=1)).reshape(tokens, 3, heads, dims)
        qk, v = mx.split(mixed, [2], axis=1)
        both = mx.split(mx.fast.rms_norm(qk, None, L2_EPS / dims) * scales, 2, axis=1)
        q, k = (each.reshape(tokens, heads, 1, dims) for each in both)
        v = v.reshape(tokens, heads, dims)
        outputs = []
        for row, window, cache in zip(rows, windows, caches, strict=True):
            own = (decays, beta, q, k, v) if tokens == 1 else (each[row] for each in (decays, beta, q, k, v))
            o, state = _one_token(cache.recurrent_state, *own)
            cache.update(mx.contiguous(window[:, 1:]), state, 1)
            outputs.append(o)
        return self["o_proj"](self._gated(joined(outputs), g_a)).reshape(tokens, 1, 1, -1)

    def remember(self, x: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]) -> None:
        """Let the states take these tokens in, and give nothing; arguments as of a call."""
        self(x, positions, spans, caches)  # lazily: what gates and projects outputs is never computed

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """q, k and v before their convolutions (N, 3 C), f_a (N, D), g_a (N, D) and b (N, H) of tokens (N, hidden)."""
        ends = [3 * self.width, 3 * self.width + self.dims, 3 * self.width + 2 * self.dims]
        if self.fused is not None:
            qkv, f_a, g_a, b = mx.split(self.fused(x), ends, axis=-1)
            return qkv, f_a, g_a, b
        q, k, v, f_a, g_a, b = (self[name](x) for name in self.together)
        return mx.concatenate([q, k, v], axis=-1), f_a, g_a, b

    def _attend(self, qkv: mx.array, f_a: mx.array, b: mx.array, cache: RecurrentCache | None) -> mx.array:
        """(B, L, H, D) float32 of projections (B, L, ...) of one span."""
        before = (None, None) if cache is None else cache.state
        o, window, state = self._run((qkv, f_a, b), *before)
        if cache is not None:

            def replay(tokens: int) -> tuple[mx.array, mx.array]:
                first = (qkv[:, :tokens], f_a[:, :tokens], b[:, :tokens])
                _, conv_state, recurrent_state = self._run(first, *before)
                return conv_state, recurrent_state

            cache.update(window, state, qkv.shape[1], replay)
        return o

    def _run(
        self, projected: tuple[mx.array, mx.array, mx.array], window: mx.array | None, state: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Outputs (B, L, H, D) float32, and both states after them; blocks of tokens, so that float32 copies stay small."""
        qkv, f_a, b = projected
        batch, length, _ = qkv.shape
        if window is None:
            window = mx.zeros((batch, self.taps - 1, qkv.shape[-1]), qkv.dtype)
        if state is None:
            state = mx.zeros((batch, self.heads, self.dims, self.dims))
        outputs = []
        for start in range(0, length, BLOCK):
            rows = slice(start, min(start + BLOCK, length))
            window = mx.concatenate([window, qkv[:, rows]], axis=1)
            inputs = self._inputs(window, f_a[:, rows], b[:, rows])
            window = window[:, -(self.taps - 1) :] if self.taps > 1 else window[:, :0]
            o, state = delta_rule(inputs, state)
            outputs.append(o)
            if length > BLOCK:
                mx.eval(o, state)  # or the graph of the next block would hold this one's arrays
        return joined(outputs, axis=1), mx.contiguous(window), state

    def _inputs(self, window: mx.array, f_a: mx.array, b: mx.array) -> DeltaInputs:
        """Of a block of l tokens: their projections with those of taps - 1 tokens before, (B, l + taps - 1, 3 C)."""
        taps, rates, dt_bias, _ = self._parameters()
        batch, length, _ = f_a.shape
        if length == 1:
            mixed = (window * taps).sum(axis=1, keepdims=True)
        else:
            mixed = window[:, :length] * taps[0]
            for tap in range(1, self.taps):
                mixed = mixed + window[:, tap : tap + length] * taps[tap]
        q, k, v = mx.split(nn.silu(mixed).reshape(batch, length, 3, self.heads, self.dims), 3, axis=2)
        # rms_norm adds its eps to the mean of squares, so that of the sum is divided by their number.
        q, k = (mx.fast.rms_norm(each[:, :, 0], None, L2_EPS / self.dims) for each in (q, k))
        f = self["f_b_proj"](f_a).astype(mx.float32) + dt_bias
        g = rates * nn.softplus(f).reshape(batch, length, self.heads, self.dims)
        return DeltaInputs(q * (1 / self.dims), k * self.dims**-0.5, v[:, :, 0], g, mx.sigmoid(b.astype(mx.float32)))

    def _parameters(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Taps (taps, 3 C), what softplus is multiplied with (H, 1), dt_bias (C,), and what normed q and k are multiplied with
        (2, 1, 1), all float32."""
        convs = (self[f"{name}_conv"]["conv"]["weight"] for name in ("q", "k", "v"))
        return self._operands(*convs, self["A_log"], self["dt_bias"])

    def _gated(self, o: mx.array, g_a: mx.array) -> mx.array:
        """(N, C) of outputs (N, H, D) float32."""
        gate = self["g_b_proj"](g_a).astype(mx.float32).reshape(o.shape)
        normed = mx.fast.rms_norm(o, self["o_norm"].weight.astype(mx.float32), self.eps)
        return (normed * mx.sigmoid(gate)).astype(g_a.dtype).reshape(-1, self.width)

    def _in_float32(
        self, q: mx.array, k: mx.array, v: mx.array, a_log: mx.array, dt_bias: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """See `_parameters`."""
        taps = mx.concatenate([q, k, v])[..., 0].astype(mx.float32).T
        rates = -mx.exp(a_log.astype(mx.float32)).reshape(self.heads, 1)
        scales = mx.array([1 / self.dims, self.dims**-0.5]).reshape(2, 1, 1)
        operands = mx.contiguous(taps), rates, dt_bias.astype(mx.float32), scales
        mx.eval(operands)
        return operands


def _one_token(
    state: mx.array, decay: mx.array, beta: mx.array, q: mx.array, k: mx.array, v: mx.array
) -> tuple[mx.array, mx.array]:
    """Outputs (1, H, Dv) and the state (1, H, Dv, Dk) after one token; decay, q and k are (1, H, 1, Dk), v is (1, H, Dv)."""
    state = state * decay
    new = (v - (state * k).sum(axis=-1)) * beta
    state = state + new[..., None] * k
    return (state * q).sum(axis=-1), state
