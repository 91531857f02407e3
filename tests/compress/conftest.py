"""Tiny checkpoints of two MoE layers in every layout, and texts of chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.texts.encoding import Encoded

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mlx": {},
    "absorbed": {"absorbed": True},
    "int4": {"layout": "int4"},
    "fp8": {"layout": "fp8", "prefix": True, "shards": 3},
    "bf16": {"layout": "bf16", "vision": True, "template": "k25"},
    "groups": {"layout": "int4", "shards": 1, "config": {"n_group": 4, "topk_group": 2}},
}
Maker = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """The directory of a variant, made once."""
    root, made = tmp_path_factory.mktemp("compress"), dict[str, Path]()

    def make(variant: str) -> Path:
        if variant not in made:
            options = dict(VARIANTS[variant])
            config = {**SHAPE, **options.pop("config", {})}
            made[variant] = make_tiny(root / variant, config=config, **options)
        return made[variant]

    return make


@pytest.fixture(scope="session")
def texts() -> list[Encoded]:
    """Five texts of 2 to 30 tokens."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 700, length).astype(np.int32) for length in (30, 2, 17, 5, 24)]
    counted = [np.arange(len(each)) >= len(each) // 2 for each in ids]
    return [
        Encoded(ids=each, counted=some, domain=f"domain {index % 2}")
        for index, (each, some) in enumerate(zip(ids, counted, strict=True))
    ]
