"""What goes wrong during a soak, one trouble after the other: each is done, held for a while, and taken back."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from exo_kimi.bench.soak.clients import CHAT
from exo_kimi.bench.soak.server import SoakServer

SMALL_DISK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Trouble:
    """A name, and what is done; it returns when all is as before, but for what the server must mend itself."""

    name: str
    act: Callable[[], None]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 8 MB, mounted in `folder` while the context lasts; None where this user may mount none."""
    mounted = folder / "disk"
    mounted.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES},mode=700", "none", str(mounted)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], capture_output=True, check=False)


class Troubles:
    """All of them, for one server.

    Args:
        server: whom they befall.
        generator: of choices.
        disk: the small file system that prefixes are written to; None leaves full disks out.
        stall_s: the server's deadline of silence.
    """

    def __init__(self, server: SoakServer, generator: random.Random, *, disk: Path | None, stall_s: float) -> None:
        self._server = server
        self._generator = generator
        self._disk = disk
        self._stall_s = stall_s
        self._unread: list[tuple[float, socket.socket]] = []
        self.left_out: list[str] = []

    def all(self) -> list[Trouble]:
        """Those that this system allows."""
        found = [
            Trouble("kill -9 of a stage", self._kill),
            Trouble("a stage frozen for longer than the deadline", self._freeze),
            Trouble("a stage frozen for a moment", self._pause),
            Trouble("the server itself frozen for 3 s", self._freeze_server),
            Trouble("300 half-open connections", self._half_open),
            Trouble("readers that read nothing", self._not_reading),
        ]
        if hasattr(resource, "prlimit"):
            found.append(Trouble("no descriptor left for 3 s, and a stage killed", self._few_descriptors))
        else:
            self.left_out.append("few descriptors (this system has no prlimit)")
        if self._disk is not None:
            found.append(Trouble("a full disk for 5 s, and a stage killed", self._full_disk))
        else:
            self.left_out.append("full disks (this user may not mount a small one)")
        return found

    def close(self) -> None:
        """Let go of connections that nobody read."""
        for _, connection in self._unread:
            connection.close()

    def _a_stage(self) -> int | None:
        pids = self._server.stage_pids()
        return self._generator.choice(pids) if pids else None

    def _kill(self) -> None:
        self._signal_stage(signal.SIGKILL)

    def _freeze(self) -> None:
        self._signal_stage(signal.SIGSTOP)
        time.sleep(self._stall_s + 1)

    def _pause(self) -> None:
        if (pid := self._a_stage()) is not None:
            _signal(pid, signal.SIGSTOP)
            time.sleep(self._stall_s / 4)
            _signal(pid, signal.SIGCONT)

    def _freeze_server(self) -> None:
        _signal(self._server.process.pid, signal.SIGSTOP)
        time.sleep(3)
        _signal(self._server.process.pid, signal.SIGCONT)

    def _few_descriptors(self) -> None:
        """The limit is the lowest number that is free: whatever is opened fails."""
        pid = self._server.process.pid
        try:
            taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            return
        lowest = min(set(range(len(taken) + 1)) - taken)
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            self._kill()
            time.sleep(3)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    def _full_disk(self) -> None:
        assert self._disk is not None
        filler = self._disk / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1 << 16))
            self._kill()
            time.sleep(5)
        finally:
            filler.unlink(missing_ok=True)

    def _half_open(self) -> None:
        with contextlib.ExitStack() as opened:
            for number in range(300):
                with contextlib.suppress(OSError):
                    connection = opened.enter_context(self._connect())
                    connection.sendall(b"GET /hea" if number % 2 else _post(b"", length=1000))
            time.sleep(2)

    def _not_reading(self) -> None:
        """Connections that stay until the server ends them, or for two minutes."""
        kept = []
        for opened_s, connection in self._unread:
            if time.monotonic() - opened_s > 120:
                connection.close()
            else:
                kept.append((opened_s, connection))
        self._unread = kept
        more = {"stream": True, "max_tokens": 2000, "logprobs": True, "top_logprobs": 20}
        body = json.dumps({"messages": [{"role": "user", "content": "go on"}], **more}).encode()
        for _ in range(2):
            with contextlib.suppress(OSError):
                connection = self._connect()
                connection.sendall(_post(body, length=len(body)))
                self._unread.append((time.monotonic(), connection))

    def _connect(self) -> socket.socket:
        address = urlsplit(self._server.url)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect((address.hostname, address.port))
        return connection

    def _signal_stage(self, number: int) -> None:
        if (pid := self._a_stage()) is not None:
            _signal(pid, number)


def _post(body: bytes, *, length: int) -> bytes:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )
    return head.encode() + body


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
