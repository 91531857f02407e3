"""What a stage process says of its work."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import pytest

from exo_kimi.errors import StageError
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


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("error", "traced"), [(OSError(24, "Too many open files"), False), (KeyError("bug"), True)])
def test_what_the_machine_refuses_is_a_line_in_the_log_and_a_bug_is_traced(
    caplog: pytest.LogCaptureFixture, error: Exception, traced: bool, wrapped: bool
) -> None:
    def execute(step: Step) -> None:
        if wrapped:
            raise StageError("a step failed") from error
        raise error

    backend: Any = mock.Mock()
    backend.memory.return_value, backend.held.return_value = (7, 9), (0, 0)
    backend.execute.side_effect = execute
    orders: SimpleQueue[Order] = SimpleQueue()
    said: list[Any] = []
    compute = StageCompute(
        backend, StageStatus(free=FreeMemory(free_bytes=1, scope="host"), newest_epoch=1), said.append
    )
    for order in (Step(epoch=1, step_id=0, segments=(), tokens=np.zeros(0, np.int32)), None):
        orders.put(order)
    compute.run(orders)
    assert len(said) == 1
    assert ("Traceback" in caplog.text) == traced
    assert wrapped or error.args[-1] in str(said[0])
