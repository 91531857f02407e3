"""Checkpoint tensors in any published layout under the model's names, for mlx-lm's own loaders (exo uses them).

The project's loader does not come here: it fills the model tensor by tensor from the file (see `runtime.loading.loader`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from exo_kimi.arch.modules import FLOAT32_PARAMETERS
from exo_kimi.checkpoint.keys import spelled_as_mlx

FP8_BLOCK = 128
"""Side of the square blocks that share one scale. Source: quantization_config.weight_block_size of Kimi K2."""

INT4_ZERO = 8
"""Code of zero in compressed-tensors INT4: value = (code - 8) * scale."""

_FUSED = re.compile(r"(.*\.mlp)\.experts\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(\w+)")


def dequantize_fp8(codes: mx.array, scale_inv: mx.array) -> mx.array:
    """bf16 values of e4m3 codes (out, in) uint8 with one factor per 128 x 128 block; the last blocks may be ragged.

    The product is taken in float32, as the published inference code does.
    """
    rows, columns = codes.shape
    scale = mx.repeat(mx.repeat(scale_inv.astype(mx.float32), FP8_BLOCK, axis=0)[:rows], FP8_BLOCK, axis=1)[:, :columns]
    return (mx.from_fp8(codes, dtype=mx.float32) * scale).astype(mx.bfloat16)


def int4_biases(scales: mx.array) -> mx.array:
    """MLX's affine biases for compressed-tensors INT4: -8 * scale, exact in every float dtype."""
    return scales * -INT4_ZERO


def int2_biases(scales: mx.array) -> mx.array:
    """The same for integers of 2 bits, whose zero has the code 2."""
    return scales * -2


def int8_biases(scales: mx.array) -> mx.array:
    """The same for integers of 8 bits, whose zero has the code 128."""
    return scales * -128


INTEGER_BIASES = {2: int2_biases, 4: int4_biases, 8: int8_biases}
"""Biases of compressed-tensors' integers by their bits: all are powers of two times the scales, so exact."""


def sanitize(weights: Mapping[str, mx.array], *, prefix: str, owns: Callable[[str], bool]) -> dict[str, mx.array]:
    """Rename, stack and unpack tensors.

    Args:
        weights: a checkpoint's tensors, or some of its.
        prefix: what its names have before the model's; tensors without are dropped.
        owns: whether a tensor of this name, without prefix, is wanted.
    """
    named = {spelled_as_mlx(name[len(prefix) :]): value for name, value in weights.items() if name.startswith(prefix)}
    named = {each: part for name, value in named.items() for each, part in _spelled(name, value)}
    named = {name: value for name, value in named.items() if owns(name)}
    return _stack_experts({name: value for path in _modules(named) for name, value in _unpack(path, named)})


def _spelled(name: str, value: mx.array) -> list[tuple[str, mx.array]]:
    """Tensors in the form that this module knows: fused and stacked experts apart, a convolution's taps in the middle."""
    if name.endswith("_conv.conv.weight"):
        return [(name, value.reshape(value.shape[0], -1, 1))]
    if name.endswith(".A_log"):
        return [(name, value.reshape(1, 1, -1, 1))]
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return [(name, value)]
    stack = f"{fused[1]}.switch_mlp"
    if fused[2] == "down_proj":
        return [(f"{stack}.down_proj.weight", value)]
    gate, up = mx.split(value, 2, axis=1)
    return [(f"{stack}.gate_proj.weight", gate), (f"{stack}.up_proj.weight", up)]


def _modules(named: dict[str, mx.array]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in named))


def _unpack(path: str, named: dict[str, mx.array]) -> list[tuple[str, mx.array]]:
    """The tensors of one module as MLX holds them."""
    leaves = ("weight", "scales", "biases", "bias", *FLOAT32_PARAMETERS)
    tensors = [(f"{path}.{leaf}", named[f"{path}.{leaf}"]) for leaf in leaves if f"{path}.{leaf}" in named]
    scales = named.get(f"{path}.weight_scale")
    if f"{path}.weight_packed" in named and scales is not None:
        packed = named[f"{path}.weight_packed"].view(mx.uint32)
        tensors += [(f"{path}.weight", packed), (f"{path}.scales", scales)]
        if scales.dtype != mx.uint8:  # exponents are of MXFP4, which has no biases
            biases = INTEGER_BIASES[_integer_bits(packed, named.get(f"{path}.weight_shape"))]
            tensors.append((f"{path}.biases", biases(scales)))
    block_scales = named.get(f"{path}.weight_scale_inv")
    if block_scales is None and scales is not None and f"{path}.weight_packed" not in named:
        block_scales = scales
    if block_scales is not None:
        tensors = [(f"{path}.weight", dequantize_fp8(named[f"{path}.weight"], block_scales))]
    return tensors


def _integer_bits(packed: mx.array, shape: mx.array | None) -> int:
    """Bits of compressed-tensors' integers, from the unpacked shape that lies beside them; 4, as Moonshot has them, without."""
    if shape is None:
        return 4
    columns = np.array(shape).reshape(-1)[-1]
    return packed.shape[-1] * 32 // int(columns)


def _stack_experts(named: dict[str, mx.array]) -> dict[str, mx.array]:
    stacks: dict[str, dict[int, mx.array]] = {}
    rest = {}
    for name, value in named.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            rest[name] = value
        else:
            stacks.setdefault(f"{match[1]}.switch_mlp.{match[3]}.{match[4]}", {})[int(match[2])] = value
    return rest | {name: mx.stack([parts[e] for e in range(len(parts))]) for name, parts in stacks.items()}
