"""Reads past the page cache, which would fill memory with bytes that are held in slots, or that nobody asks for soon.

On Linux such a read takes whole blocks into memory of its own (O_DIRECT) and copies what was asked for; on a Mac the
descriptor alone is told (F_NOCACHE).

Measured on Linux (2 cores, a virtual disk, pieces of 2 MiB of a file that is not in the cache): 1.8 GB/s past the cache, 1.1 GB/s
through it, and 2.5 GB/s from it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from exo_kimi.errors import UsageError

logger = logging.getLogger(__name__)

ExpertReads = Literal["auto", "cached", "direct"]
EXPERT_READS: tuple[ExpertReads, ...] = get_args(ExpertReads)
DEFAULT_READS: ExpertReads = "auto"

BLOCK_BYTES = 4096
BUFFER_BYTES = 8 * 1024**2 + 2 * BLOCK_BYTES

CACHED_SHARE = 0.5
"""Of the bytes that may be read, how many must fit in free memory for the page cache to be of use: with h of the reads from it, a
byte takes h / 2.5 + (1 - h) / 1.1 through the cache and 1 / 1.8 past it, which are equal at h = .7; popular experts are read more
often, so half of the bytes make more than half of the reads."""

F_NOCACHE: int = getattr(fcntl, "F_NOCACHE", 48)
"""Of macOS's fcntl.h."""

Read = Callable[[int, Sequence[memoryview], int], int]


def check_reads(name: str) -> None:
    """Refuse what is no way of reading.

    Raises:
        UsageError: with those that there are.
    """
    if name not in EXPERT_READS:
        raise UsageError("no such way of reading experts", expected=", ".join(EXPERT_READS), found=repr(name))


def is_direct(reads: str, *, streamed_bytes: int, free_bytes: int) -> bool:
    """Whether experts are to be read past the page cache.

    Args:
        reads: see `ExpertReads`; `auto` asks whether the cache could hold enough of them.
        streamed_bytes: of all experts that have no slot.
        free_bytes: of memory, once slots are there.

    Raises:
        UsageError: no such way of reading.
    """
    check_reads(reads)
    return reads == "direct" or (reads == "auto" and free_bytes < CACHED_SHARE * streamed_bytes)


class DirectReader:
    """Files of one directory, open for reads past the page cache; safe to use from several threads.

    Args:
        directory: of the files.

    Attributes:
        works: whether the file system takes part; once it does not, reads are the caller's again.
    """

    def __init__(self, directory: Path) -> None:
        self.works = True
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._buffers = threading.local()
        self._direct_flag: int = getattr(os, "O_DIRECT", 0)

    def open(self, file: str) -> None:
        """Open a file, unless it is, or the file system refuses."""
        if not self.works or file in self._descriptors:
            return
        try:
            descriptor = os.open(self._directory / file, os.O_RDONLY | os.O_CLOEXEC | self._direct_flag)
            self._descriptors[file] = descriptor
            if not self._direct_flag:
                fcntl.fcntl(descriptor, F_NOCACHE, 1)
        except OSError as failure:
            self._give_up(failure)

    def read(self, preadv: Read, file: str, views: Sequence[memoryview], position: int) -> int | None:
        """As `os.preadv`; None where the file system does not read this way.

        Args:
            preadv: reads.
            file: by name.
            views: where the bytes go, at most 8 MiB in all.
            position: of the first byte.

        Raises:
            OSError: the read failed.
        """
        if not self.works:
            return None
        try:
            if not self._direct_flag:
                return preadv(self._descriptors[file], views, position)
            return self._read_blocks(preadv, self._descriptors[file], views, position)
        except OSError as failure:
            if failure.errno != errno.EINVAL:
                raise
            self._give_up(failure)
            return None

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read_blocks(self, preadv: Read, descriptor: int, views: Sequence[memoryview], position: int) -> int:
        start = position - position % BLOCK_BYTES
        wanted = position - start + sum(map(len, views))
        buffer = self._buffer()[: -(-wanted // BLOCK_BYTES) * BLOCK_BYTES]
        count = min(preadv(descriptor, [buffer], start), wanted) - (position - start)
        source, left = buffer[position - start :], max(0, count)
        for view in views:
            piece = min(len(view), left)
            view[:piece] = source[:piece]
            source, left = source[piece:], left - piece
        return count

    def _buffer(self) -> memoryview:
        """Of this thread, at the start of a page."""
        found: Any = getattr(self._buffers, "view", None)
        if found is None:
            found = self._buffers.view = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        return memoryview(found)

    def _give_up(self, failure: OSError) -> None:
        if self.works:
            self.works = False
            logger.warning("experts are read through the page cache: %s: %s", self._directory, failure.strerror)
