"""Files that are on this disk, whole or cut, read by the byte ranges of the whole file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.checkpoint.safetensors_io import MAX_HEADER_BYTES, WHOLE_HEADER, WHOLE_SHA256
from exo_kimi.checkpoint.text_files import open_regular
from exo_kimi.errors import NotHeldError

PIECE_BYTES = 1 << 20
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """A file of this disk, and which ranges of the whole file it holds.

    Args:
        path: of the file.
        size: bytes of the whole file.
        head: first bytes of the whole file that are known apart from `ranges`: its header, of a cut file.
        ranges: (first byte in the whole file, one past the last, first byte here), ascending.
        sha256: of the whole file, as a cut one notes it.
        names: tensors of a cut file.
    """

    path: Path
    size: int
    head: bytes
    ranges: tuple[tuple[int, int, int], ...]
    sha256: str | None = None
    names: frozenset[str] = frozenset()

    @property
    def is_whole(self) -> bool:
        """Whether every byte is here."""
        return not self.head

    @classmethod
    def open(cls, path: Path) -> HeldFile:
        """Look at a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is a weight file whose header is damaged.
        """
        with os.fdopen(open_regular(path), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if path.suffix != ".safetensors":
                return cls(path=path, size=size, head=b"", ranges=((0, size, 0),))
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > min(MAX_HEADER_BYTES, size):
                raise ValueError("no header")
            raw = json.loads(stream.read(length))
        text = (raw.get("__metadata__") or {}).get(WHOLE_HEADER)
        if text is None:
            return cls(path=path, size=size, head=b"", ranges=((0, size, 0),))
        whole = json.loads(text)
        head = len(text.encode()).to_bytes(_LENGTH_BYTES, "little") + text.encode()
        ranges = []
        for name, fields in raw.items():
            if name != "__metadata__":
                start, end = whole[name]["data_offsets"]
                here = _LENGTH_BYTES + length + fields["data_offsets"][0]
                ranges.append((len(head) + start, len(head) + end, here))
        ends = [fields["data_offsets"][1] for name, fields in whole.items() if name != "__metadata__"]
        return cls(
            path=path,
            size=len(head) + max(ends, default=0),
            head=head,
            ranges=_merged(sorted(ranges)),
            sha256=raw["__metadata__"].get(WHOLE_SHA256),
            names=frozenset(raw) - {"__metadata__"},
        )

    def holds(self, start: int, end: int) -> bool:
        """Whether all bytes [start, end) of the whole file are here."""
        return self._places(start, end) is not None

    def read(self, start: int, end: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes | memoryview]:
        """The bytes [start, end) of the whole file, in pieces; each lasts until the next one is asked for.

        Raises:
            NotHeldError: some are not here.
            OSError: they cannot be read, or the file was cut off meanwhile.
        """
        places = self._places(start, end)
        if places is None:
            raise NotHeldError(
                f"{self.path.name} is here in part, without the bytes that were asked for",
                expected=f"bytes {start:,} to {end:,}",
                where=self.path.parent,
            )
        buffer = memoryview(bytearray(min(piece_bytes, end - start)))
        descriptor = open_regular(self.path)
        try:
            for place, count in places:
                if place is None:
                    yield self.head[start : start + count]
                    continue
                for offset in range(0, count, piece_bytes):
                    wanted = min(piece_bytes, count - offset)
                    piece = buffer[:wanted]
                    if os.preadv(descriptor, [piece], place + offset) < wanted:
                        raise OSError(errno.EIO, "the file ends early", str(self.path))
                    yield piece
        finally:
            os.close(descriptor)

    def _places(self, start: int, end: int) -> list[tuple[int | None, int]] | None:
        """Where the bytes lie, as (first byte here, count), None in place of it for those of `head`; None where some do not."""
        found: list[tuple[int | None, int]] = []
        position = start
        if position < len(self.head):
            count = min(end, len(self.head)) - position
            found.append((None, count))
            position += count
        for first, last, here in self.ranges:
            if position >= end:
                break
            if first <= position < last:
                count = min(end, last) - position
                found.append((here + position - first, count))
                position += count
        return found if position >= end else None


def _merged(ranges: list[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    merged: list[tuple[int, int, int]] = []
    for start, end, here in ranges:
        if merged and merged[-1][1] == start and merged[-1][2] + start - merged[-1][0] == here:
            merged[-1] = (merged[-1][0], end, merged[-1][2])
        elif end > start:
            merged.append((start, end, here))
    return tuple(merged)
