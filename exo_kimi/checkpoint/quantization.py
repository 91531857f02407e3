"""Bits, group size and mode of a packed weight, from its shapes and the architecture.

A packed row of `in` weights has in * bits / 32 columns of uint32 and in / group_size scales. The columns alone are ambiguous
(896 is 4-bit with in = 7168 and 2-bit with in = 14336), so `in` comes from the architecture, never from the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from exo_kimi.checkpoint.hints import Hint

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# MLX's float modes have no choice of bits or group. Source: mlx `python/src/ops.cpp`, `quantize`.
FLOAT_MODES = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Packing of a weight in MLX's terms: bits, group size and mode."""

    bits: int
    group_size: int
    mode: str = "affine"

    def describe(self) -> str:
        """`4-bit, group 64`, with the mode where it is not affine."""
        return Hint(self.bits, self.group_size, self.mode).describe()


def infer_quant(in_features: int, packed_columns: int, scale_columns: int, *, float_mode: bool) -> QuantSpec | None:
    """The only bits and group size that fit a packed row, or None when none do.

    Args:
        in_features: weights in a row, from the architecture.
        packed_columns: uint32 columns of the packed weight.
        scale_columns: columns of the scales.
        float_mode: scales are uint8 exponents (mxfp4, nvfp4, mxfp8) and not floats (affine).
    """
    bits, bits_left = divmod(packed_columns * 32, in_features)
    group_size, columns_left = divmod(in_features, scale_columns) if scale_columns else (0, 1)
    if bits_left or columns_left:
        return None
    if float_mode:
        mode = FLOAT_MODES.get((bits, group_size))
        return None if mode is None else QuantSpec(bits, group_size, mode)
    if bits not in AFFINE_BITS or group_size not in AFFINE_GROUPS:
        return None
    return QuantSpec(bits, group_size)


def contradiction(hint: Hint, spec: QuantSpec | None) -> bool:
    """Whether a hint states something that the shapes refute; what it leaves open it does not state."""
    if spec is None:
        return bool(hint.bits)
    pairs = ((hint.bits, spec.bits), (hint.group_size, spec.group_size), (hint.mode, spec.mode))
    return hint.bits == 0 or any(claimed is not None and claimed != actual for claimed, actual in pairs)


def columns_in_words(in_features: int, packed_columns: int, *, width: str = "in") -> str:
    """`672 = 7168 * 3 / 32, which is 3-bit`; or what the columns would mean with another `in`."""
    bits, left = divmod(packed_columns * 32, in_features)
    if not left and bits in AFFINE_BITS:
        return f"{packed_columns:,} = {in_features} * {bits} / 32, which is {bits}-bit"
    others = [
        f"{bits}-bit if {width} were {packed_columns * 32 // bits}"
        for bits in AFFINE_BITS
        if not packed_columns * 32 % bits
    ]
    return f"{packed_columns:,} is not {in_features} * bits / 32 for any bits; it would be {' or '.join(others)}"


def columns_by_bits(in_features: int) -> str:
    """`448 (2-bit), 672 (3-bit), 896 (4-bit), ...`: the columns that a row of `in` weights can have."""
    return ", ".join(f"{in_features * bits // 32} ({bits}-bit)" for bits in AFFINE_BITS)


def correction_in_words(in_features: int, packed_columns: int, hint: Hint, spec: QuantSpec) -> str:
    """Why a hint is wrong, in words and numbers that a reader can check.

    config.json says 4-bit, group 64; the shapes say 3-bit, group 64:
    672 columns = 7168 * 3 / 32, where 4-bit would be 896 = 7168 * 4 / 32
    """
    said = f"config.json says {hint.describe()}; the shapes say {spec.describe()}"
    if hint.bits == 0:
        return f"{said}: {columns_in_words(in_features, packed_columns)}"
    if hint.bits not in (None, spec.bits):
        wanted = f"{hint.bits}-bit would be {in_features * hint.bits // 32} = {in_features} * {hint.bits} / 32"
        return f"{said}: {packed_columns} columns = {in_features} * {spec.bits} / 32, where {wanted}"
    if hint.group_size not in (None, spec.group_size):
        return f"{said}: {in_features // spec.group_size} scales a row = {in_features} / {spec.group_size}"
    return f"{said}: scales are {'floats' if spec.mode == 'affine' else 'bytes'}"
