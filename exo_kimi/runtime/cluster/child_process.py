"""A local stage process: started, watched and ended by the leader.

The two ends of a socket pair tie them together: the key goes in, the bound address comes out, and when the parent's end
closes, for whatever reason, the child ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import stat
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from exo_kimi.errors import StageDiedError
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ClusterKey

logger = logging.getLogger(__name__)
STAGE_COMMAND = (sys.executable, "-m", "exo_kimi.runtime.stage")
START_DEADLINE_S = 120.0  # a cold import of MLX from a slow disk
_FIXES: dict[int, str] = {
    signal.SIGKILL: "the system kills what takes too much memory: see its log, and give the stage fewer layers",
    signal.SIGSEGV: "MLX on a CPU ends so when memory runs out: give the stage fewer layers, or a smaller --context",
}
END_S = 5.0
LEFT_S = 3600.0  # an empty directory of sockets that nobody touched for so long was left by a server that was killed
_KEPT_LINES = 20
_SHOWN_LINES = 3
_CHUNK_BYTES = 1 << 16
_MAX_DIRECTORY_CHARACTERS = 80


class ChildProcess:
    """A running stage process; made by `start`.

    Args:
        process: the process.
        tie: this side of the socket pair.
        name: in front of its lines in the log.
    """

    def __init__(self, process: asyncio.subprocess.Process, tie: socket.socket, name: str) -> None:
        self._process = process
        self._tie = tie
        self._name = name
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        stderr = cast(asyncio.StreamReader, process.stderr)  # a pipe, see `start`
        self._reading = asyncio.create_task(self._read_lines(stderr))

    @classmethod
    async def start(
        cls, listen: str, *, key: ClusterKey | None, name: str, command: Sequence[str] = STAGE_COMMAND
    ) -> tuple[ChildProcess, Address]:
        """Start a stage process and wait until it listens.

        Args:
            listen: where it is to listen.
            key: for its link to a stage on another machine.
            name: in front of its lines in the log.
            command: what to run; `--listen` and `--parent-fd` are added.

        Raises:
            StageDiedError: it ended, or did not listen in time.
            OSError: it cannot be started now.
        """
        tie, theirs = socket.socketpair()
        tie.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--listen",
                    listen,
                    "--parent-fd",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    process_group=0,  # the terminal's Ctrl-C is for the leader, which ends its children in order
                )
        except BaseException:
            tie.close()  # a process that was started all the same ends with it
            raise
        child = cls(process, tie, name)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                address = await child._exchange_key(key)
        except TimeoutError:
            await child.end(grace_s=0)
            raise StageDiedError(f"{name} did not start in {START_DEADLINE_S:g} s", found=child._last_words()) from None
        except BaseException:
            await child.end(grace_s=0)
            raise
        return child, address

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def died(self) -> StageDiedError:
        """Wait for the process to end, and tell how it did."""
        code = await self._process.wait()
        await asyncio.wait([self._reading], timeout=1.0)
        what = f"{self._name} ended with exit code {code}"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            what = f"{self._name} was killed by signal {-code} ({name})"
        return StageDiedError(what, found=self._last_words(), fix=_FIXES.get(-code))

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self, *, grace_s: float) -> None:
        """Close the tie and wait for the end; after the grace, by force."""
        self._tie.close()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self._reading.cancel()

    async def _exchange_key(self, key: ClusterKey | None) -> Address:
        loop = asyncio.get_running_loop()
        secret = None if key is None else [key.secret.decode(), key.explicit]
        answer = b""
        try:
            await loop.sock_sendall(self._tie, json.dumps(secret).encode() + b"\n")
            while not answer.endswith(b"\n"):
                received = await loop.sock_recv(self._tie, 4096)
                if not received:
                    raise ConnectionResetError
                answer += received
        except ConnectionError:
            await self.end(grace_s=END_S)  # it may live and wait for what was not sent
            raise await self.died() from None
        return parse_address(json.loads(answer)["address"], option="the stage process's address")

    async def _read_lines(self, stderr: asyncio.StreamReader) -> None:
        rest = b""
        # Not readline: a line longer than its limit would end the reading, and a full pipe would stop the child.
        while chunk := await stderr.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _CHUNK_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                logger.info("%s: %s", self._name, text)

    def _last_words(self) -> str | None:
        return " | ".join(list(self._lines)[-_SHOWN_LINES:]) or None


def socket_directory() -> Path:
    """A new directory that only this user can enter, under a path short enough for the name of a socket."""
    directory = Path(tempfile.mkdtemp(prefix="exo-kimi-"))
    if len(str(directory)) > _MAX_DIRECTORY_CHARACTERS:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="exo-kimi-", dir="/tmp"))
    with contextlib.suppress(OSError):
        _remove_left_behind(directory.parent)
    return directory


def _remove_left_behind(parent: Path) -> None:
    """Remove such directories that killed servers left empty. One that is in use after all is made again (`ensure_private`)."""
    for entry in os.scandir(parent):
        if re.fullmatch(r"exo-kimi-[a-z0-9_]{8}", entry.name) is None or not entry.is_dir(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # another user's, or not empty
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_S:
                Path(entry.path).rmdir()


def ensure_private(directory: Path) -> None:
    """Make a directory of `socket_directory` again if it was deleted.

    Raises:
        OSError: it cannot be made.
        StageDiedError: another user made it meanwhile.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077 or not stat.S_ISDIR(found.st_mode):
        raise StageDiedError("the folder of the stages' sockets is another user's now", where=directory)
