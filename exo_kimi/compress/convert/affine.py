"""MLX's affine codes, value = code * scale + bias for each group of a row: with mx.quantize's arithmetic, or searched.

Weights come transposed, (group_size, N): one column a group. Sums over a group are then sums of long vectors, which NumPy does
at a quarter of a nanosecond a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rounding = Literal["search", "mlx"]

_LEAST_SCALE = np.float32(1e-7)  # mx.quantize's
_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}

# Bits -> shares of the range that the search begins with, and how often scale and bias are fitted to the codes and the codes to
# them. From a grid over normal and heavy-tailed weights (Student's t of 3 and 5): more of either gains under half a percent.
_SEARCH: dict[int, tuple[tuple[float, ...], int]] = {
    2: ((0.65,), 4),
    3: ((0.9, 0.8), 3),
    4: ((1.0, 0.9), 3),
    5: ((1.0,), 3),
    6: ((1.0,), 2),
    8: ((1.0,), 1),
}


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """Codes (group_size, N) as whole floats, and the scales and biases (N,), rounded to the dtype in which they are stored."""

    codes: Floats
    scales: Floats
    biases: Floats

    def values(self) -> Floats:
        """What a reader multiplies out: (group_size, N)."""
        values: Floats = self.codes * self.scales + self.biases
        return values


def rounded(values: Floats, dtype: str) -> Floats:
    """Float32 values as `BF16` or `F16` hold them."""
    return np.asarray(values.astype(_DTYPES[dtype]), np.float32)


def quantize_as_mlx(weights: Floats, bits: int, dtype: str) -> AffineCodes:
    """The codes, scales and biases of mx.quantize, bit for bit.

    The end of the range with the larger magnitude is met exactly, and so is zero; the codes are chosen for the scale before it
    is rounded. Groups are taken as they lie in a row: to transpose them costs more than these few passes gain.

    Source: mlx `mlx/backend/cpu/quantized.cpp`, `quantize`.
    """
    groups = weights.T
    steps = np.float32(2**bits - 1)
    low, high = groups.min(1), groups.max(1)
    negative = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / steps, _LEAST_SCALE)
    scales = np.where(negative, scales, -scales)
    edge = np.where(negative, low, high)
    zero_code = np.rint(edge / scales)
    meets_zero = zero_code != 0
    scales = np.where(meets_zero, edge / np.where(meets_zero, zero_code, np.float32(1)), scales)
    biases = np.where(meets_zero, edge, np.float32(0))
    codes = groups - biases[:, None]
    codes /= scales[:, None]
    np.rint(codes, out=codes)
    np.clip(codes, np.float32(0), steps, out=codes)
    return AffineCodes(codes.T, rounded(scales, dtype), rounded(biases, dtype))


def quantize_searched(weights: Floats, bits: int, dtype: str, *, importance: Floats | None = None) -> AffineCodes:
    """Codes, scales and biases with the least squared error that was found for each group.

    From a share of the range on, the scale and bias of least squares for the codes, rounded as they are stored, and the codes for
    those, in turn; the best of all steps counts.

        s = (n sum(wq) - sum(w) sum(q)) / (n sum(qq) - sum(q)^2),  b = (sum(w) - s sum(q)) / n

    Args:
        weights: (group_size, N).
        bits: of a code.
        dtype: `BF16` or `F16`, of scales and biases.
        importance: of each weight's squared error, such as the mean square of its input; not negative. All alike by default.
    """
    shares, fits = _SEARCH[bits]
    search = _Search(weights, bits, dtype, importance)
    for share in shares:
        search.start(np.float32(share))
        for _ in range(fits):
            search.refit()
    return search.best()


class _Search:
    """Buffers and the best of one block of groups."""

    def __init__(self, weights: Floats, bits: int, dtype: str, importance: Floats | None) -> None:
        self._weights, self._dtype, self._importance = weights, dtype, importance
        self._steps = np.float32(2**bits - 1)
        self._low, self._high = weights.min(0), weights.max(0)
        weighted = weights if importance is None else weights * importance
        self._weighted = weighted
        self._sum_h = np.float32(len(weights)) if importance is None else importance.sum(0)
        self._sum_w = weighted.sum(0)
        self._codes = np.empty_like(weights)
        self._scratch = np.empty_like(weights)
        self._scales = self._biases = self._low
        self._best_scales = self._best_biases = self._low
        self._least: Floats | None = None

    def start(self, share: np.float32) -> None:
        """Codes for a share of the range between the least and the largest weight."""
        self._try((self._high - self._low) * (share / self._steps), self._low * share)

    def refit(self) -> None:
        """Scale and bias for the codes of the last step, and codes for those."""
        codes, count = self._codes, self._sum_h
        weighed = codes if self._importance is None else np.multiply(codes, self._importance, out=self._scratch)
        sum_q, sum_qq = weighed.sum(0), np.einsum("ij,ij->j", weighed, codes)
        sum_wq = np.einsum("ij,ij->j", self._weighted, codes)
        spread = count * sum_qq - sum_q * sum_q
        several = spread > 0  # else all codes are alike, and any scale is as good
        scales = (count * sum_wq - self._sum_w * sum_q) / np.where(several, spread, np.float32(1))
        scales = np.where(several, scales, self._scales)
        biases = (self._sum_w - scales * sum_q) / np.where(count > 0, count, np.float32(1))
        self._try(scales, biases)

    def best(self) -> AffineCodes:
        """The codes of the best step."""
        self._encode(self._best_scales, self._best_biases)
        return AffineCodes(self._codes, self._best_scales, self._best_biases)

    def _try(self, scales: Floats, biases: Floats) -> None:
        self._scales, self._biases = rounded(scales, self._dtype), rounded(biases, self._dtype)
        self._encode(self._scales, self._biases)
        rest = np.multiply(self._codes, self._scales, out=self._scratch)
        rest += self._biases
        rest -= self._weights
        if self._importance is None:
            error = np.einsum("ij,ij->j", rest, rest)
        else:
            error = np.einsum("ij,ij,ij->j", rest, rest, self._importance)
        if self._least is None:
            self._least, self._best_scales, self._best_biases = error, self._scales, self._biases
            return
        better = error < self._least
        self._least = np.where(better, error, self._least)
        self._best_scales = np.where(better, self._scales, self._best_scales)
        self._best_biases = np.where(better, self._biases, self._best_biases)

    def _encode(self, scales: Floats, biases: Floats) -> None:
        """The nearest codes: rint((w - b) / s), within the steps. A scale of zero is of a group whose weights are all alike."""
        factor = np.float32(1) / np.where(scales == 0, np.float32(np.inf), scales)
        codes = np.subtract(self._weights, biases, out=self._codes)
        codes *= factor
        np.rint(codes, out=codes)
        np.clip(codes, np.float32(0), self._steps, out=codes)
