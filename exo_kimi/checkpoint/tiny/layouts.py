"""A tiny model's tensors in each published layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint import packing
from exo_kimi.checkpoint.keys import as_published
from exo_kimi.checkpoint.packing import Floats
from exo_kimi.checkpoint.safetensors_io import StoredTensor

Chooser = Callable[[ModuleSpec], tuple[int, int] | None]


class Weights(Protocol):
    """Source of the master weights: seeded, or trained."""

    def weight(self, spec: ModuleSpec) -> Floats:
        """The float32 weight of a module, in the shape of its spec."""

    def correction_bias(self, spec: ModuleSpec) -> Floats:
        """The router's e_score_correction_bias, (E,)."""

    def decay(self, spec: ModuleSpec) -> tuple[Floats, Floats]:
        """A_log (1, 1, H, 1) and dt_bias (H * Dk,) of Kimi Delta Attention."""

    def bias(self, spec: ModuleSpec) -> Floats:
        """The bias vector of a linear that has one."""


@dataclass(slots=True)
class LayoutWriter:
    """Collector of the tensors of one checkpoint.

    Args:
        weights: the master weights.
        layout: `mlx` stacks experts; `int4`, `mxfp4`, `fp8` and `bf16` store them one by one, as Hugging Face does.
        choose: bits and group size of a module (mlx, int4).
        dtype: the dtype of plain weights.
        scales_dtype: the dtype of scales and biases (mlx, int4).
        prefix: what every name begins with.
        moe_layers: layers with experts, where names are published as Kimi Linear's are; None for those of K2.
        symmetric: (int4) codes -7 to 7, as quantization-aware training rounds them.

    After `add`: `tensors` by name, in the order of the model; `quantization` by prefixed path.
    """

    weights: Weights
    layout: str
    choose: Chooser
    dtype: str
    scales_dtype: str
    prefix: str
    moe_layers: frozenset[int] | None = None
    symmetric: bool = False
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    quantization: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def add(self, specs: Iterable[ModuleSpec]) -> None:
        """Write every module."""
        for spec in specs:
            if spec.kind == "decay":
                for part, values in zip(("A_log", "dt_bias"), self.weights.decay(spec), strict=True):
                    if spec.a_log and part == "A_log":
                        values = np.pad(values.reshape(-1), (0, spec.a_log - spec.shape[0]))
                    self._put(spec, spec.path, part, packing.store(values, "F32"))
                continue
            weight = self.weights.weight(spec)
            if spec.kind == "conv" and self.layout != "mlx":
                weight = weight.reshape(len(weight), 1, -1)
            if spec.kind == "experts" and self.layout != "mlx":
                base, _, projection = spec.path.rpartition(".switch_mlp.")
                paths = [f"{base}.experts.{expert}.{projection}" for expert in range(spec.shape[0])]
                for part, tensor in self._parts(spec, weight).items():
                    for path, data in zip(paths, tensor.data, strict=True):
                        self._put(spec, path, part, StoredTensor(tensor.dtype, data))
            else:
                for part, tensor in self._parts(spec, weight).items():
                    self._put(spec, spec.path, part, tensor)
            if spec.kind == "router":
                bias = packing.store(self.weights.correction_bias(spec), "F32")
                self._put(spec, spec.path, "e_score_correction_bias", bias)
            if spec.has_bias:
                self._put(spec, spec.path, "bias", packing.store(self.weights.bias(spec), self.dtype))

    def _put(self, spec: ModuleSpec, path: str, part: str, tensor: StoredTensor) -> None:
        if self.moe_layers is not None:
            if self.layout != "mlx":
                path = as_published(path, layer_is_moe=spec.layer in self.moe_layers)
            elif part == "e_score_correction_bias":
                path = path.removesuffix(".gate")
        self.tensors[f"{self.prefix}{path}.{part}"] = tensor

    def _parts(self, spec: ModuleSpec, weight: Floats) -> dict[str, StoredTensor]:
        chosen = self.choose(spec)
        if self.layout == "mlx" and spec.quantizable:
            self.quantization[self.prefix + spec.path] = chosen
        if self.layout == "mlx" and chosen is not None:
            return self._mlx(weight, *chosen)
        if self.layout == "int4" and chosen == (4, packing.INT4_GROUP):
            return self._int4(weight)
        if self.layout == "mxfp4" and spec.kind == "experts":
            codes, exponents = packing.quantize_mxfp4(weight)
            return {"weight_packed": StoredTensor("U8", codes), "weight_scale": StoredTensor("U8", exponents)}
        if self.layout == "fp8" and spec.quantizable and spec.path not in ("model.embed_tokens", "lm_head"):
            codes, scale_inv = packing.quantize_fp8(weight)
            return {"weight": StoredTensor("F8_E4M3", codes), "weight_scale_inv": StoredTensor("F32", scale_inv)}
        return {"weight": packing.store(weight, "F32" if spec.is_float32 else self.dtype)}

    def _mlx(self, weight: Floats, bits: int, group_size: int) -> dict[str, StoredTensor]:
        packed, scales, biases = packing.quantize_affine(
            weight, bits=bits, group_size=group_size, dtype=self.scales_dtype
        )
        return {"weight": StoredTensor("U32", packed), "scales": scales, "biases": biases}

    def _int4(self, weight: Floats) -> dict[str, StoredTensor]:
        packed, scales = packing.quantize_int4(weight, dtype=self.scales_dtype, symmetric=self.symmetric)
        shape: Any = np.array(weight.shape[-2:], np.int32)
        if weight.ndim == 3:
            shape = np.tile(shape, (len(weight), 1))
        return {
            "weight_packed": StoredTensor("I32", packed),
            "weight_scale": scales,
            "weight_shape": StoredTensor("I32", shape),
        }
