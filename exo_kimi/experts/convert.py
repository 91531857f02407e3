"""Bytes of a file as those that a slot holds, in NumPy: it runs in reading threads, where nothing of MLX may."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

FP8_BLOCK = 128
"""Side of the square blocks that share one factor. Source: quantization_config.weight_block_size of Kimi K2."""

_SIGN, _EXPONENT = np.uint16(0x8000), np.uint16(0x7F80)
_WORDS: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8}


def words(data: memoryview | bytearray, dtype: str) -> NDArray[Any]:
    """Bytes as a flat array; bfloat16 as its bits."""
    return np.frombuffer(data, _WORDS[dtype])


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Exact, whatever the float dtype."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def write_floats(values: NDArray[np.float32], destination: memoryview, dtype: str) -> None:
    """Write float32 values in another dtype, rounded to the nearest, ties to even, as MLX does."""
    target = words(destination, dtype)
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # float16 has its infinity
            target[:] = values.reshape(-1)
        return
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    target[:] = np.where(np.isnan(values.reshape(-1)), np.uint32(0x7FC0), rounded)


def write_biases(scales: memoryview, destination: memoryview, dtype: str, zero: int) -> None:
    """-`zero` * scale, which is exact: `zero` is a power of two, so only sign and exponent change."""
    source, target = words(scales, dtype), words(destination, dtype)
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            np.multiply(source, -zero, out=target)
        return
    step = np.uint16((zero.bit_length() - 1) << 7)
    np.bitwise_xor(source, _SIGN, out=target)
    exponent = np.bitwise_and(source, _EXPONENT)
    # Zeros, subnormals and what would overflow have no such exponent.
    odd = (exponent == 0) | (exponent >= _EXPONENT - step)
    np.add(target, step, out=target)
    if odd.any():
        product = to_float32(source[odd], dtype) * np.float32(-zero)
        target[odd] = product.view(np.uint32) >> np.uint32(16)


def unpack_fp8(codes: NDArray[np.uint8], factors: NDArray[np.float32], destination: memoryview, dtype: str) -> None:
    """e4m3 codes (out, in) times a factor for each block of 128 x 128, in float32, then bfloat16, then `dtype`."""
    rows, columns = codes.shape
    scale = np.repeat(np.repeat(factors, FP8_BLOCK, axis=0)[:rows], FP8_BLOCK, axis=1)[:, :columns]
    values = _e4m3()[codes] * scale
    if dtype == "BF16":
        write_floats(values, destination, "BF16")
        return
    half = bytearray(values.size * 2)
    write_floats(values, memoryview(half), "BF16")
    write_floats(to_float32(words(half, "BF16"), "BF16"), destination, dtype)


@cache
def _e4m3() -> NDArray[np.float32]:
    """The value of each code: 4 bits of exponent, biased by 7, 3 of mantissa, no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)
