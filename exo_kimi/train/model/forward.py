"""Loss and gradients of a whole Kimi K2, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exo_kimi.arch.config import KimiConfig
from exo_kimi.train.model.attention import Span, attention, rotations
from exo_kimi.train.model.layers import (
    Backward,
    Floats,
    Parameters,
    add_gradient,
    experts,
    linear,
    mlp,
    rms_norm,
    router,
)

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of several lengths, laid end to end; shorter ones are padded at their end within a span.

    Args:
        inputs: (N,) token ids.
        spans: sequences and padded tokens of each.
        rows: (M,) where the loss is taken.
        targets: (M,) the token that follows there.
        padding: (N,) bool, rows that are no text.
    """

    inputs: Ids
    spans: Sequence[Span]
    rows: NDArray[np.intp]
    targets: Ids
    padding: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """Summed loss in nats, its gradients (of the sum), and how many tokens each expert of each MoE layer got."""

    loss: float
    gradients: Parameters
    loads: dict[int, NDArray[np.int64]]


def loss_and_gradients(parameters: Parameters, config: KimiConfig, wavelengths: Floats, batch: Batch) -> ForwardResult:
    """Cross entropy summed over `batch.rows`.

    Args:
        parameters: by the names of `models.kimi_k2.Model`; experts stacked (E, out, in).
        wavelengths: (rope / 2,) of the rotary embedding, `models.ops.Rope.of(config).wavelengths`.
    """
    gradients: Parameters = {}
    logits, backward, loads = _forward(parameters, gradients, config, wavelengths, batch)
    loss, d_logits = _cross_entropy(logits, batch.targets)
    backward(d_logits)
    return ForwardResult(loss=loss, gradients=gradients, loads=loads)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """A pass whose loss is the caller's.

    Args:
        logits: (M, vocab) at each of `batch.rows`.
        backward: from the gradient of the logits to those of all parameters; to be called once.
        loads: how many tokens each expert of each MoE layer got.
    """

    logits: Floats
    backward: Callable[[Floats], Parameters]
    loads: dict[int, NDArray[np.int64]]


def forward_pass(parameters: Parameters, config: KimiConfig, wavelengths: Floats, batch: Batch) -> ForwardPass:
    """Logits at each of `batch.rows`, and the way back; see `loss_and_gradients` for the arguments."""
    gradients: Parameters = {}
    logits, back, loads = _forward(parameters, gradients, config, wavelengths, batch)

    def backward(d_logits: Floats) -> Parameters:
        back(d_logits)
        return gradients

    return ForwardPass(logits=logits, backward=backward, loads=loads)


def predictions(parameters: Parameters, config: KimiConfig, wavelengths: Floats, batch: Batch) -> Ids:
    """(M,) the likeliest token at each of `batch.rows`."""
    chosen: Ids = next_logits(parameters, config, wavelengths, batch).argmax(-1).astype(np.int32)
    return chosen


def next_logits(parameters: Parameters, config: KimiConfig, wavelengths: Floats, batch: Batch) -> Floats:
    """(M, vocab) the logits at each of `batch.rows`."""
    logits, _, _ = _forward(parameters, {}, config, wavelengths, batch)
    return logits


def features_and_logits(
    parameters: Parameters, config: KimiConfig, wavelengths: Floats, batch: Batch, layers: Sequence[int]
) -> tuple[Floats, Floats]:
    """(N, features * D) what enters each of some layers, laid end to end, and (M, vocab) the logits at each of `batch.rows`.

    Args:
        layers: ascending; the number of layers stands for what leaves the last.
    """
    entering: list[Floats] = []
    logits, _, _ = _forward(parameters, {}, config, wavelengths, batch, entering)
    return np.concatenate([entering[layer] for layer in layers], axis=-1), logits


