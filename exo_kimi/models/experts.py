"""Routed experts: the feed-forward layers that each token picks from; it knows nothing of how they are picked."""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from exo_kimi.models import ops
from exo_kimi.models.fused import Fused, as_one

SORTED_FROM = 64
"""Choices from which tokens are sorted by expert, so that each expert's weights are read in one go."""


class _Activation(nn.Module):
    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return ops.swiglu(gate, up)


class _ExpertLinear(SwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return as_one(self).of_experts(x, indices, in_order=sorted_indices)


class ExpertGLU(SwitchGLU):
    """down_e(silu(gate_e(x)) * up_e(x)) for the experts e of each token; each projection has its own quantization.

    Args:
        x: (N, D) tokens.
        indices: (N, K) experts of each token.

    Returns:
        (N, K, D).
    """

    together: ClassVar = (("gate_proj", "up_proj"),)

    def __init__(self, input_dims: int, hidden_dims: int, experts: int) -> None:
        super().__init__(input_dims, hidden_dims, experts, activation=_Activation())
        self.gate_proj = _ExpertLinear(input_dims, hidden_dims, experts, bias=False)
        self.up_proj = _ExpertLinear(input_dims, hidden_dims, experts, bias=False)
        self.down_proj = _ExpertLinear(hidden_dims, input_dims, experts, bias=False)
        self.fused: Fused | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if self.fused is None:
            return super().__call__(x, indices)
        tokens, chosen = indices.shape
        experts, rows = indices.reshape(-1), None
        in_order = experts.size >= SORTED_FROM
        if in_order:
            order = mx.argsort(experts)
            experts, rows = experts[order], order // chosen
            both = self.fused.of_experts(x[rows][:, None], experts, in_order=True)
        else:
            both = self.fused.of_experts(x[:, None, None], indices)
        gate, up = mx.split(both, 2, axis=-1)
        y = self.down_proj(ops.swiglu(gate, up), experts if in_order else indices, sorted_indices=in_order)
        if in_order:
            y = y[mx.argsort(order)]
        return y.reshape(tokens, chosen, -1)
