"""A thin toy of 61 layers, ours beside mlx-lm's model of the same weights.

Its checkpoint holds `embed_q` and `unembed_out`, which both sides read as they are: mlx-lm would quantize `kv_b_proj` anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.models.kimi_k2 import Model
from exo_kimi.runtime.loading.loader import load

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 61,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "vocab_size": 1024,
}


@dataclass(frozen=True, slots=True)
class Thin:
    """Both models."""

    ours: Model
    theirs: Any


@contextlib.contextmanager
def thin_models(**changes: Any) -> Iterator[Thin]:
    """The toy in 4 bits with float32 activations; `changes` are keys of its config."""
    from mlx_lm.utils import load_model

    with TemporaryDirectory(prefix="thin-") as folder:
        directory = make_tiny(
            Path(folder) / "thin", recipe="uniform4", dtype="F32", absorbed=True, config=CONFIG | changes, template=None
        )
        yield Thin(load(directory, fuse=True), load_model(directory)[0])
