"""Multi-head latent attention with its gradient, in NumPy.

Axes: N tokens laid end to end, B sequences of one span, L its tokens, H heads, R kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.scratch import LatentAttentionConfig
from exo_kimi.train.model.layers import Backward, Floats, Parameters, linear, rms_norm

Span = tuple[int, int]
"""(sequences, tokens of each): rows of the flat token list that attend within their sequence, causally."""

QKV = tuple[Floats, Floats, Floats]

_LATENT_NORM_EPS = 1e-6


def attention(
    x: Floats,
    turns: NDArray[np.complex64],
    spans: Sequence[Span],
    parameters: Parameters,
    gradients: Parameters,
    path: str,
    config: KimiConfig,
) -> tuple[Floats, Backward]:
    """softmax(scale * q k^T) v on (N, D) with causal masks.

    Args:
        turns: (N, rope / 2) rotations of each token's position, see `rotations`.
        spans: their sequences times tokens sum to N.

    Source: "DeepSeek-V2", section 2.1; `models.mla.Attention`, expanded form.
    """
    heads, v_dim, count = config.num_attention_heads, config.v_head_dim, len(x)
    (q, k, v), projections_back = projections(x, turns, parameters, gradients, path, config)
    attended = np.empty((count, heads, v_dim), np.float32)
    scale = np.float32(config.attention_scale)
    tape = [
        (rows, span, _attend(q[rows], k[rows], v[rows], span, scale, attended[rows])) for rows, span in span_rows(spans)
    ]
    y, o_back = linear(attended.reshape(count, heads * v_dim), parameters, gradients, f"{path}.o_proj")

    def backward(dy: Floats) -> Floats:
        d_attended = o_back(dy).reshape(count, heads, v_dim)
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        for rows, span, weights in tape:
            _attend_back(
                weights,
                (q[rows], k[rows], v[rows], attended[rows], d_attended[rows]),
                span,
                scale,
                (dq[rows], dk[rows], dv[rows]),
            )
        return projections_back((dq, dk, dv))

    return y, backward


def projections(
    x: Floats,
    turns: NDArray[np.complex64],
    parameters: Parameters,
    gradients: Parameters,
    path: str,
    config: LatentAttentionConfig,
) -> tuple[QKV, Callable[[QKV], Floats]]:
    """Queries and keys (N, H, nope + rope) and values (N, H, v) of (N, inputs), and the way back to the inputs' gradient.

    Args:
        turns: (N, rope / 2) rotations of each token's position, see `rotations`.
    """
    heads, nope, pe, v_dim = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    rank, count = config.kv_lora_rank, len(x)
    if config.q_lora_rank is None:
        flat_q, q_back = linear(x, parameters, gradients, f"{path}.q_proj")
    else:
        flat_q, q_back = _low_rank(x, parameters, gradients, path)
    q = flat_q.reshape(count, heads, nope + pe).copy()
    _turn(q[..., nope:], turns[:, None])
    compressed, kv_a_back = linear(x, parameters, gradients, f"{path}.kv_a_proj_with_mqa")
    latent, latent_back = rms_norm(
        compressed[:, :rank], parameters, gradients, f"{path}.kv_a_layernorm", _LATENT_NORM_EPS
    )
    expanded, kv_b_back = linear(latent, parameters, gradients, f"{path}.kv_b_proj")
    kv = expanded.reshape(count, heads, nope + v_dim)
    k = np.empty((count, heads, nope + pe), np.float32)
    k[..., :nope] = kv[..., :nope]
    k_pe = compressed[:, rank:].copy()
    _turn(k_pe, turns)
    k[..., nope:] = k_pe[:, None]
    v = np.ascontiguousarray(kv[..., nope:])

    def backward(given: QKV) -> Floats:
        dq, dk, dv = given
        d_kv = np.concatenate([dk[..., :nope], dv], axis=-1)
        dq = dq.copy()
        _turn(dq[..., nope:], turns[:, None].conj())
        d_compressed = np.empty_like(compressed)
        d_compressed[:, :rank] = latent_back(kv_b_back(d_kv.reshape(count, -1)))
        d_pe = dk[..., nope:].sum(1)
        _turn(d_pe, turns.conj())
        d_compressed[:, rank:] = d_pe
        dx = kv_a_back(d_compressed)
        dx += q_back(dq.reshape(count, -1))
        return dx

    return (q, k, v), backward


def rotations(wavelengths: Floats, spans: Sequence[Span]) -> NDArray[np.complex64]:
    """(N, rope / 2) factors e^(i position / wavelength) of the tokens of all spans, each sequence from position 0."""
    positions = np.concatenate([np.tile(np.arange(length, dtype=np.float32), count) for count, length in spans])
    return np.exp(1j * positions[:, None] / wavelengths[None]).astype(np.complex64)


def _low_rank(x: Floats, parameters: Parameters, gradients: Parameters, path: str) -> tuple[Floats, Backward]:
    down, down_back = linear(x, parameters, gradients, f"{path}.q_a_proj")
    normed, norm_back = rms_norm(down, parameters, gradients, f"{path}.q_a_layernorm", _LATENT_NORM_EPS)
    up, up_back = linear(normed, parameters, gradients, f"{path}.q_b_proj")

    def backward(dy: Floats) -> Floats:
        return down_back(norm_back(up_back(dy)))

    return up, backward


def _turn(x: Floats, turns: NDArray[np.complex64]) -> None:
    """Rotate interleaved pairs of the last axis in place."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even + 1j * odd) * turns
    x[..., 0::2], x[..., 1::2] = turned.real, turned.imag


def span_rows(spans: Sequence[Span]) -> list[tuple[slice, Span]]:
    """The rows of each span in the flat token list."""
    stops = np.cumsum([count * length for count, length in spans])
    return [(slice(int(stop) - span[0] * span[1], int(stop)), span) for stop, span in zip(stops, spans, strict=True)]


def by_head(x: Floats, span: Span) -> Floats:
    """(B, H, L, width) view of (B * L, H, width)."""
    return x.reshape(*span, *x.shape[1:]).swapaxes(1, 2)


def _attend(q: Floats, k: Floats, v: Floats, span: Span, scale: np.float32, out: Floats) -> Floats:
    """Write the attended values to `out` and return the weights (B, H, L, L)."""
    scores: Floats = np.matmul(by_head(q, span), by_head(k, span).swapaxes(-1, -2))
    scores *= scale
    hidden = np.triu(np.full((span[1], span[1]), -np.inf, np.float32), 1)
    scores += hidden
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    by_head(out, span)[...] = np.matmul(scores, by_head(v, span))
    return scores


def _attend_back(
    weights: Floats,
    inputs: tuple[Floats, Floats, Floats, Floats, Floats],
    span: Span,
    scale: np.float32,
    outputs: tuple[Floats, Floats, Floats],
) -> None:
    q, k, v, attended, d_attended = (by_head(part, span) for part in inputs)
    dq, dk, dv = (by_head(part, span) for part in outputs)
    dv[...] = np.matmul(weights.swapaxes(-1, -2), d_attended)
    d_scores = np.matmul(d_attended, v.swapaxes(-1, -2))
    d_scores -= np.einsum("bhlv,bhlv->bhl", d_attended, attended)[..., None]
    d_scores *= weights
    d_scores *= scale
    dq[...] = np.matmul(d_scores, k)
    dk[...] = np.matmul(d_scores.swapaxes(-1, -2), q)
