"""A pruning plan tried out on the original model, without writing anything: original experts behind the pruned router.

The pruned checkpoint gives the same numbers, bit for bit. Giving the original router a bias of -inf for what goes is the same
choice too, but its product is wider and rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from exo_kimi.arch.config import KimiConfig
from exo_kimi.compress.prune.plan import PrunePlan
from exo_kimi.models.decode import DecodeStep
from exo_kimi.models.kimi_k2 import DecoderLayer, Model
from exo_kimi.models.moe import MoE, Router


class PrunedRouter(Router):
    """A router without some of its rows, whose choices are the ids of the original experts.

    Args:
        config: of the original model.
        router: of one of its layers.
        kept: ids of the experts that stay, ascending.
    """

    def __init__(self, config: KimiConfig, router: Router, kept: Sequence[int]) -> None:
        super().__init__(config, len(kept))
        self._kept = mx.array(list(kept), mx.uint32)
        self.weight = router.weight[self._kept]
        self.e_score_correction_bias = router.e_score_correction_bias[self._kept]

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """As `Router`."""
        indices, weights = super().__call__(x)
        return self._kept[indices], weights

    def decode(self, x: mx.array, step: DecodeStep) -> tuple[mx.array, mx.array]:
        """As `Router`."""
        indices, weights = super().decode(x, step)
        return self._kept[indices], weights


def masking(plan: PrunePlan, config: KimiConfig) -> Callable[[int, DecoderLayer], None]:
    """What gives a loaded layer, by its number, the plan's router.

    Raises:
        UsageError: the plan is for another model.
    """
    plan.check(config)

    def change(number: int, layer: DecoderLayer) -> None:
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate = PrunedRouter(config, layer.mlp.gate, plan.kept[number])

    return change


def mask(model: Model, plan: PrunePlan) -> None:
    """Give a whole model the plan's routers, and take dropped layers out of it.

    Raises:
        UsageError: the plan is for another model.
    """
    change = masking(plan, model.args)
    for number, layer in enumerate(model.model.layers):
        if number in plan.dropped_layers:
            model.model.layers[number] = None
        elif layer is not None:
            change(number, layer)


def mask_by_bias(model: Model, plan: PrunePlan) -> None:
    """The same choices by another way, the oracle of the first: a correction bias of -inf for what goes.

    Raises:
        UsageError: the plan is for another model.
    """
    plan.check(model.args)
    for number, layer in enumerate(model.model.layers):
        if layer is not None and isinstance(layer.mlp, MoE):
            router = layer.mlp.gate
            kept = mx.zeros(router.e_score_correction_bias.shape, mx.bool_)
            kept[mx.array(list(plan.kept[number]))] = True
            router.e_score_correction_bias = mx.where(kept, router.e_score_correction_bias, -mx.inf)
