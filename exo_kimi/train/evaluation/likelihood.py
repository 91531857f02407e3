"""Perplexity on held-out replies, distance to a reference model, and the experts' loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.train.data.batches import make_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Measures over the counted tokens of some texts.

    Args:
        perplexity: e to the mean loss.
        kl: mean of KL(reference || model) in nats; None without a reference.
        same_choice: share of tokens where both models find the same token likeliest.
        loads: tokens of each expert of each MoE layer.
    """

    perplexity: float
    kl: float | None
    same_choice: float | None
    loads: dict[int, list[int]]


class _Counting(nn.Module):
    """Router that counts how often it chose each expert."""

    def __init__(self, gate: nn.Module, experts: int) -> None:
        super().__init__()
        self.gate = gate
        self.chosen = np.zeros(experts, np.int64)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        indices, weights = self.gate(x)
        self.chosen += np.bincount(np.array(indices).reshape(-1), minlength=len(self.chosen))
        return indices, weights


def likelihood(model: Model, texts: Sequence[Encoded], reference: Model | None = None) -> Likelihood:
    """Measure a model on texts, one by one and without padding, so that loads are those of real tokens."""
    counters = _count_loads(model)
    losses: list[float] = []
    distances: list[float] = []
    same: list[bool] = []
    for text in texts:
        batch = make_batch([text])
        rows, targets = mx.array(batch.rows), batch.targets
        inputs = mx.array(batch.inputs)[None]
        log_p = nn.log_softmax(model(inputs)[0, rows].astype(mx.float32), axis=-1)
        values = np.array(log_p)
        losses += (-values[np.arange(len(targets)), targets]).tolist()
        if reference is not None:
            log_q = np.array(nn.log_softmax(reference(inputs)[0, rows].astype(mx.float32), axis=-1))
            distances += (np.exp(log_q) * (log_q - values)).sum(-1).tolist()
            same += (log_q.argmax(-1) == values.argmax(-1)).tolist()
    loads = {layer: counter.chosen.tolist() for layer, counter in counters.items()}
    _stop_counting(model)
    return Likelihood(
        perplexity=math.exp(sum(losses) / len(losses)),
        kl=sum(distances) / len(distances) if distances else None,
        same_choice=sum(same) / len(same) if same else None,
        loads=loads,
    )


def _count_loads(model: Model) -> dict[int, Any]:
    counters: dict[int, Any] = {}
    for number, layer in enumerate(model.layers, start=model.start_layer):
        if "gate" in layer.mlp:
            layer.mlp.gate = counters[number] = _Counting(layer.mlp.gate, model.args.n_routed_experts)
    return counters


def _stop_counting(model: Model) -> None:
    for layer in model.layers:
        if "gate" in layer.mlp:
            layer.mlp.gate = layer.mlp.gate.gate
