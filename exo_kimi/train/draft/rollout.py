"""A draft head's rollout as in drafting, with its gradient, in NumPy: EAGLE-3's training-time test.

In step 0, row s of a sequence reads the target's features of position s and the token at s + 1, and attends to the rows before it
and to itself. In step j it reads what it gave in step j - 1 and the token at s + 1 + j, stands at position s + j, and attends to
step 0's rows up to s and to its own of the steps between: exactly what a chain of guesses that begins at s does, as long as its
guesses are right. So one rollout trains, and measures, chains from every row at once.

Axes: N rows laid end to end, C rows that go on after step 0, B sequences of one span, L its rows, H heads, D hidden.

Source: "EAGLE-3", Li et al. 2025, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.draft_config import DraftConfig, DraftLatent
from exo_kimi.arch.draft_modules import LAYER
from exo_kimi.errors import UnsupportedError
from exo_kimi.train.model.attention import QKV, Span, by_head, projections, rotations, span_rows
from exo_kimi.train.model.layers import Backward, Floats, Parameters, linear, mlp, rms_norm

Rows = NDArray[np.intp]
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Sequences laid end to end, padded within spans, and what of each step counts.

    Args:
        spans: sequences and padded rows of each.
        features: (N, features * D) of the target.
        embeddings: of each step, (N, D) of the token that follows the row's position by 1 + step; zeros where there is none.
        going: (C,) rows that go on after step 0.
        judged: of each step, the rows whose guess is judged, ascending; after step 0 places in `going`.
    """

    spans: Sequence[Span]
    features: Floats
    embeddings: Sequence[Floats]
    going: Rows
    judged: Sequence[Rows]


def rollout(
    parameters: Parameters, gradients: Parameters, config: DraftConfig, wavelengths: Floats, batch: RolloutBatch
) -> tuple[list[Floats], Callable[[Sequence[Floats]], None]]:
    """Logits of the judged rows of every step, (M_j, draft vocab), and the function from their gradients to all others.

    Args:
        parameters: by the names of `models.draft_head.DraftHead`, float32.
        gradients: of parameters, which the function adds to.
        wavelengths: (rope / 2,) of the head's rotary embedding.
        batch: of one or more steps.

    Raises:
        UnsupportedError: a head with attention as in Llama: this trains the kind that Kimi has itself.
    """
    attention = config.attention
    if not isinstance(attention, DraftLatent):
        raise UnsupportedError("only heads with MLA are trained here", param="kind", code="unsupported_value")
    core = _ChainAttention(batch, np.float32(attention.attention_scale))
    hidden, fuse_back = _fuse(parameters, gradients, config, batch.features)
    logits: list[Floats] = []
    tape: list[tuple[Callable[[Floats | None, Floats], Floats], Rows]] = []
    all_turns = rotations(wavelengths, batch.spans)
    ahead = np.exp(1j / wavelengths).astype(np.complex64)
    for step, embeddings in enumerate(batch.embeddings):
        rows = slice(None) if step == 0 else batch.going
        turns = (all_turns * ahead**step)[rows]
        if step == 1:
            hidden = hidden[batch.going]
        given, hidden, back = _step(
            (parameters, gradients, config), core, (embeddings[rows], hidden, turns), batch.judged[step]
        )
        logits.append(given)
        tape.append((back, batch.judged[step]))

    def backward(d_logits: Sequence[Floats]) -> None:
        d_hidden: Floats | None = None
        for step in reversed(range(len(tape))):
            d_hidden = tape[step][0](d_hidden, d_logits[step])
            if step == 1:
                whole = np.zeros((len(batch.features), d_hidden.shape[1]), np.float32)
                whole[batch.going] = d_hidden
                d_hidden = whole
        if d_hidden is not None:
            fuse_back(d_hidden)

    return logits, backward


