"""One block of rows of a target, as the bytes that are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.packing import pack_bits
from exo_kimi.compress.convert import float_modes
from exo_kimi.compress.convert.affine import Floats, Rounding, quantize_as_mlx, quantize_searched
from exo_kimi.compress.convert.rows import SourceRows, floats_of
from exo_kimi.compress.convert.targets import ModuleTarget, RowBlock
from exo_kimi.compress.output.shards import OutputTensor

_NARROW: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Bytes of a tensor, from its byte `at` on."""

    name: str
    at: int
    data: NDArray[Any]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of packed weights: words (rows, in * bits / 32), scales and, affine only, biases (rows, groups)."""

    words: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any] | None


def pack_rows(
    rows: Floats, target: ModuleTarget, rounding: Rounding, *, importance: NDArray[np.float32] | None = None
) -> PackedRows:
    """Quantize and pack rows of weights.

    Args:
        rows: (rows, in) float32.
        target: for its packing and dtype.
        rounding: `search` for the least error, `mlx` for mx.quantize's arithmetic; the float modes are always searched.
        importance: (in,), of each column's squared errors.
    """
    packing = target.packing
    if packing is None:
        raise ValueError(f"{target.name} stays plain")
    count, into = rows.shape
    groups = into // packing.group_size
    columns = rows.reshape(count * groups, packing.group_size).T
    if packing.mode != "affine":
        columns = np.ascontiguousarray(columns)
    weights = None
    if importance is not None:
        weights = np.tile(importance.reshape(groups, packing.group_size).T, (1, count))
    if packing.mode != "affine":
        found = float_modes.quantize(columns, packing.mode, importance=weights)
        words = pack_bits(np.ascontiguousarray(found.codes.T).reshape(count, into), packing.bits)
        return PackedRows(words, found.scales.reshape(count, groups), None)
    if rounding == "mlx":
        affine = quantize_as_mlx(columns, packing.bits, target.dtype)
    else:
        affine = quantize_searched(columns, packing.bits, target.dtype, importance=weights)
    narrow = _NARROW[target.dtype]
    return PackedRows(
        pack_bits(affine.codes.T.reshape(count, into), packing.bits),
        affine.scales.astype(narrow).reshape(count, groups),
        affine.biases.astype(narrow).reshape(count, groups),
    )


def target_floats(target: ModuleTarget, rows: SourceRows, block: RowBlock) -> Floats:
    """The float32 weights of a block, from the source's rows: those of the halves of a kv_b_proj lie inside each head.

    embed_q[h] = nope rows of head h, transposed; unembed_out[h] = its v rows.
    """
    if target.heads is None:
        return rows.floats(block.matrix, block.first, block.end)
    nope, value = target.heads
    start = block.matrix * (nope + value)
    if target.spec.path.endswith(".embed_q"):
        return np.ascontiguousarray(rows.floats(0, start, start + nope)[:, block.first : block.end].T)
    return rows.floats(0, start + nope + block.first, start + nope + block.end)


def encode(
    target: ModuleTarget,
    rows: SourceRows,
    block: RowBlock,
    rounding: Rounding,
    *,
    importance: NDArray[np.float32] | None = None,
) -> Iterator[TensorPiece]:
    """The bytes of every tensor of a target that a block gives.

    Args:
        target: what is written.
        rows: of its source.
        block: which of them.
        rounding: how codes are chosen.
        importance: (in,), of the squared errors of each column of this block's matrix.

    Raises:
        NotFiniteError, TensorFileError: as `SourceRows.floats`.
    """
    weight = target.tensors[0]
    if target.moved:
        yield from _moved(target, rows, block)
    elif target.packing is not None:
        packed = pack_rows(target_floats(target, rows, block), target, rounding, importance=importance)
        for tensor, data in zip(target.tensors, (packed.words, packed.scales, packed.biases), strict=False):
            if data is not None:
                yield _piece(tensor, target, block, data)
    elif rows.source.layout == "plain" and rows.dtype("weight") == target.dtype and target.heads is None:
        yield _piece(weight, target, block, rows.part("weight", block.matrix, block.first, block.end))
    else:
        yield _piece(weight, target, block, target_floats(target, rows, block).astype(_NARROW[target.dtype]))
    if block.matrix == 0 and block.first == 0:
        yield from _vectors(target, rows)


def _moved(target: ModuleTarget, rows: SourceRows, block: RowBlock) -> Iterator[TensorPiece]:
    """Packed bytes as they lie in the source; biases of compressed-tensors' integers are -2^(bits - 1) scales."""
    matrix, first, end = block.matrix, block.first, block.end
    if target.heads is not None:
        nope, value = target.heads
        start = matrix * (nope + value) + nope
        matrix, first, end = 0, start + first, start + end
    for tensor in target.tensors:
        part = tensor.name.rpartition(".")[2]
        if part not in ("weight", "scales", "biases"):
            continue
        if part == "biases" and rows.source.layout == "int4":
            scales = floats_of(rows.part("scales", matrix, first, end), target.dtype)
            scales *= np.float32(-(2 ** (rows.quant.bits - 1)))
            yield _piece(tensor, target, block, scales.astype(_NARROW[target.dtype]))
        else:
            yield _piece(tensor, target, block, rows.part(part, matrix, first, end))


def _vectors(target: ModuleTarget, rows: SourceRows) -> Iterator[TensorPiece]:
    """The bias of a linear and the correction of a router, whole."""
    for tensor in target.tensors:
        part = tensor.name.rpartition(".")[2]
        if part in ("bias", "e_score_correction_bias"):
            values = floats_of(rows.vector(part), rows.source.parts[part][0].dtype)
            yield TensorPiece(tensor.name, 0, values.astype(_NARROW[tensor.dtype]))


def _piece(tensor: OutputTensor, target: ModuleTarget, block: RowBlock, data: NDArray[Any]) -> TensorPiece:
    out = target.spec.shape[-2] if len(target.spec.shape) > 1 else 1
    row_bytes = data.nbytes // (block.end - block.first)
    return TensorPiece(tensor.name, (block.matrix * out + block.first) * row_bytes, data)
