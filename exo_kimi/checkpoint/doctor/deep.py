"""Read the weights: values that are not finite, zeros where a download broke off, implausible magnitudes, repeated pages, and
the SHA-256 of files where the hub's is at hand.

Every tensor is read once, packed codes and skipped ones too, file by file and in pieces, so memory does not grow with the
checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.doctor.findings import Checkup
from exo_kimi.checkpoint.doctor.pages import PageHashes, repeated_pages
from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import DamagedWeightsError, NotFiniteError, ShapeMismatchError, TensorFileError

Progress = Callable[[int, int], None]
PIECE_BYTES = 4 * 2**20
# Zeros at a file's end that no weight has: 16 values of 16 bits. Fewer are not told from chance.
TAIL_BYTES = 32
PAGE_BYTES = 4096  # zeros of a whole page inside a weight are none of its values
PADDING_PAGES = 256  # rows of an embedding that no token uses may be zeros; a megabyte of them is a hole
LEAST_VALUES = 64  # of fewer, nothing is said about magnitudes


@dataclass(frozen=True, slots=True)
class _Format:
    """How the values of a dtype are read: NumPy type, mask of the magnitude, the magnitude of infinity, and the magnitudes above
    and below which no weight or scale lies in any number (2^17 and 2^-45); None where a dtype has none."""

    kind: str
    mask: int
    infinity: int | None
    high: int | None
    low: int | None


# FP8 e4m3fn and E8M0 have no infinity, NaN only. A 16-bit float labelled with the wrong name reads as 2^-60, or as 2^100.
_FORMATS = {
    "BF16": _Format("<u2", 0x7FFF, 0x7F80, (127 + 17) << 7, (127 - 45) << 7),
    "F16": _Format("<u2", 0x7FFF, 0x7C00, None, None),
    "F32": _Format("<u4", 0x7FFFFFFF, 0x7F800000, (127 + 17) << 23, (127 - 45) << 23),
    "F8_E4M3": _Format("u1", 0x7F, None, None, None),
    "E8M0": _Format("u1", 0xFF, None, 127 + 17, 127 - 60),
}
_COPY_FIX = "download or copy this file again; if the source has it too, the checkpoint was made wrongly"
_BROKEN_OFF_FIX = "download this file again: a downloader made it in full length first, and the rest never came"
# Biases and the router's correction may be zeros as published.
_MAY_BE_ZERO = (".bias", ".e_score_correction_bias")
# A draft head marks the tokens that it knows, and its ids may be the target's.
_MARKS = ("BOOL", "I64")


@dataclass(slots=True)
class _Seen:
    """What reading one tensor told."""

    entry: TensorEntry
    source: ModuleSource | None
    trailing_zeros: int = 0
    zero_pages: int = 0
    first_zero_page: int = 0

    @property
    def all_zero(self) -> bool:
        return self.trailing_zeros == self.entry.nbytes

    @property
    def may_be_zero(self) -> bool:
        return self.entry.name.endswith(_MAY_BE_ZERO) or self.entry.dtype in _MARKS or not self.entry.nbytes

    @property
    def has_padding(self) -> bool:
        """Whether it has a row for every token, and those of tokens that nobody uses may be zeros."""
        return self.source is not None and self.source.spec.path in ("model.embed_tokens", "lm_head")


@dataclass(slots=True)
class _Reading:
    """Files to read, what is known of their tensors, and the findings."""

    root: Path
    sources: Mapping[str, ModuleSource]
    checkup: Checkup
    hashes: Mapping[str, str]
    done: int = 0
    progress: Callable[[int], None] = lambda _: None
    seen: list[_Seen] = field(default_factory=list)


def check_values(
    root: Path,
    tensors: Mapping[str, TensorEntry],
    sources: Sequence[ModuleSource],
    checkup: Checkup,
    *,
    hashes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Read every tensor and note what no sound checkpoint has.

    Args:
        root: the checkpoint.
        tensors: all of its tensors by name, those that are skipped too.
        sources: the modules, which say how their tensors are read.
        checkup: gets the findings.
        hashes: SHA-256 of files by name, in hexadecimal, where they are known.
        progress: called with (bytes read, bytes to read).
    """
    tensors = {name: entry for name, entry in tensors.items() if entry.is_here}
    owners = {entry.name: source for source in sources for entries in source.parts.values() for entry in entries}
    files: dict[str, list[TensorEntry]] = {}
    for entry in sorted(tensors.values(), key=lambda entry: (entry.file, entry.start)):
        files.setdefault(entry.file, []).append(entry)
    total = sum(entry.nbytes for entry in tensors.values())
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    reading = _Reading(root=root, sources=owners, checkup=checkup, hashes=hashes or {}, progress=count)
    for file, entries in files.items():
        try:
            _check_file(reading, file, entries)
        except OSError as error:
            checkup.error(TensorFileError(f"{file} cannot be read", found=error.strerror, where=file, fix=_COPY_FIX))


