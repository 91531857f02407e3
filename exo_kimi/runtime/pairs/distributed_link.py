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
    """The sending end of a pair, a Link.

    Args:
        below: carries announcements, and every other message.
        helper: carries last parts; rank 0 of the pair.
        deadline_s: seconds that a part may take.
    """

    def __init__(self, below: Link, helper: LinkHelper, *, deadline_s: float) -> None:
        self.address = below.address
        self._below = below
        self._helper = helper
        self._deadline_s = deadline_s
        self._parts: asyncio.Queue[Part] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send_parts())

    def send(self, parts: Sequence[Part]) -> None:
        """Queue a frame. Raises StageUnreachableError when either way is lost."""
        if self._sending.done():
            raise self._lost()
        frame, last = announce(parts)
        self._below.send(frame)
        self._parts.put_nowait(last)

    async def receive(self) -> list[Part]:
        """The next frame of the link below. Raises StageUnreachableError once either way is lost."""
        reading = asyncio.create_task(self._below.receive())
        try:
            await asyncio.wait([reading, self._sending], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise self._lost()
        finally:
            reading.cancel()

    def close(self) -> None:
        """Drop both ways; idempotent."""
        self._sending.cancel()
        self._helper.close()
        self._below.close()

    async def _send_parts(self) -> None:
        while True:
            part = await self._parts.get()
            if memoryview(part).nbytes:
                await self._helper.send(part, deadline_s=self._deadline_s)

    def _lost(self) -> StageUnreachableError:
        if not self._sending.cancelled() and isinstance(error := self._sending.exception(), StageUnreachableError):
            return error
        return StageUnreachableError("the connection was lost", where=self.address)


class PartCollector:
    """The receiving end of a pair: puts announced frames together again, in order.

    Args:
        making: the helper, being made; rank 1.
        deadline_s: for each part.
        on_frame: takes the parts of every whole frame.
        on_lost: takes the reason when the pair is lost.
    """

    def __init__(
        self,
        making: Awaitable[LinkHelper],
        *,
        deadline_s: float,
        on_frame: Callable[[list[Part]], None],
        on_lost: Callable[[RuntimeFault], None],
    ) -> None:
        self._making = making
        self._deadline_s = deadline_s
        self._on_frame = on_frame
        self._on_lost = on_lost
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
                    self._on_frame([*parts, last])
            except RuntimeFault as fault:
                self._on_lost(fault)
