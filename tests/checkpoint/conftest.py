"""Small checkpoints to break, and headers of a full-size Kimi without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.tiny.make import make_tiny

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "vocab_size": 640,
}
K2 = {
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
Make = Callable[..., Path]
EditConfig = Callable[[Path, Callable[[dict[str, Any]], None]], None]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A small checkpoint of three layers; keywords of make_tiny, `config` on top of the small one."""
    made = 0

    def make_small(*, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
        nonlocal made
        made += 1
        return make_tiny(tmp_path / f"small-{made}", config={**SMALL, **(config or {})}, **options)

    return make_small


@pytest.fixture
def edit_config() -> EditConfig:
    """Change a directory's config.json in place."""

    def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = directory / "config.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return edit


@pytest.fixture
def edit_header() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change the JSON header of a safetensors file, keeping its data where it is relative to the header."""

    def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return edit


@pytest.fixture
def flip_weights() -> Callable[[Path, Mapping[str, TensorEntry]], None]:
    """Overwrite every weight byte, so that whoever reads one sees garbage."""

    def flip(directory: Path, tensors: Mapping[str, TensorEntry]) -> None:
        for entry in tensors.values():
            with (directory / entry.file).open("r+b") as stream:
                stream.seek(entry.start)
                stream.write(b"\xff" * entry.nbytes)

    return flip


@pytest.fixture
def k2_dims() -> dict[str, Any]:
    """Kimi K2's own dimensions."""
    return dict(K2)
