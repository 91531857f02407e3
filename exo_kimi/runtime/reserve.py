"""Memory that a machine has left, and what of it is kept free for steps beside weights and caches: leader and stages reckon it
alike."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
MOST_RUNNING = 128
"""Sequences that hold caches at a time, at most."""
MOST_WAITING = 16
"""Positions of a sequence whose features wait for a draft head, at most."""
MOST_WAITING_ROWS = MOST_RUNNING * MOST_WAITING
"""Of all sequences, where no plan has room for fewer."""
RESERVE_FRACTION = 0.1
MIN_SCRATCH_BYTES = 64 * 2**20
MAX_SCRATCH_BYTES = 2 * 2**30
MAX_RESERVE_BYTES = 4 * 2**30  # activations of a prefill chunk and MLX's buffer cache; K2 needs about 2 GiB


def reserve_bytes(free_bytes: int) -> int:
    """What is kept of a machine's free memory for the steps of all its stages: a tenth, up to MAX_RESERVE_BYTES.

    Args:
        free_bytes: on the machine, after the weights are loaded.
    """
    return min(MAX_RESERVE_BYTES, int(free_bytes * RESERVE_FRACTION))


def default_scratch_bytes(free_bytes: int) -> int:
    """What a stage's steps may take beside weights and caches when no plan says it: half of the reserve, for a neighbour on
    the machine may take the other half, up to MAX_SCRATCH_BYTES and not below MIN_SCRATCH_BYTES.

    Args:
        free_bytes: on the machine, after the weights are loaded.
    """
    return max(MIN_SCRATCH_BYTES, min(MAX_SCRATCH_BYTES, reserve_bytes(free_bytes) // 2))


def host_free_bytes() -> int:
    """MemAvailable of Linux, or less where the container has a limit; elsewhere half of the memory there is. Any thread may
    call it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free_bytes = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free_bytes = min(free_bytes, max(0, int(text) - int(used.read_text())))
    return free_bytes