def _fuse(
    parameters: Parameters, gradients: Parameters, config: DraftConfig, features: Floats
) -> tuple[Floats, Callable[[Floats], None]]:
    backs: list[Backward] = []
    if config.fc_norm:
        parts = []
        for number, part in enumerate(np.split(features, config.features, axis=-1)):
            normed, back = rms_norm(part, parameters, gradients, f"fc_norm.{number}", config.rms_norm_eps)
            parts.append(normed)
            backs.append(back)
        features = np.concatenate(parts, axis=-1)
    fused, fc_back = linear(features, parameters, gradients, "fc")

    def backward(d_fused: Floats) -> None:
        d_features = fc_back(d_fused)
        for back, part in zip(backs, np.split(d_features, config.features, axis=-1), strict=bool(backs)):
            back(np.ascontiguousarray(part))

    return fused, backward


def _step(
    model: tuple[Parameters, Parameters, DraftConfig],
    core: _ChainAttention,
    inputs: tuple[Floats, Floats, NDArray[np.complex64]],
    judged: Rows,
) -> tuple[Floats, Floats, Callable[[Floats | None, Floats], Floats]]:
    """Logits of the judged rows, the next hidden inputs of all, and the function from the gradients of both to that of the hidden
    inputs here."""
    parameters, gradients, config = model
    embeddings, hidden, turns = inputs
    attention, eps = config.attention, config.rms_norm_eps
    if not isinstance(attention, DraftLatent):
        raise TypeError("checked by `rollout`")

    def norm(x: Floats, name: str) -> tuple[Floats, Backward]:
        return rms_norm(x, parameters, gradients, name, eps)

    e, e_back = norm(embeddings, f"{LAYER}.input_layernorm")
    f, f_back = norm(hidden, f"{LAYER}.hidden_norm")
    x = np.concatenate([e, f], axis=-1)
    qkv, qkv_back = projections(x, turns, parameters, gradients, f"{LAYER}.self_attn", attention)
    attended, core_back = core.attend(qkv)
    a, o_back = linear(attended.reshape(len(x), -1), parameters, gradients, f"{LAYER}.self_attn.o_proj")
    r = (f if config.norm_before_residual else hidden) + a
    h, h_back = norm(r, f"{LAYER}.post_attention_layernorm")
    m, m_back = mlp(h, parameters, gradients, f"{LAYER}.mlp")
    out = r + m
    if config.norm_output:
        following, out_back = norm(out, "norm")
        seen, seen_back = following[judged], None
    else:
        following, out_back = out, None
        seen, seen_back = norm(out[judged], "norm")
    logits, head_back = linear(seen, parameters, gradients, "lm_head")

    def backward(d_following: Floats | None, d_logits: Floats) -> Floats:
        d = np.zeros_like(out) if d_following is None else d_following
        d_seen = head_back(d_logits)
        d[judged] += d_seen if seen_back is None else seen_back(d_seen)
        if out_back is not None:
            d = out_back(d)
        d_r = d + h_back(m_back(d))
        d_qkv = core_back(o_back(d_r).reshape(attended.shape))
        dx = qkv_back(d_qkv)
        half = dx.shape[1] // 2
        e_back(np.ascontiguousarray(dx[:, :half]))
        d_f = np.ascontiguousarray(dx[:, half:])
        if config.norm_before_residual:
            d_f += d_r
            return f_back(d_f)
        return d_r + f_back(d_f)

    return logits, following, backward


