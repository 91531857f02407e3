"""A file that is being fetched: what has come of it, and a journal that says so after any kill.

Bytes are written first and counted after, so what the journal counts is there. That holds while the machine runs; after a
crash of the machine the bytes may be lost though they were counted, so a part without a SHA-256 to judge it begins again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from exo_kimi.fetch.held import HeldFile
from exo_kimi.fetch.targets import FileTarget

PIECE_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_WRITE_BYTES = 1 << 18  # of one call: Linux looks for larger pages for more, at three times the time
_COUNT_BYTES = 8
_ID_BYTES = 32


@dataclass(frozen=True, slots=True)
class FetchPiece:
    """Some bytes of one request: `length` from `source_start` of the source's file go to `here` of the part."""

    number: int
    source_start: int
    here: int
    length: int


class PartFile:
    """One target while it is fetched. Pieces may be written by several threads, each piece by one.

    Args:
        target: what it will be.
        directory: of the finished file.
        work: where part and journal lie meanwhile, on the same disk.
        revision: of the listing that the target comes from.
        skeleton: directory of the headers and texts that were read for planning; None where none was.

    What a cut file of the same name in `directory` has, and what the skeleton has, is copied and not fetched.

    Raises:
        OSError: the files cannot be made.
    """

    def __init__(
        self, target: FileTarget, directory: Path, work: Path, *, revision: str, skeleton: Path | None = None
    ) -> None:
        held = held_before(target, directory, skeleton)
        self.target = target
        self.final_path = directory / target.file.name
        self.path = work / f"{target.file.name}.part"
        self._journal_path = _journal_path(target, work)
        self.pieces = _pieces(target, held)
        self._done = [0] * len(self.pieces)
        self._lock = threading.Lock()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._go_on(_identity(target, self.pieces, revision))
        for each in held:
            self._take_from(each)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to come."""
        return self.target.fetch_bytes - sum(self._done)

    def done_of(self, piece: FetchPiece) -> int:
        """Bytes of a piece that are here."""
        return self._done[piece.number]

    def write(self, piece: FetchPiece, data: bytes | memoryview) -> None:
        """Write what came of a piece, after what is here of it.

        Raises:
            OSError: the disk does not take it.
        """
        _write_at(self._file, data, piece.here + self._done[piece.number])
        count = self._done[piece.number] + len(data)
        _write_at(self._journal, count.to_bytes(_COUNT_BYTES, "little"), _ID_BYTES + piece.number * _COUNT_BYTES)
        with self._lock:
            self._done[piece.number] = count

    def _take_from(self, held: HeldFile) -> None:
        """Copy pieces that a file has that is there: a cut one that is to grow, or a text or a header in the cache."""
        for piece in self.pieces:
            start, end = piece.source_start + self.done_of(piece), piece.source_start + piece.length
            if start < end and held.holds(start, end):
                for data in held.read(start, end):
                    self.write(piece, data)

    def sha256(self) -> str:
        """Of the whole part."""
        return file_sha256(self.path)

    def sha256_of(self, pieces: Sequence[FetchPiece]) -> str:
        """Of some pieces, one after another."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            for piece in pieces:
                stream.seek(piece.here)
                for offset in range(0, piece.length, _READ_BYTES):
                    digest.update(stream.read(min(_READ_BYTES, piece.length - offset)))
        return digest.hexdigest()

    def finish(self) -> None:
        """Put the file where it belongs; only now its name is there.

        Raises:
            OSError: the disk does not take it.
        """
        os.fsync(self._file)
        self.close()
        self.path.replace(self.final_path)
        self._journal_path.unlink(missing_ok=True)

    def begin_again(self) -> None:
        """Drop what has come.

        Raises:
            OSError: the disk does not take it.
        """
        with self._lock:
            self._done = [0] * len(self.pieces)
        _write_at(self._journal, bytes(_COUNT_BYTES * len(self.pieces)), _ID_BYTES)

    def close(self) -> None:
        """Close the files; idempotent."""
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = -1

    def _go_on(self, identity: bytes) -> None:
        """Take up what is here of this part, or begin it."""
        journal_bytes = _ID_BYTES + _COUNT_BYTES * len(self.pieces)
        journal = os.pread(self._journal, journal_bytes + 1, 0)
        found = _counts(journal, identity, self.pieces)
        if found is not None and os.fstat(self._file).st_size == self.target.size:
            self._done = found
            return
        # The identity comes last: a journal that has it is one of this part.
        os.ftruncate(self._journal, 0)
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self.target.size)
        _write_at(self._file, self.target.head, 0)
        os.ftruncate(self._journal, journal_bytes)
        _write_at(self._journal, identity, 0)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def held_before(target: FileTarget, directory: Path, skeleton: Path | None) -> list[HeldFile]:
    """Files of this disk that may have some of a target: one in its place, and what was read of it for planning.

    Raises:
        OSError, ValueError: see `HeldFile.open`.
    """
    places = [root / target.file.name for root in (directory, skeleton) if root is not None]
    return [HeldFile.open(place) for place in places if place.exists()]


