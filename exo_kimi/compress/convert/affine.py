"""MLX's affine codes, value = code * scale + bias for each group of a row: with mx.quantize's arithmetic, or searched.

Weights come as (group_size, N), one column a group: best as the transposed view of rows as they lie in a matrix. Sums over a
group are taken where groups are columns in memory, as sums of long vectors: an eighth of a nanosecond a weight.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Rounding = Literal["search", "mlx"]

_LEAST_SCALE = np.float32(1e-7)  # mx.quantize's
_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}

_TURNED = 128  # groups that are transposed at a time: their rows, a power of two apart, still fit the nearest cache

# Bits -> shares of the range that the search begins with, and how often scale and bias are fitted to the best codes and the codes
# to them. From a grid over normal and heavy-tailed weights (Student's t of 3 and 5): one fit more gains half a percent at most.
_SEARCH: dict[int, tuple[tuple[float, ...], int]] = {
    2: ((0.75, 0.55), 2),
    3: ((0.9, 0.75), 2),
    4: ((1.0, 0.85), 3),
    5: ((1.0,), 3),
    6: ((1.0,), 2),
    8: ((1.0,), 1),
}


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """Codes (group_size, N), and the scales and biases (N,), rounded to the dtype in which they are stored."""

    codes: Codes
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
    is rounded.

    Source: mlx `mlx/backend/cpu/quantized.cpp`, `quantize`.
    """
    groups, columns = weights.T, _columns("weights", weights)
    steps = np.float32(2**bits - 1)
    low, high = columns.min(0), columns.max(0)
    negative = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / steps, _LEAST_SCALE)
    scales = np.where(negative, scales, -scales)
    edge = np.where(negative, low, high)
    zero_code = np.rint(edge / scales)
    meets_zero = zero_code != 0
    scales = np.where(meets_zero, edge / np.where(meets_zero, zero_code, np.float32(1)), scales)
    biases = np.where(meets_zero, edge, np.float32(0))
    codes = np.subtract(groups, biases[:, None], out=_buffer("codes", groups.shape))
    codes /= scales[:, None]
    return AffineCodes(_whole(codes, steps).T, rounded(scales, dtype), rounded(biases, dtype))


