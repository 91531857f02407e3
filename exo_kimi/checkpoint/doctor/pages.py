"""Pages of a file that are there twice, as a downloader leaves them that writes a part to the wrong place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from exo_kimi.checkpoint.safetensors_io import TensorEntry
from exo_kimi.checkpoint.text_files import open_regular

SMALL_FILE_BYTES = 64 * 2**20
_SMALL_PAGE_BYTES, _PAGE_BYTES = 4096, 65_536
_PERIOD_BYTES = 64  # a page that repeats itself after so many bytes is a constant, and two of them are no damage


@dataclass(slots=True)
class PageHashes:
    """A hash of every whole page of a file that lies in one tensor: eight bytes for each 64 KiB."""

    page_bytes: int
    weights: NDArray[np.uint64]
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    offsets: list[NDArray[np.int64]] = field(default_factory=list)

    @classmethod
    def of(cls, file_bytes: int) -> PageHashes:
        """For a file of that size: small files have small pages."""
        page = _SMALL_PAGE_BYTES if file_bytes <= SMALL_FILE_BYTES else _PAGE_BYTES
        random = np.random.default_rng(0)  # any odd numbers do: the sum of products is a hash modulo 2^64
        return cls(page, random.integers(0, 1 << 63, page // 8, np.uint64) * np.uint64(2) + np.uint64(1))

    def add(self, octets: NDArray[np.uint8], position: int) -> None:
        """Bytes of one tensor, from that position of the file on."""
        skip = -position % self.page_bytes
        count = max(len(octets) - skip, 0) // self.page_bytes
        if not count:
            return
        words = octets[skip : skip + count * self.page_bytes].tobytes()  # aligned to words
        pages = np.frombuffer(words, np.uint64).reshape(count, -1)
        self.hashes.append((pages * self.weights).sum(axis=1, dtype=np.uint64))
        self.offsets.append(position + skip + np.arange(count, dtype=np.int64) * self.page_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedPages:
    """How many pages of a file are copies of earlier ones, and one of them with what it is a copy of."""

    count: int
    offset: int
    name: str
    first_offset: int
    first_name: str


def repeated_pages(path: Path, pages: PageHashes, entries: Sequence[TensorEntry]) -> RepeatedPages | None:
    """The pages that are there twice; None where there are none.

    Constants do not count, nor do tensors of one size that are equal as far as they can be compared, such as a head that is
    the embedding.

    Args:
        path: the file.
        pages: hashes of its pages.
        entries: its tensors, by their place.
    """
    if not pages.hashes:
        return None
    hashes, offsets = np.concatenate(pages.hashes), np.concatenate(pages.offsets)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = offsets[first][inverse]
    copies = np.flatnonzero(earlier < offsets)
    starts = np.array([entry.start for entry in entries], np.int64)
    found: list[tuple[int, int]] = []
    with os.fdopen(open_regular(path), "rb", buffering=0) as stream:
        for copy in copies:
            pair = int(offsets[copy]), int(earlier[copy])
            one, other = (entries[int(np.searchsorted(starts, offset, side="right")) - 1] for offset in pair)
            if one.nbytes == other.nbytes and pair[0] - one.start == pair[1] - other.start:
                continue
            data, again = (_page(stream, offset, pages.page_bytes) for offset in pair)
            if data == again and not _is_constant(data):
                found.append(pair)
    if not found:
        return None
    offset, first_offset = found[0]
    names = [entries[int(np.searchsorted(starts, at, side="right")) - 1].name for at in found[0]]
    return RepeatedPages(count=len(found), offset=offset, name=names[0], first_offset=first_offset, first_name=names[1])


def _page(stream: IO[bytes], offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _is_constant(data: bytes) -> bool:
    return data[:-_PERIOD_BYTES] == data[_PERIOD_BYTES:]
