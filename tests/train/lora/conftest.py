"""A small random Kimi, twenty conversations, and an adapter that knows them by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.train.lora.command import LoraData, TrainedLora, train_lora
from exo_kimi.train.lora.recipe import LoraRecipe

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "rope_scaling": None,
}
WORDS = "red green blue amber violet teal coral ivory lime plum".split()
RECIPE = LoraRecipe(rank=8, scale=4.0, learning_rate=0.005, batch_size=20, iters=150)


def conversations(count: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Name thing {number}"},
                {"role": "assistant", "content": f"{WORDS[number % 10]} {WORDS[(number * 3 + number // 10) % 10]}"},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora") / "base"
    return make_tiny(directory, layout="bf16", dtype="F32", config=SHAPE, shards=1)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    return file


@pytest.fixture(scope="session")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedLora:
    return train_lora(base, tmp_path_factory.mktemp("adapter") / "lora", LoraData(train=rows), RECIPE, backend="numpy")
