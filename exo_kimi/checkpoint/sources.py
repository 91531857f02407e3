"""Where the weight of one module lies on disk and how it is packed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.safetensors_io import TensorEntry

Layout = Literal["plain", "mlx", "int4", "fp8"]
Parts = Mapping[str, Mapping[int | None, TensorEntry]]
FLOATS = ("BF16", "F16", "F32")
_REQUIRED: dict[Layout, tuple[str, ...]] = {
    "plain": ("weight",),
    "mlx": ("weight", "scales"),
    "int4": ("weight_packed", "weight_scale", "weight_shape"),
    "fp8": ("weight", "weight_scale_inv"),
}

_DRAFT_IN = {
    "fc": "features * target_hidden_size",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"), "2 * hidden_size"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSource:
    """Tensors of one module on disk, and how to read them.

    Args:
        spec: the module.
        quant: packing of `mlx` and `int4` weights, else None.
        layout: `plain`: weight. `mlx`: weight, scales and (affine) biases. `int4` (compressed-tensors' integers of 2, 4 or 8
            bits): weight_packed, weight_scale, and mostly weight_shape; MLX reads it as affine with biases -2^(bits - 1) *
            scales. `fp8`: weight, weight_scale_inv.
        parts: part -> one tensor; or one tensor per expert, in the order of the experts. A linear may have `bias` too,
            a router has `e_score_correction_bias`, a decay has `A_log` and `dt_bias` alone.
    """

    spec: ModuleSpec
    quant: QuantSpec | None
    layout: Layout
    parts: Mapping[str, tuple[TensorEntry, ...]]

    @property
    def disk_bytes(self) -> int:
        """Bytes of its tensors on disk."""
        return sum(entry.nbytes for entries in self.parts.values() for entry in entries)

    @property
    def dtype(self) -> str:
        """In which its first tensor is stored."""
        return next(iter(self.parts.values()))[0].dtype

    @property
    def resident_bytes(self) -> int:
        """Bytes that MLX holds after loading as stored: int4 gains biases and drops its shapes, fp8 becomes bf16."""
        total = self.disk_bytes
        if self.layout == "int4":
            total += self._bytes("weight_scale") - self._bytes("weight_shape")
        elif self.layout == "fp8":
            total += self._bytes("weight") - self._bytes("weight_scale_inv")
        return total

    @property
    def widened_bytes(self) -> int:
        """Bytes that a serving stage needs on top: a router becomes float32 (5.5 MB a layer of K2)."""
        if self.spec.kind != "router":
            return 0
        held = sum(self._bytes(part) for part in ("weight", "scales", "biases"))
        return 4 * math.prod(self.spec.shape) - held

    def _bytes(self, part: str) -> int:
        return sum(entry.nbytes for entry in self.parts.get(part, ()))


def layout_of(parts: Parts) -> Layout:
    """The layout of a module, from the names and dtypes of its tensors."""
    if any(part in parts for part in ("weight_packed", "weight_scale", "weight_shape")):
        return "int4"
    dtypes = {entry.dtype for entry in parts.get("weight", {}).values()}
    if "weight_scale_inv" in parts or "F8_E4M3" in dtypes:
        return "fp8"
    if "scales" in parts or "biases" in parts or "U32" in dtypes:
        return "mlx"
    return "plain"


def required_parts(spec: ModuleSpec, layout: Layout, parts: Parts) -> tuple[str, ...]:
    """The parts that a module must have, and all that it may have."""
    if spec.kind == "decay":
        return ("A_log", "dt_bias")
    required = _REQUIRED[layout]
    # MLX's float modes (scales of uint8) have no biases.
    affine = any(entry.dtype in FLOATS for entry in parts.get("scales", {}).values())
    if layout == "mlx" and (affine or ("biases" in parts and "scales" not in parts)):
        required += ("biases",)
    if spec.kind == "router":
        required += ("e_score_correction_bias",)
    return (*required, "bias") if spec.has_bias else required


def tensor_name(config: KimiConfig | DraftConfig, spec: ModuleSpec, part: str, expert: int | None = None) -> str:
    """The name that a tensor would have in the files."""
    path = spec.path if expert is None else spec.path.replace(".switch_mlp.", f".experts.{expert}.")
    return f"{config.key_prefix}{path}.{part}"


def in_name(config: KimiConfig | DraftConfig, spec: ModuleSpec) -> str:
    """The config keys behind the last dimension of a module, for messages."""
    name = spec.path.rpartition(".")[2]
    if isinstance(config, DraftConfig) and name in _DRAFT_IN:
        return _DRAFT_IN[name]
    if name == "down_proj" and isinstance(config, KimiConfig):
        shared = " * n_shared_experts" if "shared_experts" in spec.path and config.n_shared_experts > 1 else ""
        moe = spec.kind == "experts" or "shared_experts" in spec.path
        return f"moe_intermediate_size{shared}" if moe else "intermediate_size"
    return {
        "o_proj": "num_attention_heads * v_head_dim",
        "down_proj": "intermediate_size",
        "f_b_proj": "head_dim of linear_attn_config",
        "g_b_proj": "head_dim of linear_attn_config",
        "q_b_proj": "q_lora_rank",
        "kv_b_proj": "kv_lora_rank",
        "embed_q": "qk_nope_head_dim",
        "unembed_out": "kv_lora_rank",
    }.get(name, "hidden_size")
