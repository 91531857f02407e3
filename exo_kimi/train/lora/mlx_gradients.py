"""Gradients by MLX: of any Kimi that fits, packed weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.models.adapters import AdapterArrays, attach, row_lengths
from exo_kimi.models.blocks import Span
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import module_at
from exo_kimi.train.lora.recipe import LoraRecipe
from exo_kimi.train.lora.trainer import first_matrices
from exo_kimi.train.model.layers import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraBatch:
    """Rows of conversations, padded at their ends to the longest.

    Args:
        ids: (B, L) int32 token ids, without the last of each row.
        rows: (M,) where the loss is taken, counted over B * L.
        targets: (M,) the token that follows there.
    """

    ids: mx.array
    rows: mx.array
    targets: mx.array

    @classmethod
    def of(cls, texts: Sequence[Encoded]) -> LoraBatch:
        """The batch of some rows."""
        width = max(len(text.ids) for text in texts) - 1
        made = np.zeros((len(texts), width), np.int32)
        rows, targets = [], []
        for row, text in enumerate(texts):
            made[row, : len(text.ids) - 1] = text.ids[:-1]
            places = np.flatnonzero(text.counted[1:])
            rows.append(row * width + places)
            targets.append(text.ids[1:][places])
        return cls(
            ids=mx.array(made),
            rows=mx.array(np.concatenate(rows).astype(np.int32)),
            targets=mx.array(np.concatenate(targets).astype(np.int32)),
        )


class MlxGradients:
    """A model with an adapter around its projections; see `trainer.AdapterGradients`.

    Args:
        recipe: of the adapter.
        model: whole, as loaded; it is changed in place.
    """

    def __init__(self, recipe: LoraRecipe, model: Model) -> None:
        self._recipe, self.model = recipe, model
        first: dict[str, AdapterArrays] = {}
        for spec in recipe.modules(model.args):
            a, b = first_matrices(recipe, spec.path, spec.shape).values()
            first[spec.path] = AdapterArrays(
                lora_a=mx.array(a),
                lora_b=mx.array(b),
                magnitude=row_lengths(module_at(model, spec.path)) if recipe.fine_tune_type == "dora" else None,
                scale=recipe.scale,
                dropout=recipe.dropout,
            )
        model.freeze()
        attach(model, first)
        mx.eval(model.trainable_parameters())
        self._gradients = nn.value_and_grad(model, mean_loss)

    def first_values(self) -> Parameters:
        """See `trainer.AdapterGradients`."""
        return {name: np.array(value) for name, value in tree_flatten(self.model.trainable_parameters())}

    def gradients(self, parameters: Parameters, texts: Sequence[Encoded], *, step: int) -> tuple[float, Parameters]:
        """See `trainer.AdapterGradients`."""
        self._show(parameters)
        self.model.train()
        # Dropout of a step is that of the same step after a resume.
        mx.random.seed(int(np.random.default_rng([self._recipe.seed, step, 3]).integers(2**31)))
        loss, found = self._gradients(self.model, LoraBatch.of(texts), self._recipe.grad_checkpoint)
        mx.eval(loss, found)
        return float(np.array(loss)), {name: np.array(value, np.float32) for name, value in tree_flatten(found)}

    def loss(self, parameters: Parameters, texts: Sequence[Encoded]) -> float:
        """See `trainer.AdapterGradients`."""
        self._show(parameters)
        self.model.eval()
        return float(np.array(mean_loss(self.model, LoraBatch.of(texts), False)))

    def _show(self, parameters: Parameters) -> None:
        self.model.update(tree_unflatten([(name, mx.array(value)) for name, value in parameters.items()]))


def mean_loss(model: Model, batch: LoraBatch, checkpoint: bool) -> mx.array:
    """Cross entropy in nats a counted token. The head is asked for these rows alone: logits of all would be the largest array."""
    rows, length = batch.ids.shape
    h = model.embed(batch.ids.reshape(-1))
    positions = mx.tile(mx.arange(length, dtype=mx.int32), (rows,))
    spans = [Span(rows, length, "causal" if length > 1 else None)]
    for layer in model.layers:
        h = _again(layer, h, positions, spans) if checkpoint else layer(h, positions, spans, [None])
    loss: mx.array = nn.losses.cross_entropy(model.logits(h[batch.rows]), batch.targets).mean()
    return loss


def _again(layer: Any, h: mx.array, positions: mx.array, spans: list[Span]) -> mx.array:
    """A layer that is computed again in the backward pass."""

    def run(parameters: Any, h: mx.array) -> mx.array:
        layer.update(parameters)
        out: mx.array = layer(h, positions, spans, [None])
        return out

    made: mx.array = mx.checkpoint(run)(layer.trainable_parameters(), h)
    return made
