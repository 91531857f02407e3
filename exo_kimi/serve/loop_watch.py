"""A watch over the event loop from outside: one that is stuck for good ends the process, for something to start it again.

What blocks a loop for good is nobody's plan (CPython's `Thread.start` waits for ever for a thread that had no memory to begin,
for one), and a server that accepts connections and answers none is worse than none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time

from exo_kimi.runtime.threads import start_daemon

STUCK_S = 60.0

log = logging.getLogger(__name__)


class LoopWatch:
    """A context in which a thread looks whether a loop still turns.

    Args:
        loop: runs in the thread that enters the context.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched = threading.get_ident()
        self._turned_s = time.monotonic()
        self._left = threading.Event()

    def __enter__(self) -> LoopWatch:
        start_daemon(self._watch, name="loop-watch")
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _turn(self) -> None:
        self._turned_s = time.monotonic()

    def _watch(self) -> None:
        interval_s = STUCK_S / 12
        looked_s = time.monotonic()
        while not self._left.wait(interval_s):
            now_s = time.monotonic()
            if now_s - looked_s > 2 * interval_s:
                self._turned_s += now_s - looked_s  # this thread was suspended as well
            looked_s = now_s
            if now_s - self._turned_s > STUCK_S:
                log.critical("the server has been stuck for %.0f s in %s: ended", STUCK_S, self._where())
                os._exit(1)  # stages end when their socket pair closes
            try:
                self._loop.call_soon_threadsafe(self._turn)
            except RuntimeError:  # the loop is closed
                return

    def _where(self) -> str:
        frame = sys._current_frames().get(self._watched)
        return "an unknown place" if frame is None else f"{frame.f_code.co_filename}, line {frame.f_lineno}"
