"""Cores that do not fall asleep while something is measured.

Ours waits asleep and mlx-lm's ring waits spinning. A virtual machine gives a core that sleeps to others, and what wakes on it
next runs up to 1.6 times slower for a while (measured here: 0.72 ms of a fixed product became 1.18). So one process per core
spins at the lowest priority there is, beside both sides alike: it gives way to whatever wants to run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_SPIN = """
import os, sys
core, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {core})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep every core that this process may use awake, where Linux allows it; elsewhere do nothing."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    command = [sys.executable, "-I", "-S", "-c", _SPIN]
    quiet = subprocess.DEVNULL
    # In this session: the kernel shares time out between sessions first, and by priority within each.
    spinning = [
        subprocess.Popen([*command, str(core), str(os.getpid())], stdin=quiet, stdout=quiet, stderr=quiet)
        for core in cores
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
        for process in spinning:
            process.wait()
