"""The gated delta rule of Kimi Delta Attention, token by token and by chunks.

    S <- S diag(a);  S <- S + b (v - S k) k^T;  o = S q        with a = exp(g), of each channel

Axes: B batch, L tokens, H heads, Dk width of keys, Dv width of values; c chunks of C tokens.

Source: "Kimi Linear", arXiv 2510.26692, section 3; recurrent_kimi_delta_attention in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models import gated_delta

from exo_kimi.models import ops

CHUNK = 16
"""Tokens of a chunk: 4 MB of decays between its pairs for 32 heads of 128."""

EVALUATED = 16
"""Tokens of the recurrence that are computed at a time: each holds a state (2 MB for 32 heads of 128) until it is evaluated."""


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """What the rule takes of tokens, all float32.

    Args:
        q, k: (B, L, H, Dk), of length 1 but for q's factor Dk^-0.5.
        v: (B, L, H, Dv).
        g: (B, L, H, Dk) logarithms of the decays, at most 0.
        beta: (B, L, H).
    """

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array


def delta_rule(inputs: DeltaInputs, state: mx.array) -> tuple[mx.array, mx.array]:
    """Outputs (B, L, H, Dv) and the state after them, (B, H, Dv, Dk), in the way that is fastest here.

    On Metal that is mlx-lm's kernel. On a CPU the recurrence moves less than chunks multiply (the reference BLAS of MLX's Linux
    wheels reaches 8 GFLOP/s); on other GPUs one token at a time would leave them idle.
    """
    tokens = inputs.q.shape[1]
    if mx.metal.is_available() and not ops.on_cpu() and inputs.q.shape[-1] % 32 == 0:
        outputs, after = gated_delta.gated_delta_kernel(
            inputs.q, inputs.k, inputs.v, mx.exp(inputs.g), inputs.beta, state
        )
        return outputs, after
    if ops.on_cpu() or tokens < CHUNK:
        return recurrent(inputs, state)
    return chunked(inputs, state)


def recurrent(inputs: DeltaInputs, state: mx.array) -> tuple[mx.array, mx.array]:
    """A token after the other: the oracle of the other forms. Evaluates as it goes where there are many."""
    decays, beta = mx.exp(inputs.g)[:, :, :, None], inputs.beta[..., None]
    keys, queries = inputs.k[:, :, :, None], inputs.q[:, :, :, None]
    outputs = []
    for token in range(inputs.q.shape[1]):
        state = state * decays[:, token]
        new = (inputs.v[:, token] - (state * keys[:, token]).sum(axis=-1)) * beta[:, token]
        state = state + new[..., None] * keys[:, token]
        outputs.append((state * queries[:, token]).sum(axis=-1))
        if len(outputs) % EVALUATED == 0:
            mx.eval(state, outputs[-EVALUATED:])
    return outputs[0][:, None] if len(outputs) == 1 else mx.stack(outputs, axis=1), state


def chunked(inputs: DeltaInputs, state: mx.array) -> tuple[mx.array, mx.array]:
    """The same by chunks: what tokens of a chunk do to each other in products, and the state once a chunk.

    With G the running sum of g in a chunk, tokens i > j meet through sum_d k_i k_j exp(G_i - G_j). Both factors of that
    exponential, exp(G_i) and exp(-G_j), leave float32 within 64 tokens of ordinary decay; their difference is at most 0, and is
    taken for each pair.
    """
    tokens = inputs.q.shape[1]
    padding = -tokens % CHUNK
    q, k, v, g = (_in_chunks(each, padding) for each in (inputs.q, inputs.k, inputs.v, inputs.g))
    beta = _in_chunks(inputs.beta[..., None], padding)
    decay = mx.cumsum(g, axis=-2)  # (B, c, H, C, Dk)
    last = decay[..., -1:, :]
    between = mx.exp(mx.minimum(decay[..., :, None, :] - decay[..., None, :, :], 0.0))
    later = mx.tril(mx.ones((CHUNK, CHUNK)), k=-1)
    meets = (between * k[..., :, None, :] * k[..., None, :, :]).sum(axis=-1) * later * beta
    sees = (between * q[..., :, None, :] * k[..., None, :, :]).sum(axis=-1) * (later + mx.eye(CHUNK))
    # What a token adds to the state is a value less what is held for its key: of the chunk's own tokens, and of the state.
    grown = mx.exp(decay)
    values, held = _solved(meets, beta * v, beta * k * grown)
    queries, keys = q * grown, k * mx.exp(last - decay)
    outputs = []
    for chunk in range(q.shape[1]):
        new = values[:, chunk] - held[:, chunk] @ state.swapaxes(-1, -2)  # (B, H, C, Dv)
        outputs.append(queries[:, chunk] @ state.swapaxes(-1, -2) + sees[:, chunk] @ new)
        state = state * mx.exp(last[:, chunk]) + new.swapaxes(-1, -2) @ keys[:, chunk]
    stacked = mx.stack(outputs, axis=1).swapaxes(2, 3)  # (B, c, C, H, Dv)
    return stacked.reshape(stacked.shape[0], -1, *stacked.shape[3:])[:, :tokens], state


def _in_chunks(x: mx.array, padding: int) -> mx.array:
    """(B, c, H, C, width) of (B, L, H, width). Padding with zeros changes nothing: no decay, no key, no beta."""
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)])
    batch, length, heads, width = x.shape
    return x.reshape(batch, length // CHUNK, CHUNK, heads, width).swapaxes(2, 3)


def _solved(meets: mx.array, *rights: mx.array) -> tuple[mx.array, ...]:
    """(1 + meets)^-1 times each of the rights, row by row: an inverse by powers of `meets` would lose digits."""
    whole = mx.concatenate(list(rights), axis=-1)
    rows = [whole[..., :1, :]]
    for row in range(1, CHUNK):
        before = mx.concatenate(rows, axis=-2)
        rows.append(whole[..., row : row + 1, :] - meets[..., row : row + 1, :row] @ before)
    solved = mx.split(mx.concatenate(rows, axis=-2), [rights[0].shape[-1]], axis=-1)
    return tuple(solved)
