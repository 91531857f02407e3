"""How fast a disk gives what streamed experts ask of it: reads of their size, in no order, by several threads, past the cache."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

FILE_BYTES = 2 << 30
RECORD_BYTES = 16 << 20
"""Of K2 an expert is 17 to 25 MB in 3 to 4 bits."""
READERS = 8
"""As `experts.store.READERS`."""
KEPT_FREE = 2
"""The file is at most one part in so many of what is free."""
LEAST_RECORDS = 8
F_NOCACHE = 48
"""Of macOS: `fcntl` with it reads and writes past the cache. Source: sys/fcntl.h."""


def read_speed(directory: Path, *, file_bytes: int = FILE_BYTES, record_bytes: int = RECORD_BYTES) -> float | None:
    """Bytes per second; None where the disk is too full, or cannot be read past the cache, as one in memory.

    Args:
        directory: on the disk; a file is written there, and removed.
        file_bytes: of the file, less where little is free.
        record_bytes: of a read, in whole pages.
    """
    records = min(file_bytes, shutil.disk_usage(directory).free // KEPT_FREE) // record_bytes
    if records < LEAST_RECORDS:
        return None
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".exo-kimi-disk-") as file:
        _write(file.fileno(), records, record_bytes)
        descriptor = _past_the_cache(file.name)
        if descriptor is None:
            return None
        try:
            order = list(range(records))
            Random(0).shuffle(order)
            start_s = time.perf_counter()
            with ThreadPoolExecutor(READERS) as pool:
                shares = [order[reader::READERS] for reader in range(READERS)]
                read = sum(pool.map(lambda share: _read(descriptor, share, record_bytes), shares))
            return read / (time.perf_counter() - start_s)
        finally:
            os.close(descriptor)


def _write(descriptor: int, records: int, record_bytes: int) -> None:
    """Bytes that no disk can compress, in the file and on the disk."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, F_NOCACHE, 1)
    for _ in range(records):
        os.write(descriptor, os.urandom(record_bytes))
    os.fsync(descriptor)


def _past_the_cache(path: str) -> int | None:
    if sys.platform == "darwin":
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.fcntl(descriptor, F_NOCACHE, 1)
        return descriptor
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # as of a file system in memory
        return None


def _read(descriptor: int, records: Sequence[int], record_bytes: int) -> int:
    with mmap.mmap(-1, record_bytes) as page_aligned, memoryview(page_aligned) as view:
        return sum(os.preadv(descriptor, [view], number * record_bytes) for number in records)
