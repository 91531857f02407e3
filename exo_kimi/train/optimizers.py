"""AdamW and Muon over a dictionary of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from exo_kimi.train.model.layers import Floats, Parameters

_MUON_MOMENTUM = 0.95
_BETAS = (0.9, 0.95)
_EPS = 1e-8
_RMS = 0.2
"""Root mean square of AdamW's usual update, which Muon's is scaled to. Source: "Muon is Scalable for LLM Training"."""


class Optimizer:
    """Muon for the matrices that `is_matrix` names, AdamW for everything else.

    Args:
        parameters: changed in place.
        is_matrix: whether a name is a matrix: an array (..., rows, columns), every leading index a matrix of its own.
        decays: whether weight decay applies to a name.
        weight_decay: per step, times the learning rate.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        is_matrix: Callable[[str], bool],
        decays: Callable[[str], bool],
        weight_decay: float,
    ) -> None:
        self._parameters = parameters
        self._weight_decay = weight_decay
        self._is_matrix = {name: is_matrix(name) for name in parameters}
        self._decays = {name: decays(name) for name in parameters}
        self.state: Parameters = {}
        for name, value in parameters.items():
            for part in ("momentum",) if self._is_matrix[name] else ("first", "second"):
                self.state[f"{part} {name}"] = np.zeros_like(value)

    def update(self, gradients: Parameters, *, rate: float, step: int) -> None:
        """Update every parameter; steps are counted from 1."""
        for name, gradient in gradients.items():
            change = self._muon(name, gradient) if self._is_matrix[name] else self._adam(name, gradient, step)
            value = self._parameters[name]
            if self._decays[name]:
                value *= np.float32(1 - rate * self._weight_decay)
            change *= np.float32(rate)
            value -= change

    def _muon(self, name: str, gradient: Floats) -> Floats:
        momentum = self.state[f"momentum {name}"]
        momentum *= np.float32(_MUON_MOMENTUM)
        momentum += gradient
        rows, columns = gradient.shape[-2:]
        change = orthogonal(gradient + np.float32(_MUON_MOMENTUM) * momentum)  # Nesterov's look ahead
        change *= np.float32(_RMS * math.sqrt(max(rows, columns)))
        return change

    def _adam(self, name: str, gradient: Floats, step: int) -> Floats:
        first, second = self.state[f"first {name}"], self.state[f"second {name}"]
        first += np.float32(1 - _BETAS[0]) * (gradient - first)
        second += np.float32(1 - _BETAS[1]) * (gradient * gradient - second)
        scale = math.sqrt(1 - _BETAS[1] ** step) / (1 - _BETAS[0] ** step)
        root = np.sqrt(second) + np.float32(_EPS * math.sqrt(1 - _BETAS[1] ** step))
        return np.divide(first, root, dtype=np.float32) * np.float32(scale)


def orthogonal(matrix: Floats, steps: int = 5) -> Floats:
    """About U V^T of the singular value decomposition of (..., rows, columns), by a quintic Newton-Schulz iteration.

    Source: "Muon: An optimizer for hidden layers in neural networks", Jordan et al. 2024.
    """
    a, b, c = (np.float32(value) for value in (3.4445, -4.7750, 2.0315))
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Floats = matrix.swapaxes(-1, -2) if tall else matrix
    x = x / (np.sqrt((x * x).sum((-2, -1), keepdims=True)) + np.float32(1e-7))
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        polynomial = np.add(b * gram, c * (gram @ gram), dtype=np.float32)
        x = np.add(a * x, polynomial @ x, dtype=np.float32)
    return x.swapaxes(-1, -2) if tall else x


def clip(gradients: Parameters, limit: float) -> float:
    """Scale gradients in place so that their norm is at most `limit`; return the norm before."""
    norm = math.sqrt(sum(float(np.vdot(value, value)) for value in gradients.values()))
    if norm > limit:
        for value in gradients.values():
            value *= np.float32(limit / norm)
    return norm
