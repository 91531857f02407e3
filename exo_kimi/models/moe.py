"""Feed-forward layers: the dense MLP, the router, the routed experts and the mixture of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from exo_kimi.arch.config import KimiConfig
from exo_kimi.errors import UsageError
from exo_kimi.models import ops
from exo_kimi.models.adapters import Adaptable
from exo_kimi.models.decode import DecodeStep, Derived
from exo_kimi.models.expert_bank import ExpertBank, Ids
from exo_kimi.models.projection import Projection

SORTED_FROM = 64
"""Choices from which tokens are sorted by expert, so that each expert's weights are read in one go."""


class MLP(Adaptable):
    """down(silu(gate(x)) * up(x))."""

    together: ClassVar = ("gate_proj", "up_proj")
    projections: ClassVar = (*together, "down_proj")
    called: ClassVar = projections

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = (
            (self["gate_proj"](x), self["up_proj"](x)) if self.fused is None else mx.split(self.fused(x), 2, axis=-1)
        )
        return self["down_proj"](ops.swiglu(gate, up))

    def decode(self, x: mx.array, step: DecodeStep) -> mx.array:
        """The same, whatever the axes before the last."""
        return self(x)


@dataclass(frozen=True)
class ExpertChoice:
    """K experts by their logits: those that rank best within the best `kept_groups` of `groups`."""

    groups: int
    kept_groups: int
    chosen: int
    normalised: bool = field(kw_only=True)

    def __call__(self, logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        """Experts (..., K) and their weights, not yet times the factor, of logits (..., E) and a bias that broadcasts. Which
        experts they are has no gradient."""
        return self.weighted(*self.ranked(logits, bias, learning=True))

    def ranked(self, logits: mx.array, bias: mx.array, *, learning: bool = False) -> tuple[mx.array, mx.array]:
        """Scores (..., E) and experts (..., K); `learning` where somebody may take gradients, which costs a primitive."""
        scores, ranking = ops.scores_and_ranking(logits, bias)
        ranking = mx.stop_gradient(ranking) if learning else ranking
        ranking = self.eligible(ranking)
        others = ranking.shape[-1] - self.chosen
        indices = (
            mx.argpartition(ranking, kth=others, axis=-1)[..., others:] if others else mx.argsort(ranking, axis=-1)
        )
        return scores, indices

    def weighted(self, scores: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
        """The experts and their weights."""
        weights = mx.take_along_axis(scores, indices, axis=-1)
        if self.normalised:
            weights = ops.shares(weights, weights.sum(axis=-1, keepdims=True))
        return indices, weights

    def eligible(self, ranking: mx.array) -> mx.array:
        """The same, with every expert last that cannot be chosen."""
        return self._within_best_groups(ranking) if self.kept_groups < self.groups else ranking

    def _within_best_groups(self, ranking: mx.array) -> mx.array:
        """Rank every expert outside the best groups last; a group is as good as its two best experts together."""
        grouped = ranking.reshape(*ranking.shape[:-1], self.groups, -1)
        two = min(2, grouped.shape[-1])
        group_scores = mx.topk(grouped, two, axis=-1).sum(axis=-1, keepdims=True)
        dropped = self.groups - self.kept_groups
        worst = mx.argpartition(group_scores, kth=dropped - 1, axis=-2)[..., :dropped, :]
        grouped = mx.put_along_axis(grouped, worst, mx.array(-mx.inf, grouped.dtype), axis=-2)
        return grouped.reshape(ranking.shape)


class CompiledChoice:
    """The same with what comes before the weights in one compiled call on a GPU, shared by all layers; for decoding, as every
    number of tokens is traced anew. The weights stay outside: scores that are gathered in the same trace would be a kernel of
    their own."""

    __slots__ = ("_choice", "_ranked")

    def __init__(self, choice: ExpertChoice) -> None:
        self._choice, self._ranked = choice, _compiled_ranking(choice)

    def __reduce__(self) -> tuple[type[CompiledChoice], tuple[ExpertChoice]]:
        return CompiledChoice, (self._choice,)  # what is compiled cannot be pickled

    def __call__(self, logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        """As of `ExpertChoice`."""
        return self._choice.weighted(*self._ranked(logits, bias))


@lru_cache
def _compiled_ranking(choice: ExpertChoice) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    return ops.compiled_on_gpu(choice.ranked, shapeless=False)


class Router(nn.Module):
    """K experts for each token and their weights, in float32 whatever the weights are stored in.

    scores = sigmoid(x W^T); the K best by scores + e_score_correction_bias, within the best `topk_group` of `n_group`
    groups; weights are the unbiased scores, normalised, times `routed_scaling_factor`. In bf16, 2.8-3.9 % of tokens per
    layer would go to other experts.

    Attributes:
        on_choice: told the experts of each pass, not evaluated; for recording them.

    Source: "DeepSeek-V3", section 2.1.2; DeepseekV3TopkRouter in transformers.
    """

    def __init__(self, config: KimiConfig, experts: int) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.choose = ExpertChoice(
            config.n_group, config.topk_group, self.chosen, normalised=config.norm_topk_prob and self.chosen > 1
        )
        self.factor = config.routed_scaling_factor
        self.on_choice: Callable[[mx.array], None] | None = None
        self.weight = mx.zeros((experts, config.hidden_size))
        self.e_score_correction_bias = mx.zeros((experts,))
        self._operands, self._choose = Derived(_in_float32), CompiledChoice(self.choose)
        self.packing: dict[str, Any] = {}

    def use_packing(self, **packing: Any) -> None:
        """Hold weights as MLX packs them, `packing` being bits, group_size and mode; they are yet to come. float32 is made of
        them at every use until `widen`: packed products would round their inputs."""
        self.packing = packing
        self.weight, self.scales, *biases = mx.quantize(self.weight, **packing)
        if biases:
            self.biases = biases[0]

    def widen(self) -> None:
        """Hold float32 weights, whatever they were stored in."""
        self.weight = self._whole()
        for leaf in ("scales", "biases"):
            self.pop(leaf, None)
        mx.eval(self.weight)

    def logits(self, x: mx.array) -> mx.array:
        """(N, E) float32 of tokens (N, D)."""
        return x.astype(mx.float32) @ self._whole().T

    def _whole(self) -> mx.array:
        """(E, D) float32."""
        if "scales" not in self:
            return self["weight"].astype(mx.float32)
        if "biases" not in self:  # float modes, whose scales are exponents
            return mx.dequantize(self["weight"], self["scales"], **self.packing).astype(mx.float32)
        scales, biases = (self[leaf].astype(mx.float32) for leaf in ("scales", "biases"))
        return mx.dequantize(self["weight"], scales, biases, **self.packing)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts (N, K) uint32 and weights (N, K) float32 of tokens (N, D)."""
        indices, weights = self.choose(self.logits(x), self.e_score_correction_bias.astype(mx.float32))
        if self.on_choice is not None:
            self.on_choice(indices)
        return indices, weights * self.factor

    def decode(self, x: mx.array, step: DecodeStep) -> tuple[mx.array, mx.array]:
        """Experts (N, 1, 1, K) and their weights, not yet times the factor, of single tokens (N, 1, 1, D)."""
        weight = self["weight"] if "scales" not in self else self._whole()
        matrix, row, bias = self._operands(weight, self["e_score_correction_bias"])
        # A matrix of two axes would make MLX flatten a single token and unflatten the product.
        logits = x.astype(mx.float32) @ (row if step.tokens == 1 else matrix)
        indices, weights = self._choose(logits, bias)
        if self.on_choice is not None:
            self.on_choice(indices)
        return indices, weights

    def best(self, x: mx.array, count: int) -> mx.array:
        """(N, count) experts of tokens (N, D), the one that ranks highest first."""
        weight = self["weight"] if "scales" not in self else self._whole()
        matrix, _, bias = self._operands(weight, self["e_score_correction_bias"])
        _, ranking = ops.scores_and_ranking(x.astype(mx.float32) @ matrix, bias.reshape(-1))
        return mx.argsort(-self.choose.eligible(ranking), axis=-1)[..., :count]


def _in_float32(weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """W^T as a matrix of two axes and of four, and the bias of four."""
    matrix = weight.astype(mx.float32).T
    operands = matrix, matrix[None, None], bias.astype(mx.float32)[None, None, None]
    mx.eval(operands)
    return operands


class _Activation(nn.Module):
    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return ops.swiglu(gate, up)


class _ExpertLinear(SwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return Projection.of(self).of_experts(x, indices, in_order=sorted_indices)


class ExpertGLU(Adaptable, SwitchGLU):
    """down_e(silu(gate_e(x)) * up_e(x)) for the experts e of each token; each projection has its own quantization.

    Args:
        x: (N, D) tokens.
        indices: (N, K) experts of each token.

    Returns:
        (N, K, D).

    Attributes:
        bank: reads experts into the rows, which are slots then; None where every expert has its row.
    """

    together: ClassVar = ("gate_proj", "up_proj")
    projections: ClassVar = (*together, "down_proj")

    def __init__(self, input_dims: int, hidden_dims: int, experts: int) -> None:
        super().__init__(input_dims, hidden_dims, experts, activation=_Activation())
        self.gate_proj = _ExpertLinear(input_dims, hidden_dims, experts, bias=False)
        self.up_proj = _ExpertLinear(input_dims, hidden_dims, experts, bias=False)
        self.down_proj = _ExpertLinear(hidden_dims, input_dims, experts, bias=False)
        self.bank: ExpertBank | None = None

    def __call__(self, x: mx.array, indices: mx.array, beside: Sequence[mx.array] = ()) -> mx.array:
        """`beside` is what else the layer computes, begun before experts are read."""
        if self.bank is None:
            return self._of_rows(x, indices)
        self._refuse_adapters()
        y = self.bank.run(indices, SlottedExperts(self, x, lambda slots: self._of_rows(x, slots)), beside)
        return y.reshape(*indices.shape, -1)

    def _of_rows(self, x: mx.array, indices: mx.array) -> mx.array:
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

    def decode(self, x: mx.array, experts: mx.array, step: DecodeStep, beside: Sequence[mx.array] = ()) -> mx.array:
        """(N, 1, K, D) of single tokens (N, 1, 1, D) and their experts (N, 1, 1, K); `beside` as in the call."""
        if self.adapted:
            rows = self(x.reshape(step.tokens, -1), experts.reshape(step.tokens, -1), beside)
            return rows.reshape(step.tokens, 1, experts.shape[-1], -1)
        if self.bank is None:
            return self._decode_rows(x, experts, step)
        tokens = x.reshape(step.tokens, -1)
        y = self.bank.run(
            experts, SlottedExperts(self, tokens, lambda slots: self._decode_rows(x, slots, step)), beside
        )
        return y.reshape(step.tokens, 1, experts.shape[-1], -1)

    def _decode_rows(self, x: mx.array, experts: mx.array, step: DecodeStep) -> mx.array:
        gate, up = self._gate_and_up(x, experts, rows=step.rows)
        y = Projection.of(self["down_proj"]).of_experts(ops.swiglu(gate, up), experts, rows=step.choices)
        return y.reshape(step.tokens, 1, experts.shape[-1], -1)

    def _gate_and_up(
        self, x: mx.array, experts: mx.array, *, rows: mx.array | None, in_order: bool = False
    ) -> tuple[mx.array, mx.array]:
        if self.fused is not None:
            gate, up = mx.split(self.fused.of_experts(x, experts, rows=rows, in_order=in_order), 2, axis=-1)
        else:
            both = map(Projection.of, (self["gate_proj"], self["up_proj"]))
            gate, up = (one.of_experts(x, experts, rows=rows, in_order=in_order) for one in both)
        return gate, up

    def _refuse_adapters(self) -> None:
        if self.adapted:
            raise UsageError(
                "experts that stay on disk take no adapters",
                fix="leave routed experts out of the adapter's keys, or hold them all (no --expert-cache)",
            )

    def of_pairs(self, x: mx.array, rows: Ids, experts: Ids, *, in_order: bool) -> mx.array:
        """(p, D) of pairs of a token and an expert.

        Args:
            x: (N, D) tokens.
            rows: (p,) the token of each pair.
            experts: (p,) its expert's row, ascending.
            in_order: whether each expert's matrices are read in one go, as the call does with many pairs.
        """
        tokens, chosen = mx.array(rows.astype(np.uint32)), mx.array(experts.astype(np.uint32))
        inputs, lhs = (x[tokens][:, None], None) if in_order else (x[:, None], tokens)
        gate, up = self._gate_and_up(inputs, chosen, rows=lhs, in_order=in_order)
        y = Projection.of(self["down_proj"]).of_experts(ops.swiglu(gate, up), chosen, in_order=in_order)
        return y.reshape(len(rows), -1)


@dataclass(frozen=True, slots=True)
class SlottedExperts:
    """The experts of a layer for one pass over tokens (N, D), as its bank calls them.

    Args:
        experts: of the layer.
        x: (N, D) tokens.
        of_all: every pair at once, from slots in the shape of the choices.
    """

    experts: ExpertGLU
    x: mx.array
    of_all: Callable[[mx.array], mx.array]

    def whole(self, slots: mx.array) -> mx.array:
        """See `expert_bank.Experts`."""
        return self.of_all(slots)

    def some(self, pairs: Ids, slots: Ids, count: int) -> mx.array:
        """See `expert_bank.Experts`."""
        rows = pairs // (count // self.x.shape[0])
        return self.experts.of_pairs(self.x, rows, slots, in_order=count >= SORTED_FROM)


class MoE(nn.Module):
    """sum over chosen experts of weight * expert(x), plus the shared experts."""

    def __init__(self, config: KimiConfig, experts: int) -> None:
        super().__init__()
        self.gate = Router(config, experts)
        self.switch_mlp = ExpertGLU(config.hidden_size, config.moe_intermediate_size, experts)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def use_slots(self, slots: int) -> None:
        """Hold so many experts, with rows that a bank fills; their weights are yet to come."""
        hidden, width = self.gate.weight.shape[-1], self.switch_mlp.gate_proj.weight.shape[-2]
        self.switch_mlp = ExpertGLU(hidden, width, slots)

    def __call__(self, x: mx.array) -> mx.array:
        """(N, D) to (N, D)."""
        indices, weights = self.gate(x)
        shared = [self.shared_experts(x)] if "shared_experts" in self else []
        y = self.switch_mlp(x, indices, shared)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y + shared[0] if shared else y

    def decode(self, x: mx.array, step: DecodeStep) -> mx.array:
        """The same of single tokens, (N, 1, 1, D) to (N, 1, 1, D)."""
        experts, weights = self["gate"].decode(x, step)
        shared = self["shared_experts"].decode(x, step) if "shared_experts" in self else None
        y = self["switch_mlp"].decode(x, experts, step, () if shared is None else (shared,))
        if shared is not None and y.dtype == mx.float32:
            return mx.addmm(shared, weights, y, alpha=self["gate"].factor)
        y = ((weights * self["gate"].factor) @ y.astype(mx.float32)).astype(x.dtype)
        return y if shared is None else y + shared