def quantize_searched(weights: Floats, bits: int, dtype: str, *, importance: Floats | None = None) -> AffineCodes:
    """Codes, scales and biases with the least squared error that was found for each group.

    From each share of the range, the scale and bias of least squares for its codes, rounded as they are stored, and the codes for
    those; from the best of them on, the same in turn. With w as its distance from the mean of the group:

        s = (n sum(wq) - sum(w) sum(q)) / (n sum(qq) - sum(q)^2),  b = (sum(w) - s sum(q)) / n,  sum(w) = 0

    Args:
        weights: (group_size, N).
        bits: of a code.
        dtype: `BF16` or `F16`, of scales and biases.
        importance: of each weight's squared error, such as the mean square of its input; not negative. All alike by default.
    """
    shares, fits = _SEARCH[bits]
    search = _Search(weights, bits, dtype, importance)
    for share in shares:
        search.consider(search.fit(search.start(share)))
    for _ in range(fits):
        search.consider(search.fit(search.best))
    return _nearest(weights, search.best.scales, search.best.biases, search.steps)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Scales and biases as they are stored, and of their codes q: the squared error, sum(q), sum(qq) and sum(wq); (N,) each."""

    scales: Floats
    biases: Floats
    errors: Floats
    q: Floats
    qq: Floats
    wq: Floats

    def or_better(self, other: _Trial) -> _Trial:
        """The better of the two, group by group."""
        better = other.errors < self.errors
        return _Trial(*(np.where(better, getattr(other, name), getattr(self, name)) for name in self.__slots__))


class _Search:
    """The best scales and biases of one block of groups."""

    def __init__(self, weights: Floats, bits: int, dtype: str, importance: Floats | None) -> None:
        self.steps = np.float32(2**bits - 1)
        self._dtype = dtype
        self._weights = columns = _columns("weights", weights)
        self._importance = None if importance is None else _columns("importance", importance)
        low, high = columns.min(0), columns.max(0)
        if self._importance is None:
            self._weighed = columns
            self._count: Any = np.float32(len(columns))
            self._mean = columns.sum(0) / self._count
        else:  # a group of inputs that are always zero may have any codes
            self._count = self._importance.sum(0)
            sums = np.einsum("ij,ij->j", columns, self._importance)
            self._mean = np.where(self._count > 0, sums / np.where(self._count > 0, self._count, np.float32(1)), low)
        columns -= self._mean
        self._low, self._high = low - self._mean, high - self._mean
        if self._importance is not None:
            self._weighed = np.multiply(columns, self._importance, out=_buffer("weighed", columns.shape))
        self._squares = np.einsum("ij,ij->j", self._weighed, columns)
        self._codes = _buffer("codes", columns.shape)
        self._best: _Trial | None = None

    @property
    def best(self) -> _Trial:
        """The best that was considered."""
        if self._best is None:
            raise ValueError("nothing was considered")
        return self._best

    def consider(self, trial: _Trial) -> None:
        """Keep what is better of it."""
        self._best = trial if self._best is None else self._best.or_better(trial)

    def start(self, share: float) -> _Trial:
        """Codes over a share of the range, around its middle."""
        width = (self._high - self._low) * np.float32(share)
        return self._try(width / self.steps, (self._low + self._high - width) * np.float32(0.5))

    def fit(self, trial: _Trial) -> _Trial:
        """Scale and bias for the codes of a trial, and codes for those."""
        count = self._count
        spread = count * trial.qq - trial.q * trial.q
        several = spread > 0  # else all codes are alike, and any scale is as good
        scales = np.where(several, count * trial.wq / np.where(several, spread, np.float32(1)), trial.scales)
        offsets: Floats = -scales * trial.q
        offsets /= np.where(count > 0, count, np.float32(1))
        return self._try(scales, offsets)

    def _try(self, scales: Floats, offsets: Floats) -> _Trial:
        """Sums over the codes that are nearest; |w - s q - o|^2 = ww - 2 s wq + s^2 qq + 2 s o q + n o^2."""
        scales, biases = rounded(scales, self._dtype), rounded(offsets + self._mean, self._dtype)
        offsets = biases - self._mean
        factors = _reciprocal(scales)
        codes = np.multiply(self._weights, factors, out=self._codes)
        np.subtract(codes, offsets * factors, out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, np.float32(0), self.steps, out=codes)
        wq = np.einsum("ij,ij->j", self._weighed, codes)
        if self._importance is None:
            q, qq = codes.sum(0), np.einsum("ij,ij->j", codes, codes)
        else:
            q = np.einsum("ij,ij->j", self._importance, codes)
            qq = np.einsum("ij,ij,ij->j", self._importance, codes, codes)
        errors = self._squares + scales * (scales * qq + 2 * (offsets * q - wq)) + self._count * offsets * offsets
        return _Trial(scales, biases, errors, q, qq, wq)


def _nearest(weights: Floats, scales: Floats, biases: Floats, steps: np.float32) -> AffineCodes:
    """The nearest codes: rint((w - b) / s), within the steps."""
    groups = weights.T
    codes = np.subtract(groups, biases[:, None], out=_buffer("codes", groups.shape))
    codes *= _reciprocal(scales)[:, None]
    return AffineCodes(_whole(codes, steps).T, scales, biases)


def _whole(codes: Floats, steps: np.float32) -> Codes:
    """Rounded, and within the steps."""
    np.rint(codes, out=codes)
    np.clip(codes, np.float32(0), steps, out=codes)
    return codes.astype(np.uint8)


def _reciprocal(scales: Floats) -> Floats:
    """1 / s, and 0 for the scale 0 of a group whose weights are all alike."""
    return np.reciprocal(np.where(scales == 0, np.float32(np.inf), scales), dtype=np.float32)


class _Scratch(threading.local):
    """Arrays that a thread uses again for each block: to give memory back and ask for it anew takes a third of the time."""

    def __init__(self) -> None:
        self.arrays = dict[str, Floats]()


_SCRATCH = _Scratch()


def _buffer(name: str, shape: tuple[int, ...]) -> Floats:
    """This thread's array of a name, with whatever it holds."""
    size, found = math.prod(shape), _SCRATCH.arrays.get(name)
    if found is None or found.size < size:
        found = _SCRATCH.arrays[name] = np.empty(size, np.float32)
    return found[:size].reshape(shape)


def _columns(name: str, weights: Floats) -> Floats:
    """A copy in this thread's array of a name, in which groups are columns in memory too."""
    copy = _buffer(name, weights.shape)
    for first in range(0, weights.shape[1], _TURNED):
        copy[:, first : first + _TURNED] = weights[:, first : first + _TURNED]
    return copy
