"""Number formats of published checkpoints, in NumPy: MLX affine, INT4 groups, FP8, BF16.

Both ways, so that a checkpoint can be made and its values be checked without MLX. Not for speed: models run on MLX.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.safetensors_io import StoredTensor

INT4_GROUP = 32
FP8_BLOCK = 128
_FP8_MAX = 448.0
Floats = NDArray[np.float32]


def store(values: NDArray[np.floating[Any]], dtype: str) -> StoredTensor:
    """Round floats to `F32`, `F16` or `BF16` (round to nearest, ties to even)."""
    values = np.asarray(values, np.float32)
    if dtype == "F32":
        return StoredTensor("F32", values)
    if dtype == "F16":
        return StoredTensor("F16", values.astype(np.float16))
    if dtype == "BF16":
        return StoredTensor("BF16", values.astype(ml_dtypes.bfloat16).view(np.uint16))
    raise ValueError(f"{dtype}: a float dtype is F32, F16 or BF16")


def restore(tensor: StoredTensor) -> Floats:
    """The float32 values of what `store` made."""
    if tensor.dtype == "BF16":
        return np.asarray(tensor.data.view(ml_dtypes.bfloat16), np.float32)
    return np.asarray(tensor.data, np.float32)


def pack_bits(codes: NDArray[np.unsignedinteger[Any]], bits: int) -> NDArray[np.uint32]:
    """Pack codes as MLX does: a little-endian bit stream along the last axis.

    Args:
        codes: (..., in) unsigned, each below 2**bits; `in` a multiple of 32.
        bits: 1 to 8.

    Returns:
        (..., in * bits / 32) uint32.

    Source: mlx `mlx/backend/cpu/quantized.cpp`; held to `mx.dequantize` by a test.
    """
    *leading, columns = codes.shape
    # Eight codes, a byte each, are one uint64. Neighbours close up: bytes to pairs, pairs to fours, fours to eights.
    stream = np.ascontiguousarray(codes, np.uint8).view("<u8").reshape(-1)
    for width in (8, 16, 32) if bits < 8 else ():
        used = width // 8 * bits
        high = stream >> np.uint64(width - used)
        high &= _lanes(used, width) << np.uint64(used)
        stream = stream & _lanes(used, width)
        stream |= high
    # They fill `bits` bytes exactly, which are moved in the widest units that divide them.
    unit = bits & -bits
    units = stream.view(f"<u{unit}").reshape(-1, 8 // unit)[:, : bits // unit]
    return np.ascontiguousarray(units).view(np.uint8).reshape(*leading, columns * bits // 8).view("<u4")


def unpack_bits(packed: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Undo `pack_bits`: (..., in * bits / 32) uint32 to (..., in) uint8."""
    unit = bits & -bits
    units = np.ascontiguousarray(packed).view(f"<u{unit}").reshape(-1, bits // unit)
    padded = np.zeros((len(units), 8 // unit), units.dtype)
    padded[:, : bits // unit] = units
    stream = padded.view("<u8").reshape(-1)
    for width in (32, 16, 8) if bits < 8 else ():
        used = width // 8 * bits
        high = stream & (_lanes(used, width) << np.uint64(used))
        high <<= np.uint64(width - used)
        stream = stream & _lanes(used, width)
        stream |= high
    return stream.view(np.uint8).reshape(*packed.shape[:-1], packed.shape[-1] * 32 // bits)


def _lanes(used: int, width: int) -> np.uint64:
    """The lowest `used` bits of every other lane of `width` bits."""
    return np.uint64(sum((2**used - 1) << at for at in range(0, 64, 2 * width)))


def quantize_affine(
    weight: Floats, *, bits: int, group_size: int, dtype: str
) -> tuple[NDArray[np.uint32], StoredTensor, StoredTensor]:
    """Quantize a weight as MLX's affine mode does: value = code * scale + bias, per group of the last axis.

    Args:
        weight: (..., in) float32.
        bits: one of `quantization.AFFINE_BITS`.
        group_size: columns that share a scale; divides `in`.
        dtype: the dtype of scales and biases: `BF16`, `F16` or `F32`.

    Returns:
        Packed codes (..., in * bits / 32) uint32; scales and biases (..., in / group_size).
    """
    groups = weight.reshape(*weight.shape[:-1], -1, group_size)
    low = groups.min(-1)
    scales = store((groups.max(-1) - low) / (2**bits - 1), dtype)
    biases = store(low, dtype)
    # Codes are chosen for the rounded scale and bias: they are what the reader will multiply with.
    step = restore(scales)[..., None]
    codes = np.rint((groups - restore(biases)[..., None]) / np.where(step == 0, np.float32(1), step))
    codes = np.clip(codes, 0, 2**bits - 1).astype(np.uint8)
    return pack_bits(codes.reshape(weight.shape), bits), scales, biases


def dequantize_affine(
    packed: NDArray[np.uint32], scales: Floats, biases: Floats, *, bits: int, group_size: int
) -> Floats:
    """The float32 values of a packed affine weight: (..., in)."""
    codes = unpack_bits(packed, bits)
    groups = codes.reshape(*codes.shape[:-1], -1, group_size)
    return (groups * scales[..., None] + biases[..., None]).astype(np.float32).reshape(codes.shape)


def quantize_int4(weight: Floats, *, dtype: str, symmetric: bool = False) -> tuple[NDArray[np.int32], StoredTensor]:
    """Quantize a weight as compressed-tensors' `pack-quantized` does: value = (nibble - 8) * scale, groups of 32.

    Args:
        weight: (..., out, in) float32; `in` a multiple of 32.
        dtype: the dtype of the scales.
        symmetric: leave the code -8 out, as K2-Thinking was trained; see `int4_codes`.

    Returns:
        Packed (..., out, in / 8) int32, the lowest nibble being the lowest column; scales (..., out, in / 32).
    """
    codes, scales = int4_codes(weight, dtype=dtype, symmetric=symmetric)
    return pack_bits((codes + 8).astype(np.uint8), 4).view(np.int32), scales


def int4_codes(weight: Floats, *, dtype: str, symmetric: bool) -> tuple[NDArray[np.int8], StoredTensor]:
    """INT4 codes (..., in) with a scale for each 32 columns; the scale is rounded to `dtype` before w / scale is rounded.

    Args:
        symmetric: scale max|w| / 7 and codes -7 to 7; else max|w| / 7.5 and -8 to 7.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, INT4_GROUP)
    scales = store(np.abs(groups).max(-1) / np.float32(7 if symmetric else 7.5), dtype)
    step = restore(scales)[..., None]
    codes = np.clip(np.rint(groups / np.where(step == 0, np.float32(1), step)), -7 if symmetric else -8, 7)
    return codes.astype(np.int8).reshape(weight.shape), scales


def quantize_mxfp4(weight: Floats) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes of 4-bit floats, two a byte with the first in the low half (..., in / 2), and exponents (..., in / 32).

    Source: "OCP Microscaling Formats (MX) v1.0": e2m1 elements, an e8m0 scale for each 32.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    largest = np.maximum(np.abs(groups).max(axis=-1, keepdims=True), np.float32(2.0**-120))
    exponents = np.clip(np.floor(np.log2(largest)) - 2, -127, 127)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    scaled = groups / np.exp2(exponents)
    codes = np.abs(np.abs(scaled)[..., None] - magnitudes).argmin(axis=-1) + 8 * (scaled < 0)
    codes = codes.reshape(weight.shape).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents[..., 0] + 127).astype(np.uint8)


def quantize_fp8(weight: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Quantize a weight to FP8 e4m3 with one scale per block of 128 x 128: value = code * scale_inv[row // 128, column // 128].

    Args:
        weight: (..., out, in) float32; the last blocks of rows and columns may be ragged.

    Returns:
        Codes (..., out, in) uint8 and scale_inv (..., ceil(out / 128), ceil(in / 128)) float32.
    """
    *leading, rows, columns = weight.shape
    padding = [(0, 0)] * len(leading) + [(0, -rows % FP8_BLOCK), (0, -columns % FP8_BLOCK)]
    padded = np.pad(weight, padding)
    blocks = padded.reshape(*leading, padded.shape[-2] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    peak = np.abs(blocks).max((-3, -1))
    scale_inv = np.where(peak == 0, 1.0, peak / _FP8_MAX).astype(np.float32)
    codes = encode_e4m3(blocks / scale_inv[..., :, None, :, None]).reshape(padded.shape)
    return np.ascontiguousarray(codes[..., :rows, :columns]), scale_inv


def encode_e4m3(values: Floats) -> NDArray[np.uint8]:
    """FP8 e4m3fn codes of float32 values within +-448, rounded to nearest even."""
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def decode_e4m3(codes: NDArray[np.uint8]) -> Floats:
    """The float32 values of FP8 e4m3fn codes."""
    return np.asarray(codes.view(ml_dtypes.float8_e4m3fn), np.float32)


def dequantize_fp8(codes: NDArray[np.uint8], scale_inv: Floats) -> Floats:
    """The float32 values of FP8 blocks: (..., out, in)."""
    rows, columns = codes.shape[-2:]
    spread = scale_inv.repeat(FP8_BLOCK, -2).repeat(FP8_BLOCK, -1)[..., :rows, :columns]
    return decode_e4m3(codes) * spread
