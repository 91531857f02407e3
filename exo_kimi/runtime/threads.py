"""Threads whose start returns or raises also where the machine refuses them memory."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

START_S = 5.0


def start_daemon(run: Callable[[], object], *, name: str) -> threading.Event:
    """Run a function in a thread that no process waits for at its end.

    `threading.Thread.start` waits for its thread without an end, and a thread that had no memory for its first call never
    says that it began.

    Args:
        run: what the thread does.
        name: of the thread.

    Returns:
        An event that is set when `run` has ended.

    Raises:
        RuntimeError: the thread was refused, in Python's own words, which `machine_error` knows.
    """
    started, ended = threading.Event(), threading.Event()

    def body() -> None:
        started.set()
        threading.current_thread().name = name
        try:
            run()
        finally:
            ended.set()

    _thread.start_new_thread(body, ())
    if not started.wait(START_S):
        raise RuntimeError("can't start new thread (it had no memory to begin)")
    return ended