def check_other_hashes(root: Path, hashes: Mapping[str, str], checkup: Checkup, *, weights: set[str]) -> None:
    """Check the SHA-256 of files beside the weights, such as the tokenizer's; a file that is not there is none of them."""
    for file, expected in sorted(hashes.items()):
        path = root / file
        if file in weights or not path.is_file():
            continue
        digest = hashlib.sha256()
        with os.fdopen(open_regular(path), "rb") as stream:
            while data := stream.read(PIECE_BYTES):
                digest.update(data)
        _compare_hash(file, expected, digest.hexdigest(), checkup)


def _check_file(reading: _Reading, file: str, entries: list[TensorEntry]) -> None:
    expected = reading.hashes.get(file)
    digest = hashlib.sha256() if expected is not None else None
    if digest is not None:
        with os.fdopen(open_regular(reading.root / file), "rb") as stream:
            digest.update(stream.read(entries[0].start))
    pages = PageHashes.of((reading.root / file).stat().st_size)
    seen = []
    for entry in entries:
        told = _Seen(entry, reading.sources.get(entry.name))
        _read_tensor(reading, told, pages, digest)
        seen.append(told)
        reading.progress(entry.nbytes)
    if digest is not None and expected is not None:
        _compare_hash(file, expected, digest.hexdigest(), reading.checkup)
    broken_from = _check_tail(seen, reading.checkup)
    for told in seen:
        if told.entry.end <= broken_from:
            _check_zeros(told, reading.checkup)
    twice = repeated_pages(reading.root / file, pages, entries)
    if twice is not None:
        reading.checkup.error(
            DamagedWeightsError(
                f"{file}: {twice.count:,} page{'' if twice.count == 1 else 's'} of {pages.page_bytes:,} bytes are there twice",
                expected="other bytes in every page of a weight",
                found=f"byte {twice.offset:,} ({twice.name}) begins as {twice.first_offset:,} ({twice.first_name}) does",
                where=file,
                fix=_COPY_FIX,
            )
        )


def _read_tensor(reading: _Reading, told: _Seen, pages: PageHashes, digest: Any) -> None:
    """Read one tensor, piece by piece, through every check."""
    entry, source = told.entry, told.source
    values = _values_of(entry, source)
    shapes = bytearray() if source is not None and entry.name.endswith(".weight_shape") else None
    position = entry.start
    for piece in _pieces(reading.root, entry):
        octets = np.frombuffer(piece, np.uint8)
        if digest is not None:
            digest.update(piece)
        if shapes is not None:
            shapes += piece
        if values is not None:
            values.add(octets)
        _count_zeros(told, octets, position)
        pages.add(octets, position)
        position += len(octets)
    if values is not None:
        values.judge(reading.checkup)
    if shapes is not None and source is not None:
        _check_shape(bytes(shapes), entry, source, reading.checkup)


