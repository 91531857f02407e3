"""Memory made ready to be written, where the system has a call for it; it knows nothing of whose memory it is.

Linux makes a page when it is first touched, each at the price of an exception. One call for many is a fifth cheaper, and the
bytes that follow find the pages in the processor's cache.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

READY_BYTES = 1024**2 if sys.platform == "linux" else None
"""As much at a time as a processor's cache holds; None where memory is not made ready."""

FEWEST_BYTES = 64 * 1024
"""Less is not worth a call."""

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of linux/mman.h, since Linux 5.14."""


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
