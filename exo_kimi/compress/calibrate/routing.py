"""What a router decides for some tokens, and what it would decide without one of the experts that it chose.

Scores are those of the model's own router: sigmoid of float32 logits, the correction bias for the choice only, normalised
weights, the scaling factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from exo_kimi.errors import UsageError
from exo_kimi.models import ops
from exo_kimi.models.moe import ExpertGLU, MoE, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedTokens:
    """N tokens of one MoE layer, with K experts each.

    Args:
        indices: (N, K) the chosen experts, as the router returned them.
        weights: (N, K) float32, normalised and times the factor, as the router returned them.
        outputs: (N, K, D) of the chosen experts, not weighted.
        without: (N, K, D) what the routed experts would give together, were the k-th chosen one not there.
    """

    indices: mx.array
    weights: mx.array
    outputs: mx.array
    without: mx.array

    @property
    def together(self) -> mx.array:
        """(N, D) of the routed experts."""
        return weighted_sum(self.outputs, self.weights)


def weighted_sum(outputs: mx.array, weights: mx.array) -> mx.array:
    """(N, D) of outputs (N, K, D) and weights (N, K)."""
    return (outputs * weights[..., None]).sum(axis=-2).astype(outputs.dtype)


def route(moe: MoE, x: mx.array) -> RoutedTokens:
    """Route tokens (N, D) and leave each chosen expert out in turn: the router's next one steps in, weights are normalised anew.

    Raises:
        UsageError: the layer has no expert that could step in.
    """
    router: Router = moe.gate
    experts = router.weight.shape[0]
    if experts <= router.chosen:
        raise UsageError(
            "no expert can be left out", expected=f"more than num_experts_per_tok {router.chosen}", found=experts
        )
    indices, weights = router(x)
    if router.choose.kept_groups < router.choose.groups:
        outputs = moe.switch_mlp(x, indices)
        return RoutedTokens(indices=indices, weights=weights, outputs=outputs, without=_rerouted(moe, x, indices))
    return _with_next(router, moe.switch_mlp, x, indices, weights)


def _logits(router: Router, x: mx.array) -> tuple[mx.array, mx.array]:
    return router.logits(x), router.e_score_correction_bias.astype(mx.float32)


def _with_next(router: Router, switch: ExpertGLU, x: mx.array, indices: mx.array, weights: mx.array) -> RoutedTokens:
    """One more expert a token: without groups, the one that steps in is the same whichever is left out."""
    logits, bias = _logits(router, x)
    scores, ranking = ops.scores_and_ranking(logits, bias)
    out = mx.array(-mx.inf, ranking.dtype)
    following = mx.put_along_axis(ranking, indices, out, axis=-1).argmax(axis=-1, keepdims=True).astype(indices.dtype)
    all_outputs = switch(x, mx.concatenate([indices, following], axis=-1))
    outputs, newcomer = all_outputs[:, :-1], all_outputs[:, -1:].astype(mx.float32)
    chosen = mx.take_along_axis(scores, indices, axis=-1)
    new_score = mx.take_along_axis(scores, following, axis=-1)
    left = outputs.astype(mx.float32) * chosen[..., None]
    sums = left.sum(axis=-2, keepdims=True) - left + newcomer * new_score[..., None]
    total = chosen.sum(axis=-1, keepdims=True) - chosen + new_score
    factors = router.factor / total if router.choose.normalised else mx.full(total.shape, router.factor)
    return RoutedTokens(indices=indices, weights=weights, outputs=outputs, without=sums * factors[..., None])


def _rerouted(moe: MoE, x: mx.array, indices: mx.array) -> mx.array:
    """The choice made again without each chosen expert: with groups, others than the next may step in."""
    router: Router = moe.gate
    logits, bias = _logits(router, x)
    without = []
    for place in range(indices.shape[-1]):
        gone = mx.put_along_axis(
            mx.broadcast_to(bias, logits.shape), indices[:, place : place + 1], mx.array(-mx.inf), axis=-1
        )
        others, weights = router.choose(logits, gone)
        without.append(weighted_sum(moe.switch_mlp(x, others).astype(mx.float32), weights * router.factor))
    return mx.stack(without, axis=-2)
