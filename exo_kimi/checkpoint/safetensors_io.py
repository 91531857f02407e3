"""The safetensors container: headers read strictly, whole files written by the safetensors library.

A file is 8 bytes of little-endian header length, that many bytes of JSON, then the tensors' bytes without gap or overlap.
A *cut* file holds some of a file's tensors and the header of the whole: a machine's share is made of whole files and cut ones.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
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
WHOLE_HEADER = "exo_kimi_whole_header"  # key of a cut file's metadata: the header of the file it was cut from
WHOLE_SHA256 = "exo_kimi_whole_sha256"
_LENGTH_BYTES = 8
_MAX_DIMS, _MAX_COUNT = 64, 2**63  # beyond them a number is too long to print
_HEADER_RULE = f"a header of 2 to {MAX_HEADER_BYTES:,} bytes"
_NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_BIT_PATTERNS = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


class TensorEntry(NamedTuple):  # there are up to half a million, and a frozen dataclass takes three times as long
    """One tensor in one file: everything a header says about it.

    Args:
        name: the key in the file.
        dtype: safetensors' name of the dtype, such as `BF16`.
        shape: its dimensions.
        file: the file's name inside the checkpoint directory.
        start: first byte in the file, absolute; negative where a cut file tells of the tensor and does not hold it.
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

    @property
    def is_here(self) -> bool:
        """Whether the file holds its bytes; a cut file tells of the others by name, dtype and shape alone."""
        return self.start >= 0

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
        that a problem makes unusable are left out. Of a cut file: the header and the entries of the whole one.
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
    entries, problems = _entries(path, raw, _LENGTH_BYTES + header_bytes)
    # A missing entry would look like a gap: the layout is judged only when every entry could be read.
    if not problems:
        problems += _layout_problems(path, entries, _LENGTH_BYTES + header_bytes, file_bytes)
    metadata = raw.get("__metadata__")
    whole = metadata.get(WHOLE_HEADER) if isinstance(metadata, dict) else None
    return (header, entries, problems) if whole is None else _of_cut_file(path, whole, entries, problems)


def cut_head(
    header: bytes, names: Collection[str], *, sha256: str | None = None
) -> tuple[bytes, list[tuple[int, int]]]:
    """Begin a cut file: one that holds some tensors of a file and, in its metadata, the header of the whole.

    Such a file is a safetensors file like any other, so programs that know nothing of cuts find tensors missing, and no zeros.

    Args:
        header: of the whole file, sound, without its length.
        names: the tensors to keep.
        sha256: of the whole file, where it is known: cuts of files with other weights are not taken for each other.

    Returns:
        The bytes before the first tensor, and the byte ranges of the whole file that follow, in this order.
    """
    raw = json.loads(header)
    metadata = {**(raw.get("__metadata__") or {}), WHOLE_HEADER: header.decode()}
    if sha256 is not None:
        metadata[WHOLE_SHA256] = sha256
    kept: dict[str, Any] = {}
    ranges: list[tuple[int, int]] = []
    data_start, position = _LENGTH_BYTES + len(header), 0
    fields = [(name, each) for name, each in raw.items() if name in names and name != "__metadata__"]
    for name, each in sorted(fields, key=lambda item: item[1]["data_offsets"]):
        start, end = each["data_offsets"]
        kept[name] = {**each, "data_offsets": [position, position + end - start]}
        position += end - start
        if ranges and ranges[-1][1] == data_start + start:
            ranges[-1] = (ranges[-1][0], data_start + end)
        elif end > start:
            ranges.append((data_start + start, data_start + end))
    text = json.dumps({"__metadata__": metadata, **kept}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the data of a file begins at a multiple of 8
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, ranges


def _entries(path: Path, raw: Mapping[str, Any], data_start: int) -> tuple[list[TensorEntry], list[TensorFileError]]:
    entries: list[TensorEntry] = []
    problems: list[TensorFileError] = []
    file = path.name
    for name, fields in raw.items():
        if name == "__metadata__":
            continue
        entry = _entry(path, file, name, fields, data_start)
        if isinstance(entry, TensorEntry):
            entries.append(entry)
        else:
            problems.append(entry)
    return entries, problems


def _of_cut_file(
    path: Path, text: object, held: list[TensorEntry], problems: list[TensorFileError]
) -> tuple[bytes, list[TensorEntry], list[TensorFileError]]:
    """Header and entries of the whole file, those that are held with their place in this one."""
    try:
        header = text.encode() if isinstance(text, str) else b""
        raw = json.loads(header)
    except (ValueError, RecursionError) as error:
        return b"", held, [*problems, _broken(path, "the header of the whole file is not JSON", "JSON", str(error))]
    if not isinstance(raw, dict):
        return b"", held, [*problems, _broken(path, "the header of the whole file is not JSON", "a JSON object", raw)]
    whole, more = _entries(path, raw, _LENGTH_BYTES + len(header))
    here = {entry.name: entry for entry in held}
    entries = []
    for entry in whole:
        found = here.pop(entry.name, None)
        if found is not None and found[1:3] != entry[1:3]:
            odd = f"{entry.name}: the cut file and the whole one differ"
            more.append(_broken(path, odd, entry.describe(), found.describe()))
        entries.append(entry._replace(start=-entry.nbytes, end=0) if found is None else found)
    if here:
        odd = f"{next(iter(here))}: the cut file has it, and the whole one has not"
        more.append(_broken(path, odd, f"{len(whole)} tensors of the whole file", f"{len(here)} more"))
    return header, entries, [*problems, *more]


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
