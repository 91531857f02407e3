"""The parts of a decoder layer except attention, with their gradients, in NumPy.

Every function returns its output and a function from the output's gradient to the input's; gradients of parameters are added
to a dictionary on the way. Axes: N tokens laid end to end, D hidden, E experts, K experts per token, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Parameters = dict[str, Floats]
Backward = Callable[[Floats], Floats]


def add_gradient(gradients: Parameters, name: str, value: Floats) -> None:
    """Add to the gradient of a name in a dictionary."""
    if name in gradients:
        gradients[name] += value
    else:
        gradients[name] = value


def linear(x: Floats, parameters: Parameters, gradients: Parameters, path: str) -> tuple[Floats, Backward]:
    """x W^T of (..., in) with W (out, in)."""
    name = f"{path}.weight"
    weight = parameters[name]

    def backward(dy: Floats) -> Floats:
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        add_gradient(gradients, name, flat_dy.T @ flat_x)
        return dy @ weight

    return x @ weight.T, backward


def rms_norm(
    x: Floats, parameters: Parameters, gradients: Parameters, path: str, eps: float
) -> tuple[Floats, Backward]:
    """x / sqrt(mean(x^2) + eps) * g over the last axis."""
    name = f"{path}.weight"
    gain = parameters[name]
    scale = np.reciprocal(np.sqrt(np.einsum("nd,nd->n", x, x)[:, None] / np.float32(x.shape[-1]) + np.float32(eps)))
    unit = x * scale

    def backward(dy: Floats) -> Floats:
        add_gradient(gradients, name, np.einsum("nd,nd->d", dy, unit))
        du = dy * gain
        inner = np.einsum("nd,nd->n", du, unit)[:, None] / np.float32(x.shape[-1])
        du -= unit * inner
        du *= scale
        return du

    return unit * gain, backward


def swiglu(gate: Floats, up: Floats) -> tuple[Floats, Callable[[Floats], tuple[Floats, Floats]]]:
    """silu(gate) * up."""
    sigmoid = np.reciprocal(1 + np.exp(-gate))
    silu = gate * sigmoid

    def backward(dy: Floats) -> tuple[Floats, Floats]:
        d_gate = sigmoid + silu - silu * sigmoid
        d_gate *= dy
        d_gate *= up
        return d_gate, dy * silu

    return silu * up, backward


def mlp(x: Floats, parameters: Parameters, gradients: Parameters, path: str) -> tuple[Floats, Backward]:
    """down(silu(gate(x)) * up(x))."""
    gate, gate_back = linear(x, parameters, gradients, f"{path}.gate_proj")
    up, up_back = linear(x, parameters, gradients, f"{path}.up_proj")
    inner, inner_back = swiglu(gate, up)
    y, down_back = linear(inner, parameters, gradients, f"{path}.down_proj")

    def backward(dy: Floats) -> Floats:
        d_gate, d_up = inner_back(down_back(dy))
        dx = gate_back(d_gate)
        dx += up_back(d_up)
        return dx

    return y, backward


def router(
    x: Floats, parameters: Parameters, gradients: Parameters, path: str, *, chosen: int, factor: float, normalised: bool
) -> tuple[NDArray[np.intp], Floats, Backward]:
    """K experts (N, K) of each token and their weights (N, K); the bias steers the choice only."""
    scores, back = linear(x, parameters, gradients, path)
    scores = np.reciprocal(1 + np.exp(-scores))
    ranking = scores + parameters[f"{path}.e_score_correction_bias"]
    indices = np.argpartition(-ranking, chosen - 1, axis=-1)[:, :chosen]
    picked = np.take_along_axis(scores, indices, axis=-1)
    total: Floats = picked.sum(-1, keepdims=True) + np.float32(1e-20)
    if not normalised:
        total = np.ones_like(total)
    weights = np.multiply(picked / total, factor, dtype=np.float32)

    def backward(d_weights: Floats) -> Floats:
        if normalised:
            inner = (d_weights * weights).sum(-1, keepdims=True)
            d_picked = (d_weights * np.float32(factor) - inner) / total
        else:
            d_picked = d_weights * np.float32(factor)
        d_scores = np.zeros_like(scores)
        np.put_along_axis(d_scores, indices, d_picked * picked * (1 - picked), axis=-1)
        return back(d_scores)

    return indices, weights, backward


def experts(
    x: Floats, indices: NDArray[np.intp], weights: Floats, parameters: Parameters, gradients: Parameters, path: str
) -> tuple[Floats, Callable[[Floats], tuple[Floats, Floats]]]:
    """sum over chosen experts of weight * expert(x): every expert takes its own tokens, one matrix product each.

    The backward returns the gradients of x and of the weights (N, K).
    """
    names = [f"{path}.{part}_proj.weight" for part in ("gate", "up", "down")]
    gate_w, up_w, down_w = (parameters[name] for name in names)
    y = np.zeros_like(x)
    tape: list[tuple[Any, ...]] = []
    for expert in range(len(gate_w)):
        rows, slots = np.nonzero(indices == expert)
        taken = x[rows]
        inner, inner_back = swiglu(taken @ gate_w[expert].T, taken @ up_w[expert].T)
        weight = weights[rows, slots][:, None]
        weighted = inner * weight
        y[rows] += weighted @ down_w[expert].T
        tape.append((rows, slots, taken, inner, inner_back, weight, weighted))

    def backward(dy: Floats) -> tuple[Floats, Floats]:
        dx, d_weights = np.zeros_like(x), np.zeros_like(weights)
        sums = [np.zeros_like(parameters[name]) for name in names]
        for expert, (rows, slots, taken, inner, inner_back, weight, weighted) in enumerate(tape):
            dy_taken = dy[rows]
            sums[2][expert] = dy_taken.T @ weighted
            d_weighted = dy_taken @ down_w[expert]
            d_weights[rows, slots] = np.einsum("nw,nw->n", d_weighted, inner)
            d_gate, d_up = inner_back(d_weighted * weight)
            sums[0][expert], sums[1][expert] = d_gate.T @ taken, d_up.T @ taken
            d_taken = d_gate @ gate_w[expert]
            d_taken += d_up @ up_w[expert]
            dx[rows] += d_taken
        for name, value in zip(names, sums, strict=True):
            add_gradient(gradients, name, value)
        return dx, d_weights

    return y, backward
