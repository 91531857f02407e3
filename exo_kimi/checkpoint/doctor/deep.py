"""Check the values of tensors: no NaN or infinity in weights and scales, no int4 shape that contradicts the packing.

Every floating tensor is read once, in pieces, so memory does not grow with the checkpoint; packed codes cannot be wrong and
are not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import NotFiniteError, ShapeMismatchError, TensorFileError

Progress = Callable[[int, int], None]
PIECE_BYTES = 4 * 2**20
# NumPy type, mask of the magnitude, and the magnitude of infinity; FP8 e4m3fn and E8M0 have no infinity, NaN only.
_FORMATS = {
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F8_E4M3": ("u1", 0x7F, None),
    "E8M0": ("u1", 0xFF, None),
}
_COPY_FIX = "download or copy this file again; if the source has it too, the checkpoint was made wrongly"


def check_values(
    root: Path, sources: Iterable[ModuleSource], checkup: Checkup, progress: Progress | None = None
) -> None:
    """Read every floating tensor of the sources and note what is not finite.

    Args:
        root: the checkpoint.
        sources: the modules to read.
        checkup: gets the findings.
        progress: called with (bytes read, bytes to read).
    """
    work = sorted(_work(sources), key=lambda item: (item[0].file, item[0].start))
    total = sum(entry.nbytes for entry, _, _ in work)
    done = 0
    for entry, form, source in work:
        try:
            if form is None:
                _check_shape(root, entry, source, checkup)
            else:
                _check_finite(root, entry, form, checkup)
        except OSError as error:
            checkup.error(
                TensorFileError(f"{entry.file} cannot be read", found=error.strerror, where=entry.file, fix=_COPY_FIX)
            )
        done += entry.nbytes
        if progress is not None:
            progress(done, total)


def _work(sources: Iterable[ModuleSource]) -> Iterator[tuple[TensorEntry, str | None, ModuleSource]]:
    """Every tensor to read with its format; the format is None for the shapes that int4 tensors carry."""
    for source in sources:
        for part, entries in source.parts.items():
            for entry in entries:
                form: str | None = entry.dtype
                if entry.dtype == "U8" and part == "scales" and source.quant is not None:
                    form = "F8_E4M3" if source.quant.mode == "nvfp4" else "E8M0"
                if part == "weight_shape":
                    yield entry, None, source
                elif form in _FORMATS:
                    yield entry, form, source


def _check_finite(root: Path, entry: TensorEntry, form: str, checkup: Checkup) -> None:
    kind, mask, infinity = _FORMATS[form]
    infinities = nans = seen = 0
    first: int | None = None
    for piece in _pieces(root, entry):
        magnitude = np.frombuffer(piece, kind) & np.asarray(mask, kind)
        odd = magnitude >= (mask if infinity is None else infinity)
        if odd.any():
            first = seen + int(odd.argmax()) if first is None else first
            inf = 0 if infinity is None else int(np.count_nonzero(magnitude == infinity))
            infinities += inf
            nans += int(np.count_nonzero(odd)) - inf
        seen += len(magnitude)
    if first is not None:
        counts = [f"{count:,} {name}" for count, name in ((nans, "NaN"), (infinities, "infinite")) if count]
        place = tuple(int(axis) for axis in np.unravel_index(first, entry.shape))
        checkup.error(
            NotFiniteError(
                f"{entry.name} is not finite",
                expected=f"{seen:,} finite values",
                found=f"{' and '.join(counts)}, the first at {place}",
                where=entry.file,
                fix=_COPY_FIX,
            )
        )


def _check_shape(root: Path, entry: TensorEntry, source: ModuleSource, checkup: Checkup) -> None:
    data = b"".join(bytes(piece) for piece in _pieces(root, entry))
    told = np.frombuffer(data, "<i8" if entry.dtype == "I64" else "<i4").reshape(-1, 2)
    expected = source.spec.shape[-2:]
    wrong = (told != np.asarray(expected)).any(axis=1)
    if wrong.any():
        checkup.error(
            ShapeMismatchError(
                f"{entry.name}: its value is not the shape of the weight beside it",
                expected=f"{expected}, as weight_packed has it",
                found=tuple(int(size) for size in told[int(wrong.argmax())]),
                where=entry.file,
                fix=_COPY_FIX,
            )
        )


def _pieces(root: Path, entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of a tensor, a few megabytes at a time, in one buffer that is used again."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(entry.nbytes, 1))))
    with os.fdopen(open_regular(root / entry.file), "rb", buffering=0) as stream:
        stream.seek(entry.start)
        left = entry.nbytes
        while left:
            size = min(left, len(buffer))
            filled = 0
            while filled < size:
                count = stream.readinto(buffer[filled:size])
                if not count:
                    raise OSError(0, "the file ended early")
                filled += count
            left -= size
            yield buffer[:size]
