"""A model's parameters by name: first values, kinds, and the INT4 rounding of routed experts in the last steps."""

from __future__ import annotations

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import stage_modules
from exo_kimi.checkpoint.packing import INT4_GROUP, Floats, int4_codes, restore
from exo_kimi.train.model.layers import Parameters

BIAS = "e_score_correction_bias"


def first_values(config: KimiConfig, seed: int) -> Parameters:
    """Seeded first values: what writes to the residual stream begins at zero, so that every layer begins as nothing.

    Raises:
        ValueError: the architecture has biased linears, which nothing here trains.
    """
    rng = np.random.default_rng([seed, 7])
    values: Parameters = {}
    for spec in stage_modules(config, 0, config.num_hidden_layers):
        if spec.has_bias:
            raise ValueError("attention_bias: not trained here")
        name = f"{spec.path}.weight"
        if spec.kind == "norm":
            values[name] = np.ones(spec.shape, np.float32)
        elif spec.path.endswith(("o_proj", "down_proj")):
            values[name] = np.zeros(spec.shape, np.float32)
        else:
            deviation = {"embedding": 0.5, "router": 0.5 * spec.shape[-1] ** -0.5}.get(
                spec.kind, 0.02 if spec.path == "lm_head" else 0.6 * spec.shape[-1] ** -0.5
            )
            values[name] = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(deviation)
        if spec.kind == "router":
            values[f"{spec.path}.{BIAS}"] = np.zeros(spec.shape[:1], np.float32)
    return values


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts."""
    return ".switch_mlp." in name


def is_matrix(name: str) -> bool:
    """Whether Muon may update it: every projection; embedding, head, router and norms stay with AdamW."""
    return "_proj" in name


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, not to norms."""
    return "norm" not in name


def fake_quant(weight: Floats) -> Floats:
    """Round to the values of the exported INT4 codes, as K2-Thinking was trained: groups of 32, symmetric.

    Gradients pass straight through to the weight.
    """
    codes, scales = int4_codes(weight, dtype="BF16", symmetric=True)
    groups = codes.reshape(*weight.shape[:-1], -1, INT4_GROUP).astype("float32")
    groups *= restore(scales)[..., None]
    return groups.reshape(weight.shape)