def _forward(
    parameters: Parameters,
    gradients: Parameters,
    config: KimiConfig,
    wavelengths: Floats,
    batch: Batch,
    entering: list[Floats] | None = None,
) -> tuple[Floats, Callable[[Floats], None], dict[int, NDArray[np.int64]]]:
    """(M, vocab) logits of `batch.rows`, the function from their gradient to all others, and the experts' loads; what enters
    each layer, and what leaves the last, is added to `entering`."""
    loads: dict[int, NDArray[np.int64]] = {}
    turns = rotations(wavelengths, batch.spans)
    h = parameters["model.embed_tokens.weight"][batch.inputs]
    tape: list[tuple[Backward, Backward]] = []
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        if entering is not None:
            entering.append(h)
        normed, norm_back = rms_norm(h, parameters, gradients, f"{path}.input_layernorm", config.rms_norm_eps)
        out, back = attention(normed, turns, batch.spans, parameters, gradients, f"{path}.self_attn", config)
        h = h + out
        tape.append((norm_back, back))
        normed, norm_back = rms_norm(h, parameters, gradients, f"{path}.post_attention_layernorm", config.rms_norm_eps)
        if config.is_moe(layer):
            out, back, loads[layer] = _moe(normed, parameters, gradients, f"{path}.mlp", config, batch.padding)
        else:
            out, back = mlp(normed, parameters, gradients, f"{path}.mlp")
        h = h + out
        tape.append((norm_back, back))
    if entering is not None:
        entering.append(h)
    normed, last_back = rms_norm(h[batch.rows], parameters, gradients, "model.norm", config.rms_norm_eps)
    logits, head_back = linear(normed, parameters, gradients, "lm_head")

    def backward(d_logits: Floats) -> None:
        dh = np.zeros_like(h)
        dh[batch.rows] = last_back(head_back(d_logits))
        while tape:
            norm_back, back = tape.pop()
            dh += norm_back(back(dh))
        add_gradient(gradients, "model.embed_tokens.weight", _summed_rows(batch.inputs, dh, config.vocab_size))

    return logits, backward, loads


def _moe(
    x: Floats,
    parameters: Parameters,
    gradients: Parameters,
    path: str,
    config: KimiConfig,
    padding: NDArray[np.bool_],
) -> tuple[Floats, Backward, NDArray[np.int64]]:
    chosen = config.num_experts_per_tok
    indices, weights, router_back = router(
        x,
        parameters,
        gradients,
        f"{path}.gate",
        chosen=chosen,
        factor=config.routed_scaling_factor,
        normalised=config.norm_topk_prob and chosen > 1,
    )
    y, experts_back = experts(x, indices, weights, parameters, gradients, f"{path}.switch_mlp")
    loads = np.bincount(indices[~padding].reshape(-1), minlength=len(parameters[f"{path}.gate.weight"]))
    if not config.n_shared_experts:
        shared_back = None
    else:
        shared, shared_back = mlp(x, parameters, gradients, f"{path}.shared_experts")
        y += shared

    def backward(dy: Floats) -> Floats:
        dx, d_weights = experts_back(dy)
        dx += router_back(d_weights)
        if shared_back is not None:
            dx += shared_back(dy)
        return dx

    return y, backward, loads


def _cross_entropy(logits: Floats, targets: Ids) -> tuple[float, Floats]:
    """Summed loss and its gradient; the logits' memory is reused."""
    rows = np.arange(len(targets))
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[rows, targets].copy()
    np.exp(logits, out=logits)
    total = logits.sum(-1, keepdims=True)
    loss = float((np.log(total[:, 0]) - chosen).sum(dtype=np.float64))
    logits /= total
    logits[rows, targets] -= 1
    return loss, logits


def _summed_rows(ids: Ids, values: Floats, count: int) -> Floats:
    """(count, D): the sum of the rows of each id."""
    order = np.argsort(ids, kind="stable")
    firsts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    summed = np.zeros((count, values.shape[1]), np.float32)
    summed[ids[order][firsts]] = np.add.reduceat(values[order], firsts, axis=0)
    return summed
