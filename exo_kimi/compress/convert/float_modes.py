"""MLX's float modes: codes of e2m1 or e4m3, and one byte of scale for each group.

| mode | codes | group | scale |
|---|---|---|---|
| mxfp4 | e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6) | 32 | e8m0: a power of two |
| nvfp4 | e2m1 | 16 | e4m3 |
| mxfp8 | e4m3 (to 448) | 32 | e8m0 |

Source: mlx `python/src/ops.cpp`, `quantize`; held to `mx.dequantize` by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.packing import decode_e4m3

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_E4M3 = decode_e4m3(np.arange(256, dtype=np.uint8))
_MOST_E8M0 = 254  # 255 is NaN
_EXPONENT_BIAS = 127


@dataclass(frozen=True, slots=True)
class FloatCodes:
    """Codes (group_size, N) and scale bytes (N,) of a float mode."""

    codes: Codes
    scales: Codes


def decode(codes: Codes, scales: Codes, mode: str) -> Floats:
    """The float32 values: codes (group_size, N), scales (N,)."""
    table = _E4M3 if mode == "mxfp8" else _E2M1
    values: Floats = table[codes] * scale_values(scales, mode)
    return values


def scale_values(scales: Codes, mode: str) -> Floats:
    """Scale bytes as float32."""
    if mode == "nvfp4":
        return _E4M3[scales]
    return np.ldexp(np.float32(1), scales.astype(np.int32) - _EXPONENT_BIAS)


def quantize(weights: Floats, mode: str, *, importance: Floats | None = None) -> FloatCodes:
    """Codes and scales with the least squared error among the scales around the one that just holds the largest weight.

    Args:
        weights: (group_size, N).
        mode: `mxfp4`, `nvfp4` or `mxfp8`.
        importance: of each weight's squared error; all alike by default.
    """
    first, *others = _candidates(np.abs(weights).max(0), mode)
    best, least = _tried(weights, first, mode, importance)
    for scales in others:
        found, error = _tried(weights, scales, mode, importance)
        better = error < least
        least = np.where(better, error, least)
        best = FloatCodes(np.where(better, found.codes, best.codes), np.where(better, found.scales, best.scales))
    return best


def _tried(weights: Floats, scales: Codes, mode: str, importance: Floats | None) -> tuple[FloatCodes, Floats]:
    """The codes for given scales, and the squared error of each group."""
    values = scale_values(scales, mode)
    codes = _encode(np.divide(weights, np.where(values == 0, np.float32(1), values), dtype=np.float32), mode)
    rest = decode(codes, scales, mode) - weights
    rest *= rest
    return FloatCodes(codes, scales), (rest if importance is None else rest * importance).sum(0)


def _candidates(peak: Floats, mode: str) -> list[Codes]:
    """Scale bytes to try. A power of two that holds the largest weight, and the one below, which clips it; an e4m3 near it."""
    if mode == "nvfp4":
        nearest = (peak / np.float32(6)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.int16)
        return [np.clip(nearest + step, 0, 0x7E).astype(np.uint8) for step in (0, 1, -1, -2)]
    most = np.float32(448 if mode == "mxfp8" else 6)
    _, exponent = np.frexp(peak / most)  # peak / most <= 2^exponent
    holding = exponent.astype(np.int32) + _EXPONENT_BIAS
    return [np.clip(holding + step, 0, _MOST_E8M0).astype(np.uint8) for step in (0, -1)]


def _encode(values: Floats, mode: str) -> Codes:
    """The nearest codes, ties to even; what is larger than the largest becomes it."""
    if mode == "mxfp8":
        clipped = np.clip(values, np.float32(-448), np.float32(448))
        return clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    clipped = np.clip(values, np.float32(-6), np.float32(6))
    return clipped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
