"""One new token of each of several sequences, in as few MLX primitives as possible; it knows nothing of prompts.

The layers themselves are the slow oracle. What a step can share is made once and not in each layer: rotations, row numbers,
views of weights. Weights are looked up when a `Decoder` is made: after changing any, make another.

Axes: N tokens, one of each sequence, as (N, 1, 1, D); H heads; R kv_lora_rank; K experts of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from exo_kimi.models import ops
from exo_kimi.models.fused import Fused, as_one
from exo_kimi.models.latent_cache import LatentCache8
from exo_kimi.models.mla import LATENT_NORM_EPS, Attention
from exo_kimi.models.moe import MLP, MoE, compiled
from exo_kimi.models.ops import KVCache, Rope
from exo_kimi.models.seen import Seen, extend

Projection = Callable[[mx.array], mx.array]
PIECE_LAYERS = 2
"""How many layers' graph is handed over at a time. Measured with the least of whole steps on 61 thin layers (CPU): 1 to 4 all
take off what building the graph takes; on Metal each piece is a command buffer at least."""


class Decoder:
    """Decoder layers for single tokens.

    MLX begins with the first layers while Python builds the graph of those after them. `piece_layers` is how many it is given
    at a time; 0 leaves everything to whoever evaluates the result, which is the oracle and what counts a whole graph.

    Args:
        layers: `models.kimi_k2.DecoderLayer`s of one model.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.piece_layers = PIECE_LAYERS
        self._layers = [_Layer(layer) for layer in layers]
        self._rope: Rope = layers[0].self_attn.rope
        self._frequencies = 1.0 / np.array(self._rope.wavelengths)
        self._chosen = max((layer.mlp.gate.chosen for layer in layers if isinstance(layer.mlp, MoE)), default=1)

    def takes(self, segments: Sequence[tuple[int, Sequence[Any]]]) -> bool:
        """Whether every sequence has one new token and a cache of ours."""
        return all(length == 1 and type(caches[0]) in (KVCache, LatentCache8) for length, caches in segments)

    def __call__(self, h: mx.array, caches: Sequence[Sequence[KVCache]]) -> mx.array:
        """(N, D) to (N, D); each sequence's caches, one per layer, grow by its token."""
        tokens = h.shape[0]
        step = _Step(self._rope, self._frequencies, [each[0].offset for each in caches], h.dtype, self._chosen)
        out = h.reshape(tokens, 1, 1, -1)
        for number, (layer, of_layer) in enumerate(zip(self._layers, zip(*caches, strict=True), strict=True), start=1):
            out = layer(out, step, of_layer)
            if self.piece_layers and number % self.piece_layers == 0:
                mx.async_eval(out)  # type: ignore[no-untyped-call]
        return out.reshape(tokens, -1)


class _Step:
    """What all layers of a step share."""

    def __init__(
        self, rope: Rope, frequencies: np.ndarray[Any, Any], offsets: list[int], dtype: mx.Dtype, chosen: int
    ) -> None:
        tokens = len(offsets)
        self.rows = mx.array(np.repeat(np.arange(tokens, dtype=np.uint32), chosen).reshape(tokens, 1, 1, chosen))
        self.choices = mx.array(np.arange(tokens * chosen, dtype=np.uint32).reshape(tokens, 1, 1, chosen))
        self._rope = rope
        self._positions = mx.array(offsets, dtype=mx.int32)
        self._matrix: mx.array | None = None
        if ops.on_cpu() and dtype == mx.float32:
            # Where MLX has no kernel for it, a rotation is a matrix product like any other.
            self._matrix = mx.array(rotations(np.array(offsets), frequencies, rope.amplitude)[:, None])

    def turned(self, x: mx.array) -> mx.array:
        """(N, 1, heads, rope) at the positions of its tokens."""
        if self._matrix is not None:
            return x @ self._matrix
        tokens, _, heads, dims = x.shape
        return self._rope.turn(x.reshape(tokens, heads, 1, dims), self._positions).reshape(tokens, 1, heads, dims)


