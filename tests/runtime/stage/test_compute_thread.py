"""What a stage process says of its work."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np

from exo_kimi.runtime.stage.compute_thread import Order, StageCompute, StageStatus, read_at
from exo_kimi.runtime.stage.memory import FreeMemory
from exo_kimi.runtime.steps import Step


def test_a_loaded_stage_tells_its_bytes_seconds_and_gigabytes_per_second() -> None:
    assert read_at(1_200_000_000, 0.4) == "1.2 GB in 400 ms, 3.0 GB/s"
    assert read_at(0, 0.4) == "which it held already"


def test_memory_is_looked_at_once_steps_leave_time_for_it_and_twice_a_second_when_they_do_not() -> None:
    backend: Any = mock.Mock()
    looks: list[float] = []
    backend.memory.side_effect = lambda: looks.append(time.monotonic()) or (7, 9)
    backend.held.side_effect = lambda: (0, backend.execute.call_count)
    backend.execute.side_effect = lambda step: time.sleep(0.01)
    status = StageStatus(free=FreeMemory(free_bytes=1, scope="host"), newest_epoch=1)
    orders: SimpleQueue[Order] = SimpleQueue()
    compute = StageCompute(backend, status, lambda message: None)
    thread = threading.Thread(target=compute.run, args=(orders,))
    thread.start()
    step = Step(epoch=1, step_id=0, segments=(), tokens=np.zeros(0, np.int32))
    for _ in range(100):
        orders.put(step)
    until_s = time.monotonic() + 20
    while status.sequences < 100 and time.monotonic() < until_s:
        time.sleep(0.01)
    orders.put(None)
    thread.join()
    assert (status.sequences, status.active_bytes, status.peak_bytes) == (100, 7, 9)
    assert 2 <= len(looks) < 50
    assert backend.execute.call_count == 100
