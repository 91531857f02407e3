"""One shard while it is written: pieces in any order from any thread, read again and hashed behind the writing."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exo_kimi.compress.output.shards import OutputShard
from exo_kimi.errors import TensorFileError

STEP_BYTES = 32 * 2**20
"""Of a shard, from its beginning without a gap: as soon as so many more are written, they are verified."""

_BLOCK_BYTES = 2**20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    crc: int


class ShardFile:
    """A shard that is being written, at any place and from any thread.

    What is written from the beginning without a gap is verified by the thread of `behind` meanwhile, so that little is left to
    do after the last piece.

    Args:
        shard: what it will hold.
        descriptor: of the file.
        path: of the file.
        behind: one thread, which verifies.
        progress: called with the bytes of each piece.
    """

    def __init__(
        self,
        shard: OutputShard,
        descriptor: int,
        path: Path,
        *,
        behind: ThreadPoolExecutor,
        progress: Progress | None = None,
    ) -> None:
        self.shard = shard
        self._descriptor = descriptor
        self._path = path
        self._behind = behind
        self._progress = progress
        self._sizes = {tensor.name: tensor.nbytes for tensor in shard.tensors}
        self._lock = threading.Lock()
        self._early: dict[int, _Piece] = {}  # behind a gap, by their first byte
        self._pieces: list[_Piece] = []  # without a gap, in order
        self._asked = 0
        self._verifying: list[Future[None]] = []
        self._digest, self._verified, self._position = hashlib.sha256(), 0, 0  # of the thread behind

    def put(self, name: str, data: Any, *, at: int = 0) -> None:
        """Write bytes of a tensor.

        Args:
            name: of the tensor.
            data: whatever has a contiguous buffer: bytes, a memoryview, a NumPy array.
            at: first byte inside the tensor.

        Raises:
            KeyError, ValueError: the shard has no such tensor, the bytes do not lie inside it, or are there already.
            OSError: they cannot be written.
        """
        view = data if isinstance(data, memoryview) else memoryview(_bytes_of(data))
        view = view.cast("B") if view.nbytes else view
        if at < 0 or at + len(view) > self._sizes[name]:
            raise ValueError(f"{name}: bytes {at} to {at + len(view)} of {self._sizes[name]}")
        start = self.shard.starts[name] + at
        self._write(view, start)

    def put_header(self) -> None:
        """Write what stands before the tensors."""
        self._write(memoryview(self.shard.header), 0)

    def settle(self) -> str:
        """Have everything on the disk and verified; called in the thread behind, or when that has nothing to do.

        Returns:
            The file's SHA-256.

        Raises:
            ValueError: bytes that nobody wrote: a defect of the caller.
            TensorFileError: the disk gives back other bytes.
            OSError: it cannot be read or written.
        """
        for done in self._verifying:
            done.result()
        end = self._end
        if self._early:
            raise ValueError(f"{self.shard.file}: nobody wrote bytes {end} to {min(self._early)}")
        if end != self.shard.file_bytes:
            raise ValueError(f"{self.shard.file}: nobody wrote bytes {end} to {self.shard.file_bytes}")
        self._verify(end)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Wait until nothing uses the file any more."""
        for future in self._verifying:
            future.cancel()
        wait(self._verifying)

    def _write(self, view: memoryview, start: int) -> None:
        position, rest = start, view
        while len(rest):
            count = os.pwrite(self._descriptor, rest, position)
            position, rest = position + count, rest[count:]
        crc = zlib.crc32(view)
        with self._lock:
            if len(view):
                self._note(_Piece(start, position, crc))
            if self._progress is not None:
                self._progress(len(view))

    @property
    def _end(self) -> int:
        """One past the last byte before the first gap."""
        return self._pieces[-1].end if self._pieces else 0

    def _note(self, piece: _Piece) -> None:
        if piece.start in self._early or piece.start < self._end:
            raise ValueError(f"{self.shard.file}: bytes {piece.start} to {piece.end} were written twice")
        self._early[piece.start] = piece
        while (following := self._early.pop(self._end, None)) is not None:
            self._pieces.append(following)
        if self._end - self._asked >= STEP_BYTES:
            self._asked = self._end
            self._verifying.append(self._behind.submit(self._verify, self._end))

    def _verify(self, end: int) -> None:
        """Read the file again from where the last call stopped, and compare it with what was given."""
        os.fsync(self._descriptor)
        with self._path.open("rb", buffering=0) as stream:
            _read_from_disk(stream.fileno(), self._position, end)
            stream.seek(self._position)
            while self._position < end:
                piece = self._pieces[self._verified]
                self._compare(stream.read, piece)
                self._verified += 1

    def _compare(self, read: Callable[[int], bytes], piece: _Piece) -> None:
        crc = 0
        while self._position < piece.end:
            block = read(min(_BLOCK_BYTES, piece.end - self._position))
            if not block:
                break
            self._digest.update(block)
            crc = zlib.crc32(block, crc)
            self._position += len(block)
        if crc != piece.crc or self._position != piece.end:
            raise TensorFileError(
                "the disk gave back other bytes than were written",
                expected=f"crc32 {piece.crc:08x} of bytes {piece.start:,} to {piece.end:,}",
                found=f"{crc:08x}",
                where=self._path,
                fix="the disk or its cable is not to be trusted: write to another one",
            )


def _bytes_of(data: Any) -> Any:
    """What has a buffer that memoryview takes: NumPy has none for bfloat16 and the like."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else data


def _read_from_disk(descriptor: int, start: int, end: int) -> None:
    """Have the next reads of these bytes come from the disk, not from the memory that was written."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