def rotations(
    positions: np.ndarray[Any, Any], frequencies: np.ndarray[Any, Any], amplitude: float
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(N, dims, dims) float32 matrices that a row of interleaved pairs is multiplied with to turn it by its position.

    Args:
        positions: (N,).
        frequencies: (dims / 2,) float32 radians per position. Angles are rounded to float32, as MLX does.
        amplitude: factor of the result.
    """
    angles = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
    cosines, sines = amplitude * np.cos(angles), amplitude * np.sin(angles)
    pairs = len(frequencies)
    matrix = np.zeros((len(positions), pairs, 2, pairs, 2), np.float32)
    each = np.arange(pairs)
    matrix[:, each, 0, each, 0] = matrix[:, each, 1, each, 1] = cosines
    matrix[:, each, 0, each, 1] = sines
    matrix[:, each, 1, each, 0] = -sines
    return matrix.reshape(len(positions), 2 * pairs, 2 * pairs)


class _Norm:
    """x / sqrt(mean(x^2) + eps) * weight of (N, 1, 1, D).

    The CPU backend has no kernel for it and takes seven operations, of which handing each over costs more than it computes.
    In float32 the mean is a product of each row with itself there, which saves three; shapes that need no broadcast for one
    token save as many nodes.
    """

    def __init__(self, weight: mx.array, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._row, self._least = weight[None, None, None], mx.full((1, 1, 1, 1), eps)
        mx.eval(self._row, self._least)

    def __call__(self, x: mx.array) -> mx.array:
        if ops.on_cpu() and x.dtype == self._weight.dtype == mx.float32:
            mean = mx.addmm(self._least, x, x.swapaxes(-1, -2), alpha=1 / x.shape[-1])
            return x * mx.rsqrt(mean) * self._row
        return mx.fast.rms_norm(x, self._weight, self._eps)


class _Layer:
    def __init__(self, layer: Any) -> None:
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        self._norm, self._second_norm = _Norm(first.weight, first.eps), _Norm(second.weight, second.eps)
        self._attention = _Attention(layer.self_attn)
        self._mlp = _Mixture(layer.mlp) if isinstance(layer.mlp, MoE) else _Dense(layer.mlp)

    def __call__(self, x: mx.array, step: _Step, caches: Sequence[KVCache]) -> mx.array:
        h = x + self._attention(self._norm(x), step, caches)
        return h + self._mlp(self._second_norm(h), step)


class _Attention:
    """`mla.Attention` in latent space."""

    def __init__(self, attention: Attention) -> None:
        self._heads, self._rank, self._nope = attention.heads, attention.rank, attention.nope
        self._scale = attention.scale
        self._fused = attention.fused
        self._cuts = [self._rank]
        if "q_proj" in attention:
            self._q, self._q_norm = _projection(attention.q_proj), None
        else:
            self._q = _projection(attention.q_b_proj)
            self._q_norm = _Norm(attention.q_a_layernorm.weight, LATENT_NORM_EPS)
            self._q_a = _projection(attention.q_a_proj)
            if self._fused is not None:
                start = self._fused.rows[0]
                self._cuts = [start, start + self._rank]
        self._kv_a = _projection(attention.kv_a_proj_with_mqa)
        self._kv_norm = _Norm(attention.kv_a_layernorm.weight, LATENT_NORM_EPS)
        self._absorb, self._absorb_transposes, self._unembed = _halves(attention)
        self._o = _projection(attention.o_proj)

    def __call__(self, x: mx.array, step: _Step, caches: Sequence[KVCache]) -> mx.array:
        tokens, heads = x.shape[0], self._heads
        if self._fused is not None:
            q, latent, k_pe = mx.split(self._fused(x), self._cuts, axis=-1)
        else:
            latent, k_pe = mx.split(self._kv_a(x), self._cuts, axis=-1)
            q = x if self._q_norm is None else self._q_a(x)
        if self._q_norm is not None:
            q = self._q_norm(q)
        q_nope, q_pe = mx.split(self._q(q).reshape(tokens, 1, heads, -1), [self._nope], axis=-1)
        q_pe, k_pe = step.turned(q_pe), step.turned(k_pe)
        latent = self._kv_norm(latent)
        q = self._by_token(_matmul(self._by_head(q_nope), self._absorb, transpose=self._absorb_transposes))
        if tokens == 1:
            attended = self._attend(q, q_pe, extend(caches[0], latent, k_pe))
        else:
            rows = [slice(row, row + 1) for row in range(tokens)]
            attended = mx.concatenate(
                [
                    self._attend(q[row], q_pe[row], extend(cache, latent[row], k_pe[row]))
                    for row, cache in zip(rows, caches, strict=True)
                ]
            )
        values = _matmul(self._by_head(attended), self._unembed, transpose=True)
        out = values if tokens == 1 else values.swapaxes(0, 1)
        return self._o(out.reshape(tokens, 1, 1, -1))

    def _attend(self, q: mx.array, q_pe: mx.array, seen: Seen) -> mx.array:
        """(1, 1, H, R): heads share the keys, so they are rows of one product."""
        return seen.mixed(mx.softmax(seen.scores(q, q_pe, scale=self._scale), axis=-1, precise=True))

    def _by_head(self, x: mx.array) -> mx.array:
        """(H, N, width) of (N, 1, H, width)."""
        if x.shape[0] == 1:
            return x.reshape(self._heads, 1, -1)
        return x[:, 0].swapaxes(0, 1)

    def _by_token(self, x: mx.array) -> mx.array:
        """(N, 1, H, width) of (H, N, width)."""
        if x.shape[1] == 1:
            return x.reshape(1, 1, self._heads, -1)
        return x.swapaxes(0, 1)[:, None]


class _Dense:
    """`moe.MLP`."""

    def __init__(self, mlp: MLP) -> None:
        self._fused = mlp.fused
        self._gate, self._up, self._down = map(_projection, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, x: mx.array, step: _Step) -> mx.array:
        gate, up = (self._gate(x), self._up(x)) if self._fused is None else mx.split(self._fused(x), 2, axis=-1)
        return self._down(ops.swiglu(gate, up))


class _Mixture:
    """`moe.MoE`."""

    def __init__(self, mixture: MoE) -> None:
        self._choose, self._factor = compiled(mixture.gate.choose), mixture.gate.factor
        weight = mixture.gate.weight.astype(mx.float32).T
        self._columns = weight, weight[None, None]
        self._bias = mixture.gate.e_score_correction_bias.astype(mx.float32)[None, None, None]
        mx.eval(self._columns, self._bias)
        experts = mixture.switch_mlp
        self._fused = experts.fused
        self._gate_up = as_one(experts.gate_proj), as_one(experts.up_proj)
        self._down = as_one(experts.down_proj)
        self._shared = _Dense(mixture.shared_experts) if "shared_experts" in mixture else None

    def __call__(self, x: mx.array, step: _Step) -> mx.array:
        tokens = x.shape[0]
        # A matrix of two axes would make MLX flatten x and unflatten the product.
        logits = x.astype(mx.float32) @ self._columns[tokens == 1]
        chosen, weights = self._choose(logits, self._bias)
        if self._fused is not None:
            gate, up = mx.split(self._fused.of_experts(x, chosen, rows=step.rows), 2, axis=-1)
        else:
            gate, up = (one.of_experts(x, chosen, rows=step.rows) for one in self._gate_up)
        y = self._down.of_experts(ops.swiglu(gate, up), chosen, rows=step.choices)
        y = y.reshape(tokens, 1, chosen.shape[-1], -1)
        shared = self._shared(x, step) if self._shared is not None else None
        if shared is not None and y.dtype == mx.float32:
            return mx.addmm(shared, weights, y, alpha=self._factor)
        y = ((weights * self._factor) @ y.astype(mx.float32)).astype(x.dtype)
        return y if shared is None else y + shared


def _projection(module: nn.Module) -> Projection:
    return module if "bias" in module else as_one(module)


def _halves(attention: Attention) -> tuple[Fused, bool, Fused]:
    """Each head's rows of k_nope and whether to multiply with their transpose, and each head's rows of v."""
    if "kv_b_proj" not in attention:
        return as_one(attention.embed_q), True, as_one(attention.unembed_out)
    one = as_one(attention.kv_b_proj)

    def rows(chosen: slice) -> Fused:
        def view(array: mx.array) -> mx.array:
            rows_of_heads = array.reshape(attention.heads, -1, array.shape[-1])[:, chosen]
            mx.eval(rows_of_heads)
            return rows_of_heads

        scales, biases = (None if array is None else view(array) for array in (one.scales, one.biases))
        return Fused(rows=(), weight=view(one.weight), scales=scales, biases=biases, packing=one.packing)

    return rows(slice(0, attention.nope)), False, rows(slice(attention.nope, None))


def _matmul(x: mx.array, one: Fused, *, transpose: bool) -> mx.array:
    """(H, N, inputs) with the matrix of each head."""
    if one.scales is None:
        return x @ (one.weight.swapaxes(-1, -2) if transpose else one.weight)
    return mx.quantized_matmul(x, one.weight, one.scales, one.biases, transpose=transpose, **one.packing)
