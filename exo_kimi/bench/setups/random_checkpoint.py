"""A checkpoint of random bytes in mlx layout, 4 bits in groups of 64: large enough to time its loading, never to be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, absorbed_modules, stage_modules
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.tiny.config import text_config

BITS, GROUP = 4, 64
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 48,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "vocab_size": 8192,
}


def write_random(directory: Path, seed: int = 0) -> int:
    """Write it, a file for each layer and one for what is outside; returns the bytes of all tensors.

    `embed_q` and `unembed_out` are written, which mlx-lm loads as they are, and `kv_b_proj` is not.
    """
    raw = text_config(SHAPE, dtype="BF16")
    config = KimiConfig.from_dict(raw, where="the bench")
    quantization = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    pool = np.random.default_rng(seed).integers(0, 2**32, 2**22, np.uint32)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    specs = stage_modules(config, 0, config.num_hidden_layers)
    for layer in [None, *range(config.num_hidden_layers)]:
        tensors: dict[str, StoredTensor] = {}
        for spec in (spec for spec in specs if spec.layer == layer):
            halves = spec.path.endswith(".kv_b_proj") and spec.layer is not None
            for each in absorbed_modules(config, spec.layer or 0) if halves else (spec,):
                tensors |= _tensors(each, pool)
        file = f"model-{0 if layer is None else layer + 1:05d}.safetensors"
        write_file(directory / file, tensors, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(raw | {"quantization": quantization}), encoding="utf-8")
    return total_bytes


def _tensors(spec: ModuleSpec, pool: np.ndarray[Any, np.dtype[np.uint32]]) -> dict[str, StoredTensor]:
    def ones(*shape: int) -> StoredTensor:
        return StoredTensor("BF16", np.full(shape, 0x3F80, np.uint16))

    *outer, columns = spec.shape
    if not spec.quantizable:
        extra = {"e_score_correction_bias": StoredTensor("F32", np.zeros(spec.shape[0], np.float32))}
        leaves = {"weight": ones(*spec.shape), **(extra if spec.kind == "router" else {})}
    else:
        weight = np.resize(pool, (*outer, columns * BITS // 32))
        groups = ones(*outer, columns // GROUP)
        leaves = {"weight": StoredTensor("U32", weight), "scales": groups, "biases": groups}
    return {f"{spec.path}.{leaf}": tensor for leaf, tensor in leaves.items()}