def _count_zeros(told: _Seen, octets: NDArray[np.uint8], position: int) -> None:
    words = octets[: len(octets) // PAGE_BYTES * PAGE_BYTES].reshape(-1, PAGE_BYTES).view(np.uint64)
    empty = ~words.any(axis=1)
    if empty.any():
        if not told.zero_pages:
            told.first_zero_page = position + int(empty.argmax()) * PAGE_BYTES
        told.zero_pages += int(np.count_nonzero(empty))
    used = np.flatnonzero(octets[::-1][: 2 * TAIL_BYTES])  # most pieces end in something else
    if not len(used):
        used = np.flatnonzero(octets[::-1])
    told.trailing_zeros = int(used[0]) if len(used) else told.trailing_zeros + len(octets)


def _check_tail(seen: list[_Seen], checkup: Checkup) -> int:
    """Note zeros from somewhere to the end of the file; where they begin, or the end where there are none that tell."""
    whole, start = [], seen[-1].entry.end if seen else 0
    end = start
    partial: _Seen | None = None
    for told in reversed(seen):
        start -= told.trailing_zeros
        if not told.all_zero:
            partial = told if told.trailing_zeros else None
            break
        whole.append(told)
    telling = [told for told in whole if not told.may_be_zero]
    in_partial = partial is not None and not partial.may_be_zero and partial.trailing_zeros >= TAIL_BYTES
    if partial is not None and in_partial and not telling and _is_padding(partial):
        in_partial = False
    if not telling and not in_partial:
        return end
    file = seen[-1].entry.file
    empty = [
        *([partial.entry.name] if partial is not None and partial.trailing_zeros else []),
        *(t.entry.name for t in whole[::-1]),
    ]
    checkup.error(
        DamagedWeightsError(
            f"{file} holds nothing but zeros from byte {start:,} to its end: its download broke off",
            expected=f"{end - start:,} bytes of weights",
            found=f"zeros in {len(empty):,} of its {len(seen):,} tensors, {empty[0]} first",
            where=file,
            fix=_BROKEN_OFF_FIX,
        )
    )
    return start


def _is_padding(told: _Seen) -> bool:
    """Whether the zeros at a tensor's end are whole rows of an embedding, and not most of them."""
    row = told.entry.nbytes // max(told.entry.shape[0], 1) if told.entry.shape else 0
    zeros = told.trailing_zeros
    return bool(told.has_padding and row and zeros % row == 0 and zeros <= told.entry.nbytes // 2)


def _check_zeros(told: _Seen, checkup: Checkup) -> None:
    entry = told.entry
    if told.may_be_zero or told.source is None:
        return
    if told.all_zero:
        checkup.error(
            DamagedWeightsError(
                f"{entry.name} is all zeros",
                expected=f"values of a {told.source.spec.kind}",
                found=f"{entry.describe()}, {entry.nbytes:,} zero bytes from byte {entry.start:,}",
                where=entry.file,
                fix=_COPY_FIX,
            )
        )
    elif told.zero_pages >= (PADDING_PAGES if told.has_padding else 1):
        checkup.error(
            DamagedWeightsError(
                f"{entry.name} has a hole: {told.zero_pages:,} page{'' if told.zero_pages == 1 else 's'} of zeros",
                expected=f"no {PAGE_BYTES:,} bytes of zeros in a {told.source.spec.kind}",
                found=f"zeros from byte {told.first_zero_page:,} of {entry.file}",
                where=entry.file,
                fix=_COPY_FIX,
            )
        )


def _compare_hash(file: str, expected: str, found: str, checkup: Checkup) -> None:
    if found != expected.lower():
        checkup.error(
            DamagedWeightsError(
                f"{file} is not the file that was published",
                expected=f"SHA-256 {expected.lower()}",
                found=f"SHA-256 {found}",
                where=file,
                fix="download this file again",
            )
        )


@dataclass(slots=True)
class _Values:
    """The values of one floating tensor, counted as they come."""

    entry: TensorEntry
    form: _Format
    rest: bytes = b""
    count: int = 0
    nans: int = 0
    infinities: int = 0
    high: int = 0
    low: int = 0
    nonzero: int = 0
    first: int | None = None

    def add(self, octets: NDArray[np.uint8]) -> None:
        width = np.dtype(self.form.kind).itemsize
        data = self.rest + octets.tobytes() if self.rest else octets
        usable = len(data) // width * width
        self.rest = bytes(data[usable:])
        magnitude = np.frombuffer(data[:usable], self.form.kind) & np.asarray(self.form.mask, self.form.kind)
        infinity = self.form.infinity
        odd = magnitude >= (self.form.mask if infinity is None else infinity)
        if odd.any():
            self.first = self.count + int(odd.argmax()) if self.first is None else self.first
            inf = 0 if infinity is None else int(np.count_nonzero(magnitude == infinity))
            self.infinities += inf
            self.nans += int(np.count_nonzero(odd)) - inf
        if self.form.high is not None and self.form.low is not None:
            self.high += int(np.count_nonzero(magnitude >= self.form.high))
            self.nonzero += int(np.count_nonzero(magnitude))
            self.low += int(np.count_nonzero(magnitude < self.form.low)) - (
                len(magnitude) - int(np.count_nonzero(magnitude))
            )
        self.count += len(magnitude)

    def judge(self, checkup: Checkup) -> None:
        """Note values that are not finite, or else magnitudes that no weight has in such numbers."""
        if self.first is not None:
            counts = [f"{n:,} {name}" for n, name in ((self.nans, "NaN"), (self.infinities, "infinite")) if n]
            place = tuple(int(axis) for axis in np.unravel_index(self.first, self.entry.shape))
            checkup.error(
                NotFiniteError(
                    f"{self.entry.name} is not finite",
                    expected=f"{self.count:,} finite values",
                    found=f"{' and '.join(counts)}, the first at {place}",
                    where=self.entry.file,
                    fix=_COPY_FIX,
                )
            )
            return
        large = self.high >= LEAST_VALUES // 4 and self.high * 256 > self.count
        small = self.nonzero >= LEAST_VALUES and self.low * 2 > self.nonzero
        if self.count >= LEAST_VALUES and (large or small):
            found, bound = (self.high, "above 2^17") if large else (self.low, "below 2^-45")
            checkup.error(
                DamagedWeightsError(
                    f"{self.entry.name} has magnitudes that no weight or scale has",
                    expected="values between 2^-45 and 2^17",
                    found=f"{found:,} of {self.count:,} values {bound}: damage, or bytes of another dtype",
                    where=self.entry.file,
                    fix=_COPY_FIX,
                )
            )


def _values_of(entry: TensorEntry, source: ModuleSource | None) -> _Values | None:
    """The counter of a tensor that holds floats; None for codes and for what a text model does not use."""
    if source is None:
        return None
    form: str | None = entry.dtype
    if entry.dtype == "F8_E8M0":
        form = "E8M0"
    elif entry.dtype == "U8" and source.quant is not None and entry.name.endswith(("scales", "weight_scale")):
        form = "F8_E4M3" if source.quant.mode == "nvfp4" else "E8M0"
    return _Values(entry, _FORMATS[form]) if form in _FORMATS else None


def _check_shape(data: bytes, entry: TensorEntry, source: ModuleSource, checkup: Checkup) -> None:
    told = np.frombuffer(data, "<i8" if entry.dtype == "I64" else "<i4").reshape(-1, 2)
    expected = source.spec.shape[-2:]
    wrong = (told != np.asarray(expected)).any(axis=1)
    if wrong.any() and told.any():  # zeros are told of as such
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
    """The bytes of a tensor, a few megabytes at a time, in one buffer that is used again.

    All pieces but the first begin at a multiple of PIECE_BYTES in the file, so that pages of files are whole in them.
    """
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(entry.nbytes, 1))))
    with os.fdopen(open_regular(root / entry.file), "rb", buffering=0) as stream:
        stream.seek(entry.start)
        position = entry.start
        while position < entry.end:
            size = min(entry.end - position, len(buffer), PIECE_BYTES - position % PIECE_BYTES)
            filled = 0
            while filled < size:
                count = stream.readinto(buffer[filled:size])
                if not count:
                    raise OSError(0, "the file ended early")
                filled += count
            position += size
            yield buffer[:size]
