"""A vocabulary and a recipe that are small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.data.bpe import train_ranks
from exo_kimi.train.export import write_vocabulary
from exo_kimi.train.recipe import TrainingRecipe

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
RECIPE = TrainingRecipe(
    steps=20, warmup_steps=3, group_tokens=512, rate=0.01, aware_share=0.3, slow_from=10**6, ranks=700, shape=SHAPE
)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train") / "vocabulary"
    write_vocabulary(directory, RECIPE.raw_config, train_ranks(0, RECIPE.ranks, conversations=200))
    return directory


@pytest.fixture(scope="session")
def encoder(vocabulary: Path) -> Encoder:
    return Encoder.from_directory(vocabulary)
