"""Tiny checkpoints of every layout, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.run import convert
from exo_kimi.planner.weights.recipes import Recipe, load_recipe

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "vocab_size": 576,
}
SOURCES: dict[str, dict[str, Any]] = {
    "bf16": {"layout": "bf16"},
    "stacked floats": {"layout": "mlx", "recipe": "plain"},
    "fp16": {"layout": "bf16", "dtype": "F16"},
    "fp32": {"layout": "bf16", "dtype": "F32"},
    "fp8": {"layout": "fp8"},
    "int4": {"layout": "int4"},
    "mlx 3, 4, 6": {"layout": "mlx"},
    "mlx 8": {"layout": "mlx", "recipe": "uniform8", "group_size": 32},
    "mlx 5, absorbed": {"layout": "mlx", "recipe": "uniform5", "absorbed": True},
    "k2.5 int4 with a tower": {"layout": "int4", "vision": True},
    "k2.5 mlx": {"layout": "mlx", "prefix": True, "scales_dtype": "F32"},
}


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by its name in SOURCES."""
    root, made = tmp_path_factory.mktemp("sources"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            template = "k25" if "k2.5" in name else "instruct"
            made[name] = make_tiny(root / name.replace(" ", "-"), config=SMALL, template=template, **SOURCES[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def small_config() -> dict[str, int]:
    """Numbers of the tiny checkpoints."""
    return dict(SMALL)


@pytest.fixture(scope="session")
def converted() -> Callable[..., Checkpoint]:
    """Convert a checkpoint in this process: (source, output, recipe, options of `make_conversion`) -> the output."""

    def run(source: Path, output: Path, recipe: str | Recipe, **options: Any) -> Checkpoint:
        chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
        convert(make_conversion(Checkpoint(source), output, chosen, **options))
        return Checkpoint(output)

    return run
