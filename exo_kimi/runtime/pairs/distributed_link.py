"""A link whose largest parts, the hidden states, go over `mx.distributed`; everything else goes over the link below it.

A frame is announced on the link below before its last part is sent, so nobody waits in MLX for what may never come: an idle
pair does not spin, and a part that was announced and does not come is a stuck peer.

    link below   [mark and size] [part] ... [last part but one]
    link helper  [last part]
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from exo_kimi.errors import RuntimeFault, StageUnreachableError
from exo_kimi.runtime.pairs.link_helper_client import LinkHelper
from exo_kimi.runtime.transport.link import Link, Part

_MARK = b"\0"  # no JSON header begins with it


def announce(parts: Sequence[Part]) -> tuple[list[Part], Part]:
    """A frame without its last part, announced, and that part."""
    size = memoryview(parts[-1]).nbytes
    return [_MARK + size.to_bytes(8, "little"), *parts[:-1]], parts[-1]


def announced_bytes(parts: Sequence[Part]) -> int | None:
    """Size of the part that is still to come, by itself; None for a frame that is whole."""
    head = bytes(parts[0][:9]) if parts else b""
    return int.from_bytes(head[1:], "little") if len(head) == 9 and head[:1] == _MARK else None


class DistributedLink:
    """The sending end.

    Args:
        below: carries announcements, and what is said beside.
        helper: carries last parts; rank 0.
        deadline_s: for each part.
    """

    def __init__(self, below: Link, helper: LinkHelper, *, deadline_s: float) -> None:
        self.address = below.address
        self._below = below
        self._helper = helper
        self._deadline_s = deadline_s
        self._parts: asyncio.Queue[Part] = asyncio.Queue()
        self._pump = asyncio.create_task(self._carry())

    def send(self, parts: Sequence[Part]) -> None:
        """Queue a frame. Raises StageUnreachableError when either way is lost."""
        if self._pump.done():
            raise self._lost()
        frame, last = announce(parts)
        self._below.send(frame)
        self._parts.put_nowait(last)

    async def receive(self) -> list[Part]:
        """The next frame of the link below. Raises StageUnreachableError once either way is lost."""
        reading = asyncio.create_task(self._below.receive())
        try:
            await asyncio.wait([reading, self._pump], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise self._lost()
        finally:
            reading.cancel()

    def close(self) -> None:
        """Drop both ways; idempotent."""
        self._pump.cancel()
        self._helper.close()
        self._below.close()

    async def _carry(self) -> None:
        while True:
            part = await self._parts.get()
            if memoryview(part).nbytes:
                await self._helper.send(part, deadline_s=self._deadline_s)

    def _lost(self) -> StageUnreachableError:
        if not self._pump.cancelled() and isinstance(error := self._pump.exception(), StageUnreachableError):
            return error
        return StageUnreachableError("the connection was lost", where=self.address)


class PartCollector:
    """The receiving end: puts announced frames together again, in order.

    Args:
        making: the helper, being made; rank 1.
        deadline_s: for each part.
        take: takes every whole frame.
        lose: takes the reason when the way is lost.
    """

    def __init__(
        self,
        making: Awaitable[LinkHelper],
        *,
        deadline_s: float,
        take: Callable[[list[Part]], None],
        lose: Callable[[RuntimeFault], None],
    ) -> None:
        self._making = making
        self._deadline_s = deadline_s
        self._take = take
        self._lose = lose
        self._frames: asyncio.Queue[tuple[list[Part], int]] = asyncio.Queue()
        self._helper: LinkHelper | None = None
        self._work = asyncio.create_task(self._collect())

    def put(self, parts: list[Part], size_bytes: int) -> None:
        """A frame that was announced, with its mark."""
        self._frames.put_nowait((parts[1:], size_bytes))

    def close(self) -> None:
        """End the link helper; idempotent."""
        self._work.cancel()
        if self._helper is not None:
            self._helper.close()

    async def _collect(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            try:
                self._helper = await self._making
                while True:
                    parts, size = await self._frames.get()
                    last = await self._helper.receive(size, deadline_s=self._deadline_s) if size else b""
                    self._take([*parts, last])
            except RuntimeFault as fault:
                self._lose(fault)
