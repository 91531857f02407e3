"""What keeps cores awake gives way to everything else, and ends with the measurement."""

import os
import subprocess
import sys
import time

import pytest

from exo_kimi.bench.setups.awake import awake

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the lowest priority that gives way")


def children() -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, name in rows if int(parent) == os.getpid() and name != "ps"]


def test_one_process_per_core_spins_at_the_lowest_priority_and_none_is_left() -> None:
    before = children()
    with awake():
        found = [pid for pid in children() if pid not in before]
        assert len(found) == len(os.sched_getaffinity(0))
        until_s = time.monotonic() + 10
        while {os.sched_getscheduler(pid) for pid in found} != {os.SCHED_IDLE}:
            assert time.monotonic() < until_s
            time.sleep(0.02)
    assert children() == before


def test_none_is_left_after_an_error() -> None:
    before = children()
    with pytest.raises(KeyError), awake():
        raise KeyError("x")
    assert children() == before
