"""The render processes of this process, started as they are needed; one that computes or grows without end is killed."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NoReturn

from exo_kimi.checkpoint.rendering.messages import (
    LENGTH_BYTES,
    MAX_ANSWER_BYTES,
    RenderFailure,
    RenderLimits,
    pack_request,
    unpack_answer,
)
from exo_kimi.errors import OverloadedError

COMMAND = (sys.executable, "-m", "exo_kimi.checkpoint.rendering.process")
MAX_PROCESSES = 12  # so many templates that never end leave room for the next
KEPT_PROCESSES = 2
WAIT_S = 30.0  # for a place
WALL_S = 120.0  # more than any processor time, for a process that is stopped
_SLOW_S = 0.25  # from then on it gets less of the machine, and its memory is looked at where the kernel does not
_LOOK_S = 0.1
_CHUNK_BYTES = 2**20


class RenderPool:
    """Render processes, to be used from any thread.

    Args:
        limits: of each rendering.
        resident_bytes: tells the memory of a process where the kernel holds no limit of it; None where it does.
    """

    def __init__(
        self, limits: RenderLimits | None = None, *, resident_bytes: Callable[[int], int] | None = None
    ) -> None:
        self._limits = limits or RenderLimits()
        self._resident_bytes = resident_bytes
        self._lock = threading.Lock()
        self._idle: list[_RenderProcess] = []
        self._places = threading.BoundedSemaphore(MAX_PROCESSES)
        self._owner = os.getpid()

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template with these variables.

        Raises:
            RenderFailure: there is none, or it would have taken too long or too much memory.
            OverloadedError: too many renderings are under way.
        """
        try:
            request = pack_request(source, variables, self._limits)
        except ValueError:
            raise RenderFailure("failed", "the messages are nested too deep, or hold what is no JSON") from None
        with self._process() as process:
            answer = process.ask(request, self._resident_bytes, self._limits.of(len(request))[1])
        try:
            return unpack_answer(answer)
        except (ValueError, TypeError):
            raise RenderFailure("failed", "the render process answered nonsense") from None

    def close(self) -> None:
        """End the processes that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    @contextlib.contextmanager
    def _process(self) -> Iterator[_RenderProcess]:
        """A process of one's own for a while; one that fails is ended."""
        if not self._places.acquire(timeout=WAIT_S):
            raise OverloadedError(
                "too many chat templates are at work",
                code="overloaded",
                found=f"{MAX_PROCESSES} renderings, each over {WAIT_S:g} s",
                fix="try again later",
            )
        process = None
        try:
            process = self._take()
            yield process
        except BaseException:
            if process is not None:
                process.end()
            raise
        else:
            self._give_back(process)
        finally:
            self._places.release()

    def _take(self) -> _RenderProcess:
        with self._lock:
            if self._owner != os.getpid():  # after a fork, the processes are the parent's
                self._owner, self._idle = os.getpid(), []
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                process.end()
        return _RenderProcess()

    def _give_back(self, process: _RenderProcess) -> None:
        with self._lock:
            if len(self._idle) < KEPT_PROCESSES:
                self._idle.append(process)
                return
        process.end()


class _RenderProcess:
    """One process, which answers one request at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            process_group=0,  # the terminal's Ctrl-C is for us; it ends when its stdin does
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def ask(self, request: bytes, resident_bytes: Callable[[int], int] | None, most_bytes: int) -> bytes:
        """Its answer.

        Args:
            request: of `pack_request`.
            resident_bytes: tells its memory, if somebody must look.
            most_bytes: of memory.

        Raises:
            RenderFailure: it was ended, by its limits or by us.
        """
        try:
            self._write(len(request).to_bytes(LENGTH_BYTES, "little"))
            self._write(request)
        except BrokenPipeError:
            self._fail()
        watch = _Watch(self._process.pid, resident_bytes, most_bytes)
        length = int.from_bytes(self._read(LENGTH_BYTES, watch), "little")
        if length > MAX_ANSWER_BYTES:
            raise RenderFailure("limit", f"it writes {length} bytes")
        return self._read(length, watch)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._input.write(left[:_CHUNK_BYTES]) :]

    def _read(self, count: int, watch: _Watch) -> bytes:
        data = bytearray()
        while len(data) < count:
            if not select.select([self._output], [], [], watch.next_s())[0]:
                watch.look()
            elif piece := self._output.read(min(_CHUNK_BYTES, count - len(data))):
                data += piece
            else:
                self._fail()
        return bytes(data)

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            raise RenderFailure("limit", "it computes without end")
        if code == -signal.SIGKILL:
            raise RenderFailure("limit", "the system ended its process, as it does when memory runs out")
        raise RenderFailure("failed", f"its process ended with code {code}")


class _Watch:
    """Looks after a rendering that takes long.

    Args:
        pid: of its process.
        resident_bytes: as `RenderPool`.
        most_bytes: of memory.
    """

    def __init__(self, pid: int, resident_bytes: Callable[[int], int] | None, most_bytes: int) -> None:
        self._pid = pid
        self._resident_bytes = resident_bytes
        self._most_bytes = most_bytes
        self._begun_s = time.monotonic()
        self._slow = False

    def next_s(self) -> float:
        """Seconds until the next look."""
        return _LOOK_S if self._slow else _SLOW_S

    def look(self) -> None:
        """Raises:
        RenderFailure: it has too much memory, or takes for ever.
        """
        if not self._slow:
            self._slow = True
            with contextlib.suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, self._pid, 10)
        if self._resident_bytes is not None and self._resident_bytes(self._pid) > self._most_bytes:
            raise RenderFailure("limit", "it takes too much memory")
        if time.monotonic() - self._begun_s > WALL_S:
            raise RenderFailure("limit", f"it takes over {WALL_S:g} s")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, as `ps` tells it; 0 when there is none."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return int(told) * 1024 if told.strip().isdigit() else 0


@cache
def shared_pool() -> RenderPool:
    """The one of this process, ended with it."""
    pool = RenderPool(resident_bytes=None if sys.platform == "linux" else resident_bytes)
    atexit.register(pool.close)
    return pool
