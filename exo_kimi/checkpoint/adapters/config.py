"""What an adapter's adapter_config.json says, in mlx-lm's words or PEFT's; what would change the maths unread is refused by name.

Source: mlx-lm `tuner/utils.py: load_adapters`; PEFT `tuners/lora/config.py: LoraConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from exo_kimi.arch.numbers import is_number
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.errors import ConfigError, NotACheckpointError

FineTuneType = Literal["lora", "dora"]
AdapterFormat = Literal["mlx", "peft"]

ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES: dict[AdapterFormat, str] = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
OURS = "exo_kimi"
"""The member of either config that only this project writes and reads."""

# PEFT's members that change what an adapter computes, and the values with which they do not.
_PEFT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """An adapter as a whole.

    Args:
        format: whose files they are.
        fine_tune_type: `dora` has a magnitude for each output beside the two matrices.
        rank: of the matrices.
        scale: what their product is multiplied with; PEFT's lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        alpha: PEFT's lora_alpha; None where `scale` is as written.
        rslora: PEFT's use_rslora.
        dropout: of inputs, in training only.
        keys: mlx-lm's: paths of the adapted modules inside a layer; empty where the tensors alone say.
        num_layers: mlx-lm's: the last so many layers are adapted; None where the tensors alone say.
        base_name, base_fingerprint: the directory's name and `norms_fingerprint` of what it was trained on; None where it
            was not trained here.
    """

    format: AdapterFormat
    fine_tune_type: FineTuneType
    rank: int
    scale: float
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    keys: tuple[str, ...] = ()
    num_layers: int | None = None
    base_name: str | None = None
    base_fingerprint: str | None = None

    def scale_of(self, rank: int) -> float:
        """The scale of a module with a rank of its own (PEFT's rank_pattern)."""
        if self.alpha is None:
            return self.scale
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read adapter_config.json of an adapter's directory.

    Raises:
        NotACheckpointError: no such directory, or no adapter_config.json in it.
        ConfigError: it is not one of a LoRA or DoRA adapter, or asks for maths that is not known here.
    """
    if not directory.is_dir():
        raise NotACheckpointError(
            "no such adapter directory",
            found=directory,
            fix=f"give the folder that holds {ADAPTER_CONFIG_NAME} and {WEIGHTS_NAMES['mlx']} or {WEIGHTS_NAMES['peft']}",
        )
    path = directory / ADAPTER_CONFIG_NAME
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise NotACheckpointError(
            f"no {ADAPTER_CONFIG_NAME} in the directory", where=directory, fix="give the folder of an adapter"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ADAPTER_CONFIG_NAME} cannot be read", found=error, where=path) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{ADAPTER_CONFIG_NAME} is not an object", expected="{...}", found=type(raw).__name__, where=path
        )
    return _peft(raw, path) if "peft_type" in raw else _mlx(raw, path)


def _mlx(raw: Mapping[str, Any], path: Path) -> AdapterConfig:
    kind = raw.get("fine_tune_type", "lora")
    if kind not in get_args(FineTuneType):
        raise _wrong("fine_tune_type", " or ".join(get_args(FineTuneType)), kind, path)
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise _wrong("lora_parameters", "an object with rank and scale", parameters, path)
    keys = parameters.get("keys") or []
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _wrong("lora_parameters.keys", "a list of module paths", keys, path)
    num_layers = raw.get("num_layers")
    if num_layers is not None and (not isinstance(num_layers, int) or isinstance(num_layers, bool)):
        raise _wrong("num_layers", "a whole number", num_layers, path)
    return AdapterConfig(
        format="mlx",
        fine_tune_type=kind,
        rank=_rank(parameters.get("rank"), "lora_parameters.rank", path),
        scale=_number(parameters.get("scale"), "lora_parameters.scale", path),
        dropout=_number(parameters.get("dropout", 0.0), "lora_parameters.dropout", path),
        keys=tuple(keys),
        num_layers=num_layers,
        **_base(raw, path),
    )


def _peft(raw: Mapping[str, Any], path: Path) -> AdapterConfig:
    if raw["peft_type"] != "LORA":
        raise _wrong("peft_type", "LORA", raw["peft_type"], path)
    for name, neutral in _PEFT_NEUTRAL.items():
        if name in raw and raw[name] not in neutral:
            raise _wrong(name, " or ".join(map(repr, neutral)), raw[name], path)
    rank = _rank(raw.get("r"), "r", path)
    alpha = _number(raw.get("lora_alpha"), "lora_alpha", path)
    rslora = bool(raw.get("use_rslora"))
    return AdapterConfig(
        format="peft",
        fine_tune_type="dora" if raw.get("use_dora") else "lora",
        rank=rank,
        scale=alpha / (math.sqrt(rank) if rslora else rank),
        alpha=alpha,
        rslora=rslora,
        dropout=_number(raw.get("lora_dropout", 0.0), "lora_dropout", path),
        **_base(raw, path),
    )


def _base(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    ours = raw.get(OURS, {})
    if not isinstance(ours, dict):
        raise _wrong(OURS, "an object", ours, path)
    found = {f"base_{name}": ours.get(f"base_{name}") for name in ("name", "fingerprint")}
    for name, value in found.items():
        if value is not None and not isinstance(value, str):
            raise _wrong(f"{OURS}.{name}", "text", value, path)
    return found


def _rank(value: object, name: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, "a whole number of at least 1", value, path)
    return value


def _number(value: object, name: str, path: Path) -> float:
    if not isinstance(value, int | float) or not is_number(value, float):
        raise _wrong(name, "a finite number", value, path)
    return float(value)


def _wrong(name: str, expected: str, found: object, path: Path) -> ConfigError:
    return ConfigError(f"{ADAPTER_CONFIG_NAME}: {name}", expected=expected, found=repr(found)[:200], where=path)
