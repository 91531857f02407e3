"""Byte ranges of checkpoint files, read straight into memory that somebody else owns.

Linux makes a page when it is first touched, each at the price of an exception. One call that makes many ready is a fifth
cheaper, and the bytes that follow find the pages in the processor's cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np

from exo_kimi.checkpoint.index import TensorEntry
from exo_kimi.checkpoint.manifest import not_here
from exo_kimi.checkpoint.tensor_files import TensorFiles

READ_BYTES = 16 * 1024**2
"""Most bytes of one read: progress moves that often, and macOS refuses reads over 2 GiB."""

READERS = 4
"""Reads at a time: what memory and fast disks can take, one processor cannot copy."""

AHEAD = 16
"""Reads that are waited for later."""

READ_PIECES = 512
"""Most destinations of one read; systems allow 1,024."""

READY_BYTES = 1024**2 if sys.platform == "linux" else None
"""As much at a time as a processor's cache holds; None where memory is not made ready."""

FEWEST_BYTES = 64 * 1024
"""Less is not worth a call."""

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of linux/mman.h, since Linux 5.14."""


class TensorReader:
    """Open files of one checkpoint directory. A context manager; files are opened when first needed.

    Args:
        directory: the checkpoint directory.
        on_read: called with the number of bytes after each read.
    """

    def __init__(self, directory: Path, on_read: Callable[[int], None] | None = None) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._on_read = on_read
        self._files = TensorFiles(directory)
        self._pending: deque[Future[int]] = deque()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()

    def read_into(self, destination: memoryview, entry: TensorEntry, skip_bytes: int = 0) -> None:
        """Fill `destination` (writable, contiguous bytes) from a tensor's bytes, from `skip_bytes` on.

        Raises:
            TensorFileError: the file is gone, cannot be read, or is shorter than its header said.
        """
        self._finish_all(self._submit([destination], entry, skip_bytes))

    def read_scattered(self, destinations: Sequence[memoryview], entry: TensorEntry) -> None:
        """Fill several destinations with a tensor's bytes, in order, some of them only by the next `wait`.

        Raises:
            TensorFileError: see `read_into`.
        """
        self._pending.extend(self._submit(destinations, entry, 0))
        self._finish_all(self._pending.popleft() for _ in range(len(self._pending) - AHEAD))

    def wait(self) -> None:
        """Until everything is read.

        Raises:
            TensorFileError: see `read_into`.
        """
        self._finish_all(self._pending.popleft() for _ in range(len(self._pending)))

    def _submit(self, destinations: Sequence[memoryview], entry: TensorEntry, skip_bytes: int) -> list[Future[int]]:
        if not entry.is_here:
            raise not_here(self.directory, (entry,))
        descriptor = self._files.descriptor(entry)
        return [
            self._pool.submit(self._fill, descriptor, pieces, position, entry)
            for pieces, position in _batches(destinations, entry.start + skip_bytes, READ_BYTES)
        ]

    def _finish_all(self, reads: Iterable[Future[int]]) -> None:
        for read in reads:
            count = read.result()
            self.bytes_read += count
            if self._on_read is not None:
                self._on_read(count)

    def _fill(self, descriptor: int, pieces: Sequence[memoryview], position: int, entry: TensorEntry) -> int:
        """Fill pieces from a position of a file; returns their bytes."""
        return sum(
            self._fill_now(descriptor, step, start, entry)
            for step, start in _batches(pieces, position, READY_BYTES or READ_BYTES)
        )

    def _fill_now(self, descriptor: int, pieces: Sequence[memoryview], position: int, entry: TensorEntry) -> int:
        waiting, start = list(pieces), position
        make_ready(waiting)
        while waiting:
            try:
                count = os.preadv(descriptor, waiting, position)
            except OSError as failure:
                raise self._files.unreadable(entry, failure) from failure
            if count == 0:
                raise self._files.cut(entry, position)
            position += count
            while waiting and count >= len(waiting[0]):
                count -= len(waiting.pop(0))
            if waiting:
                waiting[0] = waiting[0][count:]
        return position - start

    def read(self, entry: TensorEntry) -> bytearray:
        """All bytes of a small tensor.

        Raises:
            TensorFileError: see `read_into`.
        """
        data = bytearray(entry.nbytes)
        self.read_into(memoryview(data), entry)
        return data


def _batches(
    destinations: Sequence[memoryview], position: int, most_bytes: int
) -> Iterator[tuple[list[memoryview], int]]:
    """Destinations cut into reads, each with its position in the file."""
    batch: list[memoryview] = []
    size = 0
    for destination in destinations:
        rest = destination
        while len(rest):
            piece, rest = rest[: most_bytes - size], rest[most_bytes - size :]
            batch.append(piece)
            size += len(piece)
            if size == most_bytes or len(batch) == READ_PIECES:
                yield batch, position
                position += size
                batch, size = [], 0
    if batch:
        yield batch, position


def make_ready(pieces: Sequence[memoryview]) -> None:
    """Give pages to memory that is about to be written; what it holds stays as it is."""
    if READY_BYTES is None:
        return
    for piece in pieces:
        if len(piece) >= FEWEST_BYTES:
            address = np.frombuffer(piece, np.uint8).ctypes.data
            first = address // mmap.PAGESIZE * mmap.PAGESIZE
            # A refusal (an older Linux) changes nothing: pages then come one by one, as they are written.
            _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(address + len(piece) - first), POPULATE_WRITE)


@cache
def _madvise() -> Callable[..., int]:
    found: Callable[..., int] = ctypes.CDLL(None).madvise
    return found
