"""Adapters from their directories into MLX, the part of a stage alone."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, LowRank
from exo_kimi.models.adapters import AdapterArrays, attach, with_adapter
from exo_kimi.models.kimi_k2 import Model


def arrays_of(modules: Mapping[str, LowRank]) -> dict[str, AdapterArrays]:
    """What an adapter has for each projection, in float32, evaluated."""
    made = {
        path: AdapterArrays(
            lora_a=mx.array(own.lora_a),
            lora_b=mx.array(own.lora_b),
            magnitude=None if own.magnitude is None else mx.array(own.magnitude),
            scale=own.scale,
        )
        for path, own in modules.items()
    }
    mx.eval([each for own in made.values() for each in (own.lora_a, own.lora_b, own.magnitude) if each is not None])
    return made


def adapt(model: Model, adapter: AdapterManifest) -> None:
    """Put an adapter into a model, or into the stage of it, for good.

    Raises:
        TensorFileError, NotFiniteError: the adapter cannot be read.
    """
    attach(model, arrays_of(adapter.read(model.start_layer, model.end_layer)))


def adapted_view(model: Model, adapter: AdapterManifest) -> Model:
    """A model with an adapter beside one without, see `with_adapter`.

    Raises:
        TensorFileError, NotFiniteError: the adapter cannot be read.
    """
    return with_adapter(model, arrays_of(adapter.read(model.start_layer, model.end_layer)))
