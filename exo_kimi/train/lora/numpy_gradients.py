"""Gradients by NumPy, for a small Kimi K2 on a machine whose MLX has no fast matrix products: Linux without a GPU.

With W' = W + s (A B)^T and G the gradient of W':

    dA = s G^T B^T,  dB = s A^T G^T

With DoRA W' = (m / |V|) V, V = W + s (A B)^T, and no gradient goes through |V|: dm = rows of (G . V) / |V|, and G times m / |V|
in the place of G.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import stage_modules
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.errors import UsageError
from exo_kimi.models.rope import Rope
from exo_kimi.train.data.batches import make_batch
from exo_kimi.train.lora.recipe import LoraRecipe
from exo_kimi.train.lora.trainer import first_matrices, modules_of
from exo_kimi.train.model.forward import loss_and_gradients, next_logits
from exo_kimi.train.model.layers import Floats, Parameters

MOST_PARAMETERS = 50_000_000


def why_not(recipe: LoraRecipe, config: KimiConfig) -> str | None:
    """Why NumPy cannot train an adapter of this model; None where it can."""
    if config.linear_attention is not None or config.k3 is not None:
        return "it knows Kimi K2's layers alone"
    if config.attention_bias:
        return "it knows no biases"
    if sum(spec.parameters for spec in stage_modules(config, 0, config.num_hidden_layers)) > MOST_PARAMETERS:
        return f"it takes at most {MOST_PARAMETERS:,} parameters"
    return "it has no dropout" if recipe.dropout else None


class NumpyGradients:
    """A model's weights in float32, and what an adapter makes of them; see `trainer.AdapterGradients`.

    Args:
        recipe: of the adapter.
        config: of the model.
        weights: by the names of `models.kimi_k2.Model`, float32.

    Raises:
        UsageError: see `why_not`.
    """

    def __init__(self, recipe: LoraRecipe, config: KimiConfig, weights: Parameters) -> None:
        reason = why_not(recipe, config)
        if reason is not None:
            raise UsageError(f"NumPy cannot train this: {reason}", fix="leave --backend out, or give --backend mlx")
        self._recipe, self._config, self._weights = recipe, config, weights
        self._wavelengths = np.array(Rope.of(config).wavelengths)

    def first_values(self) -> Parameters:
        """See `trainer.AdapterGradients`."""
        values: Parameters = {}
        for spec in self._recipe.modules(self._config):
            values |= first_matrices(self._recipe, spec.path, spec.shape)
            if self._recipe.fine_tune_type == "dora":
                values[f"{spec.path}.m"] = np.linalg.norm(self._weights[f"{spec.path}.weight"], axis=1)
        return values

    def gradients(self, parameters: Parameters, texts: Sequence[Encoded], *, step: int) -> tuple[float, Parameters]:
        """See `trainer.AdapterGradients`."""
        batch = make_batch(texts)
        found = loss_and_gradients(self._effective(parameters), self._config, self._wavelengths, batch)
        count = np.float32(len(batch.targets))
        made: Parameters = {}
        for path, own in modules_of(parameters, self._recipe.scale).items():
            gradient: Floats = found.gradients[f"{path}.weight"] / count
            scale = np.float32(own.scale)
            if own.magnitude is not None:
                whole: Floats = self._weights[f"{path}.weight"] + scale * (own.lora_a @ own.lora_b).T
                lengths = np.linalg.norm(whole, axis=1)
                made[f"{path}.m"] = (gradient * whole).sum(1) / lengths
                gradient = gradient * (own.magnitude / lengths)[:, None]
            made[f"{path}.lora_a"] = scale * (gradient.T @ own.lora_b.T)
            made[f"{path}.lora_b"] = scale * (own.lora_a.T @ gradient.T)
        return found.loss / len(batch.targets), made

    def loss(self, parameters: Parameters, texts: Sequence[Encoded]) -> float:
        """See `trainer.AdapterGradients`."""
        batch = make_batch(texts)
        logits = next_logits(self._effective(parameters), self._config, self._wavelengths, batch).astype(np.float64)
        chosen = logits[np.arange(len(batch.targets)), batch.targets]
        top = logits.max(-1)
        return float((np.log(np.exp(logits - top[:, None]).sum(-1)) + top - chosen).mean())

    def _effective(self, parameters: Parameters) -> Parameters:
        changed = {
            f"{path}.weight": own.fused(self._weights[f"{path}.weight"])
            for path, own in modules_of(parameters, self._recipe.scale).items()
        }
        return {**self._weights, **changed}
