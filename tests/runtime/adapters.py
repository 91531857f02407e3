"""Random adapters that change what a model says, and the weights with them in."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

import exo_kimi
from exo_kimi.checkpoint.adapters.config import AdapterConfig, AdapterFormat, FineTuneType
from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, LowRank
from exo_kimi.checkpoint.adapters.writing import as_format, write_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.fingerprint import norms_fingerprint
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import module_at
from exo_kimi.train.lora.recipe import DEFAULT_KEYS, LoraRecipe

KV_B = "self_attn.kv_b_proj"


def write_random(
    directory: Path,
    base: Path,
    *,
    seed: int,
    kind: FineTuneType = "lora",
    keys: tuple[str, ...] = DEFAULT_KEYS,
    written_as: AdapterFormat = "mlx",
    rank: int = 4,
) -> Path:
    """An adapter directory."""
    checkpoint = Checkpoint(base)
    recipe = LoraRecipe(rank=rank, keys=keys)
    modules = {}
    for spec in recipe.modules(checkpoint.config):
        rng = np.random.default_rng([seed, *spec.path.encode()])
        out, into = spec.shape
        modules[spec.path] = LowRank(
            lora_a=rng.normal(0, into**-0.5, (into, rank)).astype(np.float32),
            lora_b=rng.normal(0, 0.3, (rank, out)).astype(np.float32),
            magnitude=rng.uniform(0.5, 1.5, out).astype(np.float32) if kind == "dora" else None,
            scale=1.5,
        )
    config = AdapterConfig(
        format="mlx",
        fine_tune_type=kind,
        rank=rank,
        scale=1.5,
        keys=keys,
        num_layers=checkpoint.config.num_hidden_layers,
        base_name=base.name,
        base_fingerprint=norms_fingerprint(checkpoint.manifest()),
    )
    write_adapter(directory, as_format(config, written_as), modules, checkpoint.config)
    return directory


def fused_model(base: Path, adapter: AdapterManifest | None, *, dtype: str = "float32") -> Model:
    """A model whose weights have the adapter in them."""
    model = exo_kimi.load(base, dtype=dtype)
    for path, own in (adapter.read() if adapter is not None else {}).items():
        module = module_at(model, path)
        module["weight"] = mx.array(own.fused(np.array(module["weight"].astype(mx.float32))))
    return model
