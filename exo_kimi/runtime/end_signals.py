"""Ctrl-C and SIGTERM, heard by a thread of their own; after the first, the process ends within a deadline whatever runs.

Python runs its signal handlers in the main thread, between two of its instructions: never while that thread waits in C for a
product of MLX, a slow disk or a name server. The interpreter's C handler writes to a descriptor at once; a thread reads it here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from exo_kimi.runtime.threads import start_daemon

END_S = 4.5  # after the first signal
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_START = 0  # no signal's number

logger = logging.getLogger(__name__)


class EndSignals:
    """A context in which the first signal asks for the end and starts a deadline; that, or a second signal, ends the process.

    Outside the main thread, where signals are not ours, it does nothing.

    Args:
        in_main: handles a signal in the main thread, when that has the time; None does nothing there.
    """

    def __init__(self, in_main: Callable[[int, Any], Any] | None = None) -> None:
        self._in_main = in_main or (lambda *_: None)
        self._why = ""
        self._former: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._asked = False
        self._on_first: Callable[[], object] | None = None

    def __enter__(self) -> EndSignals:
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._former_descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            for number in _NUMBERS:
                self._former[number] = signal.signal(number, self._in_main)
            start_daemon(self._listen, name="end-signals")
        return self

    def __exit__(self, *_: object) -> None:
        if self._former:
            for number, former in self._former.items():
                signal.signal(number, former)
            signal.set_wakeup_fd(self._former_descriptor)
            os.close(self._writing)  # the thread reads the end and leaves

    def on_first(self, act: Callable[[], object]) -> None:
        """Have a function called at the first signal, in the listening thread; at once if that came already."""
        with self._lock:
            self._on_first = act
            asked = self._asked
        if asked:
            act()

    def start(self, why: str) -> None:
        """Start the deadline without a signal. A process that it ends has failed and says why."""
        if self._former:
            self._why = why
            with contextlib.suppress(OSError):
                os.write(self._writing, bytes([_START]))

    def _listen(self) -> None:
        begun = False
        with os.fdopen(self._reading, "rb", buffering=0) as reading:
            while True:
                if begun and not select.select([reading], [], [], END_S)[0]:
                    why = self._why or "ended"
                    logger.warning("%s (work that cannot be interrupted still ran after %.1f s)", why, END_S)
                    self._end(1 if self._why else 0)
                received = reading.read(64)
                if not received:
                    return
                for number in received:
                    if number in _NUMBERS and self._asked:
                        self._end(1)
                    if number in _NUMBERS:
                        self._ask()
                    begun = begun or number in _NUMBERS or number == _START

    def _ask(self) -> None:
        with self._lock:
            self._asked = True
            act = self._on_first
        if act is not None:
            act()

    def _end(self, status: int) -> None:
        # The lock of a stream may be held by the thread that does not end.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(RuntimeError):  # no thread is left
                start_daemon(partial(_flush, stream), name="flush").wait(0.2)
        os._exit(status)  # stages end when their socket pair closes


def _flush(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
