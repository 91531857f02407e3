"""Saliency of experts, from what was measured: the larger, the more the model would miss the expert."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from exo_kimi.compress.calibrate.measures import LayerMeasures, Measured, Values

Criterion = Literal["leave-one-out", "reap", "mean-gate", "man", "msan", "ean", "frequency", "weight-norm", "random"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
SUPER_PERCENTILE, SUPER_SHARE, SUPER_LAYERS = 99.5, 0.1, 0.75
"""An expert is "super" when its peak is above this percentile of all experts' and this share of the largest one's, in this share
of the layers from the first. Source: "Unveiling Super Experts in Mixture-of-Experts Large Language Models"."""


def saliency(layer: LayerMeasures, criterion: Criterion, *, seed: int = 0) -> Values:
    """(E,) what each expert of a layer is worth.

    leave-one-out   sum over tokens of |y - y without it|^2, the router's next expert stepping in; over the layer's energy, so
                    that layers can be weighed against each other
    reap            mean over its tokens of weight |e(x)|. Source: "REAP the Experts"
    mean-gate       mean over its tokens of the weight
    man, msan       mean over its tokens of |e(x)|, of |e(x)|^2. Source: "How to Score Experts for One-Shot MoE Expert Pruning"
    ean             sum over its tokens of |e(x)|. Source: "Finding Fantastic Experts in MoEs"
    frequency       how many tokens chose it
    weight-norm     length of its matrices
    random          chance, by the seed

    Args:
        layer: what was measured.
        criterion: which.
        seed: of `random`.
    """
    counts = np.maximum(layer.tokens, 1)
    if criterion == "leave-one-out":
        return layer.loss_sum / max(layer.energy, 1e-30)
    if criterion == "reap":
        return layer.gate_norm_sum / counts
    if criterion == "mean-gate":
        return layer.gate_sum / counts
    if criterion == "man":
        return layer.norm_sum / counts
    if criterion == "msan":
        return layer.norm_squared_sum / counts
    if criterion == "ean":
        return layer.norm_sum
    if criterion == "frequency":
        return layer.tokens
    if criterion == "weight-norm":
        return layer.weight_norm
    return np.random.default_rng(seed).random(layer.experts)


def saliencies(measured: Measured, criterion: Criterion, *, seed: int = 0) -> dict[int, Values]:
    """`saliency` of every MoE layer, by its number."""
    return {
        number: saliency(layer, criterion, seed=seed * len(measured.layers) + number)
        for number, layer in enumerate(measured.layers)
        if layer.experts
    }


def super_experts(measured: Measured) -> dict[int, tuple[int, ...]]:
    """Experts by layer that give the massive activations that attention rests on; pruning one of them breaks the model."""
    peaks = {number: layer.peak for number, layer in enumerate(measured.layers) if layer.experts}
    if not peaks:
        return {}
    everything = np.concatenate(list(peaks.values()))
    bound = max(float(np.percentile(everything, SUPER_PERCENTILE)), SUPER_SHARE * float(everything.max()))
    last = SUPER_LAYERS * len(measured.layers)
    found = {
        number: tuple(np.flatnonzero(values > bound).tolist()) for number, values in peaks.items() if number < last
    }
    return {number: experts for number, experts in found.items() if experts}
