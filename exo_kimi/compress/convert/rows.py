"""Rows of a module's matrices as float32, from any layout, and their packed bytes where no bit changes.

A module is one matrix (out, in), or a stack of them: experts (E, out, in), heads (H, out, in).
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.packing import FP8_BLOCK, decode_e4m3, unpack_bits
from exo_kimi.checkpoint.quantization import QuantSpec
from exo_kimi.checkpoint.safetensors_io import BITS_PER_ELEMENT, TensorEntry
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.compress.convert import float_modes
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import NotFiniteError, QuantizationError

Floats = NDArray[np.float32]

_E4M3 = decode_e4m3(np.arange(256, dtype=np.uint8))
_FLOATS: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
INTEGER_PARTS = {"weight": "weight_packed", "scales": "weight_scale"}
"""MLX's parts -> those of compressed-tensors' integers with the same bytes."""


def floats_of(data: NDArray[np.uint8], dtype: str) -> Floats:
    """Stored bytes as float32: exact for every dtype."""
    if dtype == "BF16":  # twice as fast as a cast
        wide = data.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.asarray(data.view(_FLOATS[dtype]), np.float32)


class SourceRows:
    """Rows of one module. Safe to use from several threads.

    Args:
        reader: of the checkpoint.
        source: the module's tensors and layout.
    """

    def __init__(self, reader: RangeReader, source: ModuleSource) -> None:
        self.source = source
        self._reader = reader
        shape = source.spec.shape
        self.matrices = math.prod(shape[:-2])
        self.out, self.into = (1, shape[0]) if len(shape) == 1 else shape[-2:]

    def floats(self, matrix: int, first: int, end: int) -> Floats:
        """Rows [first, end) of a matrix: (end - first, in) float32.

        Codes are multiplied out in float32, never in a narrower float: code * scale + bias, or an FP8 code times the scale of its
        block of 128 x 128, which may be ragged.

        Raises:
            NotFiniteError: a weight is NaN or infinite.
            TensorFileError: the file cannot be read.
        """
        values = self._floats(matrix, first, end)
        if not np.isfinite(values).all():
            entry = next(iter(self.source.parts.values()))[0]
            raise NotFiniteError(
                f"{entry.name}: a weight is not finite",
                found=f"NaN or infinity in rows {first:,} to {end:,} of matrix {matrix}",
                where=entry.file,
                fix="`exo-kimi doctor DIR --deep` says which; download or copy this file again",
            )
        return values

    def _floats(self, matrix: int, first: int, end: int) -> Floats:
        source, rows = self.source, end - first
        if source.layout == "plain":
            return floats_of(self.part("weight", matrix, first, end), self.dtype("weight")).reshape(rows, -1)
        if source.layout == "fp8":
            codes = self.part("weight", matrix, first, end).reshape(rows, -1)
            blocks = self.part("weight_scale_inv", matrix, first // FP8_BLOCK, -(-end // FP8_BLOCK))
            factors = floats_of(blocks, self.dtype("weight_scale_inv")).reshape(-1, -(-self.into // FP8_BLOCK))
            by_row = factors[np.arange(first, end) // FP8_BLOCK - first // FP8_BLOCK]
            values = _E4M3[codes]
            values *= by_row.repeat(FP8_BLOCK, 1)[:, : self.into]
            return values
        quant = self.quant
        packed = self.part("weight", matrix, first, end).view(np.uint32).reshape(rows, -1)
        groups = unpack_bits(packed, quant.bits).reshape(rows, -1, quant.group_size)
        if quant.mode != "affine":
            exponents = self.part("scales", matrix, first, end)
            columns = groups.reshape(-1, quant.group_size).T
            return float_modes.decode(columns, exponents, quant.mode).T.reshape(rows, -1)
        scales = self._scales("scales", matrix, first, end)
        values = groups.astype(np.float32)
        if source.layout == "int4":
            values -= np.float32(2 ** (quant.bits - 1))
            values *= scales
        else:
            values *= scales
            values += self._scales("biases", matrix, first, end)
        return values.reshape(rows, -1)

    @property
    def quant(self) -> QuantSpec:
        """The packing of a packed module.

        Raises:
            QuantizationError: it is not packed.
        """
        if self.source.quant is None:
            raise QuantizationError(f"{self.source.spec.path} is not packed", found=self.source.layout)
        return self.source.quant

    def dtype(self, part: str) -> str:
        """The dtype of a part, by MLX's name of it."""
        return self._entries(part)[0].dtype

    def part(self, part: str, matrix: int, first: int, end: int) -> NDArray[np.uint8]:
        """Bytes of rows of one part, by MLX's name of it; rows of a FP8 scale are those of blocks."""
        entries = self._entries(part)
        entry = entries[matrix] if len(entries) > 1 else entries[0]
        row_bytes, rows = _row_bytes(entry), self._rows_of(part)
        start = first if len(entries) > 1 else matrix * rows + first
        return self._reader.read(entry, start * row_bytes, (end - first) * row_bytes)

    def vector(self, part: str) -> NDArray[np.uint8]:
        """All bytes of a small tensor: a bias, a router's correction."""
        return self._reader.read(self.source.parts[part][0])

    def _rows_of(self, part: str) -> int:
        return -(-self.out // FP8_BLOCK) if part == "weight_scale_inv" else self.out

    def _entries(self, part: str) -> tuple[TensorEntry, ...]:
        name = INTEGER_PARTS.get(part, part) if self.source.layout == "int4" else part
        return self.source.parts[name]

    def _scales(self, part: str, matrix: int, first: int, end: int) -> Floats:
        return floats_of(self.part(part, matrix, first, end), self.dtype(part)).reshape(end - first, -1, 1)


def _row_bytes(entry: TensorEntry) -> int:
    columns = entry.shape[-1] if len(entry.shape) > 1 else math.prod(entry.shape)
    return columns * BITS_PER_ELEMENT[entry.dtype] // 8
