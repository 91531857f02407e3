"""An adapter's directory, as mlx-lm's `load(adapter_path=)` and PEFT's `from_pretrained` read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.adapters.config import (
    ADAPTER_CONFIG_NAME,
    OURS,
    WEIGHTS_NAMES,
    AdapterConfig,
)
from exo_kimi.checkpoint.adapters.manifest import LowRank
from exo_kimi.checkpoint.packing import store
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file


def write_adapter(directory: Path, config: AdapterConfig, modules: Mapping[str, LowRank], kimi: KimiConfig) -> None:
    """Write weights and config in the config's format, in float32.

    Args:
        directory: made if missing; files of either format in it are replaced.
        config: what adapter_config.json is to say.
        modules: by the module's path.
        kimi: of the base, whose names may have a prefix.

    Raises:
        OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, StoredTensor] = {}
    for path, module in modules.items():
        for name, values in _named(config, kimi.key_prefix + path, module).items():
            tensors[name] = store(np.ascontiguousarray(values), "F32")
    for name in WEIGHTS_NAMES.values():
        (directory / name).unlink(missing_ok=True)
    write_file(
        directory / WEIGHTS_NAMES[config.format],
        tensors,
        metadata={"format": "mlx" if config.format == "mlx" else "pt"},
    )
    raw = _mlx(config) if config.format == "mlx" else _peft(config)
    raw[OURS] = {"base_name": config.base_name, "base_fingerprint": config.base_fingerprint}
    (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_format(config: AdapterConfig, written_as: str) -> AdapterConfig:
    """The config of the same adapter in the other format."""
    if written_as == "peft":
        return replace(config, format="peft", alpha=config.scale * config.rank, rslora=False)
    return replace(config, format="mlx", alpha=None, rslora=False)


def _named(config: AdapterConfig, path: str, module: LowRank) -> dict[str, Any]:
    if config.format == "mlx":
        named = {f"{path}.lora_a": module.lora_a, f"{path}.lora_b": module.lora_b}
        return named if module.magnitude is None else {**named, f"{path}.m": module.magnitude}
    path = f"base_model.model.{path}"
    named = {f"{path}.lora_A.weight": module.lora_a.T, f"{path}.lora_B.weight": module.lora_b.T}
    return named if module.magnitude is None else {**named, f"{path}.lora_magnitude_vector": module.magnitude}


def _mlx(config: AdapterConfig) -> dict[str, Any]:
    return {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": list(config.keys),
        },
    }


def _peft(config: AdapterConfig) -> dict[str, Any]:
    alpha = float(config.scale * config.rank if config.alpha is None else config.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_name,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.fine_tune_type == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({key.rpartition(".")[2] for key in config.keys}),
    }
