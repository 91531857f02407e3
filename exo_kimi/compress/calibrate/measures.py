"""What is measured of each expert and layer while texts pass, as sums; which of them decide is `scores`' affair."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.calibrate.routing import RoutedTokens
from exo_kimi.models.moe import ExpertGLU

Values = NDArray[np.float64]
EXPERT_FIELDS = (
    "tokens",
    "gate_sum",
    "norm_sum",
    "norm_squared_sum",
    "gate_norm_sum",
    "loss_sum",
    "peak",
    "weight_norm",
)


@dataclass(slots=True)
class LayerMeasures:
    """Sums over the tokens of one layer; every array has one value for each of its E experts, and is empty where dense.

    Args:
        tokens: that chose the expert.
        gate_sum: of their weights, normalised and scaled.
        norm_sum: of |e(x)|, the length of what the expert gave, not weighted.
        norm_squared_sum: of |e(x)|^2.
        gate_norm_sum: of weight times |e(x)|.
        loss_sum: of |y - y without the expert|^2, where the router's next one steps in.
        peak: largest magnitude of a number that the expert gave.
        weight_norm: length of its three matrices together.
        energy: sum over all tokens of |y|^2, y being what the routed experts gave together.
        turned: sum over all tokens of 1 - cos(x, layer(x)).
        seen: number of tokens.
    """

    tokens: Values
    gate_sum: Values
    norm_sum: Values
    norm_squared_sum: Values
    gate_norm_sum: Values
    loss_sum: Values
    peak: Values
    weight_norm: Values
    energy: float = 0.0
    turned: float = 0.0
    seen: int = 0

    @classmethod
    def empty(cls, experts: int) -> LayerMeasures:
        """Nothing seen yet."""
        return cls(**{name: np.zeros(experts) for name in EXPERT_FIELDS})  # type: ignore[arg-type]

    @property
    def experts(self) -> int:
        """E; 0 where the layer is dense."""
        return len(self.tokens)

    @property
    def block_influence(self) -> float:
        """Mean of 1 - cos(x, layer(x)). Source: "ShortGPT", section 3.2."""
        return self.turned / self.seen if self.seen else 0.0

    def add_routed(self, routed: RoutedTokens) -> None:
        """Count tokens of the layer."""
        together = routed.together.astype(mx.float32)
        norms = mx.linalg.norm(routed.outputs.astype(mx.float32), axis=-1)
        lost = mx.square(together[:, None] - routed.without).sum(axis=-1)
        peaks = mx.abs(routed.outputs.astype(mx.float32)).max(axis=-1)
        energy = mx.square(together).sum()
        mx.eval(norms, lost, peaks, energy)
        chosen = np.array(routed.indices).reshape(-1)
        weights, lengths = _flat(routed.weights), _flat(norms)

        def total(values: Values) -> Values:
            return np.bincount(chosen, weights=values, minlength=self.experts).astype(np.float64)

        self.tokens += np.bincount(chosen, minlength=self.experts)
        self.gate_sum += total(weights)
        self.norm_sum += total(lengths)
        self.norm_squared_sum += total(lengths**2)
        self.gate_norm_sum += total(weights * lengths)
        self.loss_sum += total(_flat(lost))
        np.maximum.at(self.peak, chosen, _flat(peaks))
        self.energy += float(energy)

    def add_block(self, before: mx.array, after: mx.array) -> None:
        """Count hidden states (N, D) before and after the whole layer."""
        x, y = before.astype(mx.float32), after.astype(mx.float32)
        lengths = mx.linalg.norm(x, axis=-1) * mx.linalg.norm(y, axis=-1)
        self.turned += float((1 - (x * y).sum(axis=-1) / mx.maximum(lengths, 1e-30)).sum())
        self.seen += x.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All layers of a model, with what they were measured on.

    Args:
        fingerprint: of the checkpoint.
        chosen: experts of a token, `num_experts_per_tok`.
        layers: one per decoder layer.
        texts: how many, and of which files.
        domain: what they are about.
    """

    fingerprint: str
    chosen: int
    layers: tuple[LayerMeasures, ...]
    tokens: int
    texts: int
    domain: str
    files: tuple[str, ...] = field(default=())


def weight_norms(switch: ExpertGLU) -> Values:
    """(E,) the length of each expert's three matrices together, as they are multiplied with."""
    squares = np.zeros(switch.down_proj.weight.shape[0])
    for projection in (switch.gate_proj, switch.up_proj, switch.down_proj):
        for expert in range(len(squares)):  # one by one: a stack unpacked would be several times the layer
            weight = projection.weight[expert]
            if "scales" in projection:
                biases = projection.biases[expert] if "biases" in projection else None
                weight = mx.dequantize(
                    weight,
                    projection.scales[expert],
                    biases,
                    group_size=projection.group_size,
                    bits=projection.bits,
                    mode=projection.mode,
                )
            squares[expert] += float(mx.square(weight.astype(mx.float32)).sum())
    norms: Values = np.sqrt(squares)
    return norms


def _flat(values: mx.array) -> Values:
    return np.array(values.astype(mx.float32)).reshape(-1).astype(np.float64)
