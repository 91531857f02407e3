"""A ZeroMQ socket in an asyncio loop, read when its file descriptor says so; a frame is a list of byte parts.

`zmq.asyncio` makes a future, and several turns of the loop, of every frame. A token takes as many hops as there are stages and
one more, so here a frame is taken in the callback that hears of it, and sent in the call that hands it over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import zmq
import zmq.asyncio

from exo_kimi.runtime.transport.link import Part

_AT_ONCE = 64  # frames taken before others have their turn


def plain_socket(context: zmq.asyncio.Context, kind: int) -> zmq.Socket[bytes]:
    """A socket of a context of `zmq.asyncio`, which is not one of `zmq.asyncio` itself and ends with the context."""
    # The context's types know only its own class of sockets.
    return cast("zmq.Socket[bytes]", context.socket(kind, socket_class=cast(Any, zmq.Socket)))


class ReadySocket:
    """Frames go to a callback as they come, from the loop that runs when this is made.

    Args:
        socket: not of `zmq.asyncio`; this closes it.
        on_frame: takes the parts of each frame; the parts are not copied.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_frame: Callable[[list[Part]], None]) -> None:
        self.raw = socket
        self._on_frame = on_frame
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.get(zmq.FD))
        self._open = True
        self._loop.add_reader(self._fd, self._drain)
        # The descriptor tells of changes only: what came before this is not one.
        self._loop.call_soon(self._drain)

    def send(self, parts: Sequence[Part]) -> None:
        """Queue a frame.

        Raises:
            zmq.ZMQError: the queue is full, or nobody is there.
        """
        try:
            self.raw.send_multipart(parts, flags=zmq.NOBLOCK)
        finally:
            # Sending looks at the descriptor too, and takes away its news of what came.
            if int(self.raw.get(zmq.EVENTS)) & zmq.POLLIN:
                self._loop.call_soon(self._drain)

    def take_rest(self) -> None:
        """Take every frame that has come, now."""
        while self._take():
            pass

    def close(self) -> None:
        """Stop reading and close the socket; idempotent."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            self.raw.close(linger=0)

    def _drain(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._take():
                return
        self._loop.call_soon(self._drain)

    def _take(self) -> bool:
        if not self._open or self.raw.closed:  # closed with its context, perhaps
            return False
        try:
            frames = self.raw.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        self._on_frame([frame.buffer for frame in frames])
        return True
