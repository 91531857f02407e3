"""The model of a config: the one place that knows which file describes which family."""

from __future__ import annotations

from exo_kimi.arch.config import KimiConfig
from exo_kimi.errors import UnsupportedModelError
from exo_kimi.models import kimi_k2, kimi_linear


def build(
    config: KimiConfig, start_layer: int = 0, end_layer: int | None = None, *, layers_only: bool = False
) -> kimi_k2.Model:
    """The model that a config describes, or a stage of it; arguments as of `kimi_k2.Model`.

    Raises:
        SplitError: the range is empty or outside the model.
        UnsupportedModelError: a family that is inspected and planned, and not run.
    """
    if config.k3 is not None:
        raise UnsupportedModelError(
            "Kimi K3 is not run yet",
            found=f"{config.num_hidden_layers} layers with attention over residuals and experts in a latent space",
            fix="`exo-kimi inspect`, `doctor` and `plan` know it; mlx-lm runs it",
        )
    family = kimi_k2.Model if config.linear_attention is None else kimi_linear.KimiLinear
    return family(config, start_layer, end_layer, layers_only=layers_only)
