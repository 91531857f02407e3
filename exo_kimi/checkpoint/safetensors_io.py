"""The safetensors container: headers read strictly, whole files written by the safetensors library.

A file is 8 bytes of little-endian header length, that many bytes of JSON, then the tensors' bytes without gap or overlap.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from exo_kimi.checkpoint.formats import impostor
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import TensorFileError

BITS_PER_ELEMENT = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own bound: a hostile length must not allocate more
_LENGTH_BYTES = 8
_MAX_DIMS, _MAX_COUNT = 64, 2**63  # beyond them a number is too long to print
_HEADER_RULE = f"a header of 2 to {MAX_HEADER_BYTES:,} bytes"
_NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "U32": np.uint32, "I32": np.int32, "U8": np.uint8}
_BIT_PATTERNS = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


class TensorEntry(NamedTuple):  # there are up to half a million, and a frozen dataclass takes three times as long
    """One tensor in one file: everything a header says about it.

    Args:
        name: the key in the file.
        dtype: safetensors' name of the dtype, such as `BF16`.
        shape: its dimensions.
        file: the file's name inside the checkpoint directory.
        start: first byte in the file, absolute.
        end: one past the last byte in the file, absolute.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    def describe(self) -> str:
        """`(384, 7168, 256) U32`."""
        return f"{self.shape} {self.dtype}"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file holds it, as a NumPy array: BF16 as uint16 bit patterns, F8_E4M3 as uint8 codes."""

    dtype: str
    data: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(self.data.nbytes)


def read_header(path: Path) -> tuple[bytes, list[TensorEntry], list[TensorFileError]]:
    """The tensors of one file, from its header alone.

    Args:
        path: a `.safetensors` file.

    Returns:
        The header's bytes (for a fingerprint), its entries in the order of the header, and every problem met. Entries
        that a problem makes unusable are left out.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(_LENGTH_BYTES)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or not 2 <= header_bytes <= MAX_HEADER_BYTES:
                short = len(prefix) < _LENGTH_BYTES
                other = impostor(prefix)
                if other is not None:
                    return b"", [], [_impostor(path, *other, file_bytes=file_bytes)]
                found = f"{len(prefix)} bytes" if short else f"a header of {header_bytes:,} bytes"
                return b"", [], [_broken(path, "not a safetensors file", _HEADER_RULE, found)]
            header = stream.read(header_bytes)
    except OSError as error:
        return b"", [], [_broken(path, f"{path.name} cannot be read", "a readable file", error.strerror)]
    if len(header) < header_bytes:
        other = impostor(prefix)
        if other is not None:
            return b"", [], [_impostor(path, *other, file_bytes=file_bytes)]
        return b"", [], [_short(path, file_bytes, missing_bytes=header_bytes - len(header), part="header")]
    try:
        raw = json.loads(header)
    except (ValueError, RecursionError) as error:
        return header, [], [_broken(path, "the header is not JSON", "a JSON object", str(error))]
    if not isinstance(raw, dict):
        return header, [], [_broken(path, "the header is not JSON", "a JSON object", type(raw).__name__)]
    entries: list[TensorEntry] = []
    problems: list[TensorFileError] = []
    data_start, file = _LENGTH_BYTES + header_bytes, path.name
    for name, fields in raw.items():
        if name == "__metadata__":
            continue
        entry = _entry(path, file, name, fields, data_start)
        if isinstance(entry, TensorEntry):
            entries.append(entry)
        else:
            problems.append(entry)
    # A missing entry would look like a gap: the layout is judged only when every entry could be read.
    if not problems:
        problems += _layout_problems(path, entries, data_start, file_bytes)
    return header, entries, problems


def write_file(path: Path, tensors: Mapping[str, StoredTensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, with as much memory again as its tensors take.

    Args:
        path: where; replaced if it exists.
        tensors: what, by name. Wider dtypes come first, so that every tensor is aligned to its element.
        metadata: the header's `__metadata__`.

    Raises:
        OSError: the file cannot be written.
    """
    # Not safetensors' save_file: from 0.8 on it writes files that only their owner can read, and its errors have no errno.
    path.write_bytes(
        save({name: _as_written(tensor) for name, tensor in tensors.items()}, dict(metadata or {}) or None)
    )


def _as_written(tensor: StoredTensor) -> NDArray[Any]:
    data = np.ascontiguousarray(tensor.data).reshape(tensor.data.shape)  # a scalar stays one
    if tensor.dtype in _BIT_PATTERNS:
        return data.view(_BIT_PATTERNS[tensor.dtype])
    return data.astype(_NUMPY_DTYPES[tensor.dtype], copy=False)


def _entry(path: Path, file: str, name: str, fields: object, data_start: int) -> TensorEntry | TensorFileError:
    if not name.isprintable():
        return _broken(path, f"{name!a}: a name that cannot be printed", "printable text", ascii(name))
    if not isinstance(fields, dict):
        return _unreadable(path, name, type(fields).__name__)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return _unreadable(path, name, f"shape {shape}, data_offsets {offsets}")
    if not isinstance(dtype, str) or dtype not in BITS_PER_ELEMENT:
        return _broken(path, f"{name}: unknown dtype", ", ".join(BITS_PER_ELEMENT), dtype)
    start, end = offsets
    bits = BITS_PER_ELEMENT[dtype]
    for dim in shape:
        bits *= dim
    if bits % 8 or end - start != bits // 8:
        return _broken(
            path,
            f"{name}: its byte range does not fit its shape",
            f"{bits // 8:,} bytes for {tuple(shape)} {dtype}",
            f"{end - start:,} bytes (data_offsets {start:,} to {end:,})",
        )
    return TensorEntry(name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _unreadable(path: Path, name: str, found: str) -> TensorFileError:
    return _broken(path, f"{name}: a header entry that cannot be read", "dtype, shape and data_offsets", found)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    if type(value) is not list or len(value) > _MAX_DIMS:
        return False
    for item in value:  # noqa: SIM110 - a generator for each of half a million lists is a second
        if type(item) is not int or not 0 <= item < _MAX_COUNT:
            return False
    return True


def _layout_problems(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> list[TensorFileError]:
    problems = []
    position = data_start
    for entry in sorted(entries, key=attrgetter("start", "end")):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            problems.append(
                _broken(
                    path, f"{entry.name}: {kind}", f"data from byte {position:,}", f"data from byte {entry.start:,}"
                )
            )
        position = max(position, entry.end)
    if file_bytes < position:
        problems.append(_short(path, file_bytes, missing_bytes=position - file_bytes, part="data"))
    elif file_bytes > position:
        problems.append(_broken(path, "bytes after the last tensor", f"{position:,} bytes", f"{file_bytes:,} bytes"))
    return problems


def _impostor(path: Path, what: str, fix: str, *, file_bytes: int) -> TensorFileError:
    return TensorFileError(
        f"{path.name} is not a safetensors file: it is {what}",
        expected="a safetensors file",
        found=f"{file_bytes:,} bytes",
        where=path.name,
        fix=fix,
    )


def _short(path: Path, file_bytes: int, *, missing_bytes: int, part: str) -> TensorFileError:
    return TensorFileError(
        f"{path.name} is truncated: {missing_bytes:,} bytes of its {part} are missing",
        expected=f"{file_bytes + missing_bytes:,} bytes" + (" or more" if part == "header" else ""),
        found=f"{file_bytes:,} bytes",
        where=path.name,
        fix="download or copy this file again",
    )


def _broken(path: Path, what: str, expected: object, found: object) -> TensorFileError:
    return TensorFileError(
        what, expected=expected, found=found, where=path.name, fix="download or copy this file again"
    )