class _ChainAttention:
    """Attention of all steps, whose later ones see the keys of those before.

    Args:
        batch: its spans and the rows that go on.
        scale: of the scores.
    """

    def __init__(self, batch: RolloutBatch, scale: np.float32) -> None:
        self._spans = span_rows(batch.spans)
        self._rows = len(batch.features)
        self._going = batch.going
        self._scale = scale
        self._kept: list[QKV] = []
        self._d_kept: list[tuple[Floats, Floats]] = []

    def attend(self, given: QKV) -> tuple[Floats, Callable[[Floats], QKV]]:
        """The values that a step's queries attend to, (N or C, H, v), and the function from their gradient to those of its
        queries, keys and values. Steps go back in the reverse of their order."""
        step = len(self._kept)
        q, k, v = (self._wide(part, step) for part in given)
        self._kept.append((q, k, v))
        self._d_kept.append((np.zeros_like(k), np.zeros_like(v)))
        out = np.empty((self._rows, *v.shape[1:]), np.float32)
        weights = [self._attend_span(rows, span, step, out) for rows, span in self._spans]

        def backward(d_given: Floats) -> QKV:
            d_out = self._wide(d_given, step)
            dq = np.empty_like(q)
            for (rows, span), each in zip(self._spans, weights, strict=True):
                self._back_span((rows, span), step, each, (out, d_out, dq))
            dk, dv = self._d_kept[step]
            return self._narrow(dq, step), self._narrow(dk, step), self._narrow(dv, step)

        return self._narrow(out, step), backward

    def _wide(self, x: Floats, step: int) -> Floats:
        if step == 0:
            return x
        wide = np.zeros((self._rows, *x.shape[1:]), np.float32)
        wide[self._going] = x
        return wide

    def _narrow(self, x: Floats, step: int) -> Floats:
        return x if step == 0 else x[self._going]

    def _attend_span(self, rows: slice, span: Span, step: int, out: Floats) -> Floats:
        """Write what is attended to, and return the weights (B, H, L, L + step)."""
        length = span[1]
        q = by_head(self._kept[step][0][rows], span)
        scores = np.empty((*q.shape[:3], length + step), np.float32)
        np.matmul(q, by_head(self._kept[0][1][rows], span).swapaxes(-1, -2), out=scores[..., :length])
        scores[..., :length] += np.triu(np.full((length, length), -np.inf, np.float32), 1)
        for earlier in range(1, step + 1):
            keys = by_head(self._kept[earlier][1][rows], span)
            scores[..., length + earlier - 1] = np.einsum("bhlw,bhlw->bhl", q, keys)
        scores *= self._scale
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.matmul(scores[..., :length], by_head(self._kept[0][2][rows], span))
        for earlier in range(1, step + 1):
            mixed += scores[..., length + earlier - 1, None] * by_head(self._kept[earlier][2][rows], span)
        by_head(out[rows], span)[...] = mixed
        return scores

    def _back_span(
        self, place: tuple[slice, Span], step: int, weights: Floats, arrays: tuple[Floats, Floats, Floats]
    ) -> None:
        (rows, span), length = place, place[1][1]
        out, d_out, dq = (by_head(part[rows], span) for part in arrays)
        q = by_head(self._kept[step][0][rows], span)
        inner = np.einsum("bhlv,bhlv->bhl", d_out, out)[..., None]
        keys, values = (by_head(part[rows], span) for part in self._kept[0][1:])
        dk, dv = (by_head(part[rows], span) for part in self._d_kept[0])
        d_scores = np.matmul(d_out, values.swapaxes(-1, -2))
        d_scores -= inner
        d_scores *= weights[..., :length]
        d_scores *= self._scale
        dv += np.matmul(weights[..., :length].swapaxes(-1, -2), d_out)
        dk += np.matmul(d_scores.swapaxes(-1, -2), q)
        d_queries = np.matmul(d_scores, keys)
        for earlier in range(1, step + 1):
            weight = weights[..., length + earlier - 1, None]
            keys, values = (by_head(part[rows], span) for part in self._kept[earlier][1:])
            dk, dv = (by_head(part[rows], span) for part in self._d_kept[earlier])
            d_score = (np.einsum("bhlv,bhlv->bhl", d_out, values)[..., None] - inner) * weight * self._scale
            dv += weight * d_out
            dk += d_score * q
            d_queries += d_score * keys
        dq[...] = d_queries