def missing_bytes(target: FileTarget, work: Path, held: Sequence[HeldFile], *, revision: str) -> int:
    """Bytes of a target that must come from its source, where a `PartFile` of it were made."""
    pieces, journal = _pieces(target, held), _journal_path(target, work)
    found = _counts(journal.read_bytes() if journal.exists() else b"", _identity(target, pieces, revision), pieces)
    return sum(
        piece.length - done
        for piece, done in zip(pieces, found or [0] * len(pieces), strict=True)
        if not any(each.holds(piece.source_start + done, piece.source_start + piece.length) for each in held)
    )


def _journal_path(target: FileTarget, work: Path) -> Path:
    return work / f"{target.file.name}.journal"


def _identity(target: FileTarget, pieces: Sequence[FetchPiece], revision: str) -> bytes:
    """Equal for parts that may be gone on with."""
    file = target.file
    content = file.sha256 or file.git_sha1
    boot = "" if target.is_whole and content else _boot()
    text = f"{file.name} {file.size} {content or revision} {pieces} {boot}"
    return hashlib.sha256(text.encode() + target.head).digest()


def _counts(journal: bytes, identity: bytes, pieces: Sequence[FetchPiece]) -> list[int] | None:
    """What a journal says of each piece; None where it is another part's, or none."""
    end = _ID_BYTES + _COUNT_BYTES * len(pieces)
    if len(journal) != end or journal[:_ID_BYTES] != identity:
        return None
    counts = (journal[start : start + _COUNT_BYTES] for start in range(_ID_BYTES, end, _COUNT_BYTES))
    found = [int.from_bytes(count, "little") for count in counts]
    return found if all(count <= piece.length for count, piece in zip(found, pieces, strict=True)) else None


def _pieces(target: FileTarget, held: Sequence[HeldFile]) -> tuple[FetchPiece, ...]:
    """The ranges in pieces, none of which is in part at the source, or in part in a file that is there."""
    bounds = {bound for start, end in target.file.held or () for bound in (start, end)}
    for each in held:
        bounds |= {len(each.head), *(bound for start, end, _ in each.ranges for bound in (start, end))}
    pieces: list[FetchPiece] = []
    here = len(target.head)
    for first, last in target.ranges:
        between = sorted(bound for bound in bounds if first < bound < last)
        for start, end in pairwise((first, *between, last)):
            for position in range(start, end, PIECE_BYTES):
                length = min(PIECE_BYTES, end - position)
                pieces.append(FetchPiece(len(pieces), position, here, length))
                here += length
    return tuple(pieces)


def _boot() -> str:
    """Equal for as long as the machine runs without a restart."""
    linux = Path("/proc/sys/kernel/random/boot_id")
    if linux.exists():
        return linux.read_text().strip()
    found = subprocess.run(["/usr/sbin/sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view[:_WRITE_BYTES], position)
        view, position = view[count:], position + count
