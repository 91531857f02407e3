"""A stage's end of its link helper process (see `link_helper`): a helper that misses a deadline is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
from collections.abc import Awaitable

from exo_kimi.errors import StageUnreachableError
from exo_kimi.runtime.pairs.pairing import LENGTH_BYTES, Pair
from exo_kimi.runtime.transport.link import Part

LINK_HELPER_COMMAND = (sys.executable, "-m", "exo_kimi.runtime.pairs.link_helper")
_BUFFER_BYTES = 8 << 20  # a prefill chunk of K2 takes 7 MB


class LinkHelper:
    """A running link helper process; made by `start`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        name: str,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._name = name

    @property
    def pid(self) -> int:
        """Process id of the link helper."""
        return self._process.pid

    @classmethod
    async def start(cls, pair: Pair, rank: int, *, deadline_s: float) -> LinkHelper:
        """Start a link helper and wait until its group is made.

        Raises:
            StageUnreachableError: it is not made before the deadline, or cannot be.
        """
        tie, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    *LINK_HELPER_COMMAND,
                    "--pair",
                    pair.to_json(),
                    "--rank",
                    str(rank),
                    "--fd",
                    str(theirs.fileno()),
                    "--deadline",
                    str(math.ceil(deadline_s) + 1),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,
            )
        reader, writer = await asyncio.open_connection(sock=tie, limit=_BUFFER_BYTES)
        helper = cls(process, reader, writer, f"{pair.backend} link {pair.sender} > {pair.receiver}")
        try:
            line = await helper._within(deadline_s, reader.readuntil(b"\n"))
            error = json.loads(line)["error"]
            if error is not None:
                raise StageUnreachableError(f"the {helper._name} cannot be made", found=error)
        except BaseException:
            helper.close()
            raise
        return helper

    async def send(self, data: Part, *, deadline_s: float) -> None:
        """Hand bytes over and wait until they are sent.

        Raises:
            StageUnreachableError: not before the deadline, or never; the link helper is gone.
        """
        self._writer.write(memoryview(data).nbytes.to_bytes(LENGTH_BYTES, "little"))
        self._writer.write(data)
        await self._within(deadline_s, self._sent())

    async def receive(self, size_bytes: int, *, deadline_s: float) -> bytes:
        """Bytes that the other side was told to send.

        Raises:
            StageUnreachableError: not before the deadline, or never; the link helper is gone.
        """
        self._writer.write(size_bytes.to_bytes(LENGTH_BYTES, "little"))
        return await self._within(deadline_s, self._reader.readexactly(size_bytes))

    def close(self) -> None:
        """End the link helper, whatever it is doing; idempotent."""
        self._writer.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()

    async def _sent(self) -> bytes:
        await self._writer.drain()
        return await self._reader.readexactly(1)

    async def _within(self, deadline_s: float, work: Awaitable[bytes]) -> bytes:
        try:
            async with asyncio.timeout(deadline_s):
                return await work
        except TimeoutError:
            self.close()
            raise StageUnreachableError(
                f"the {self._name} is stuck", expected=f"an answer in {deadline_s:g} s", found="none"
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            self.close()
            raise StageUnreachableError(
                f"the {self._name} was lost", found=f"exit code {self._process.returncode}"
            ) from None
