"""A small control channel: JSON objects between one listener and its peers, authenticated and encrypted by the cluster key.

A frame is one part, a JSON object of less than 1 MiB. Connections are ZeroMQ links as between stages.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import zmq.asyncio

from exo_kimi.errors import AddressError, ExoKimiError, ProtocolError
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.link import Part
from exo_kimi.runtime.transport.zmq_link import connect
from exo_kimi.runtime.transport.zmq_listener import ZmqListener

logger = logging.getLogger(__name__)
BIND_S = 10.0  # the process that listened there before may be about to end
BIND_AGAIN_S = 0.5
MOST_BYTES = 1 << 20
Message = Mapping[str, Any]


class ControlListener:
    """The listening side; lives on the event loop that made it.

    Args:
        context: for its socket.
        listen: where.
        key: the cluster's; none on loopback only.
        option: where the address comes from, for errors.

    Raises:
        AddressError: it is in use, or not this machine's.
    """

    def __init__(self, context: zmq.asyncio.Context, listen: Address, *, key: ClusterKey | None, option: str) -> None:
        self._listener = ZmqListener(context, listen, key=key, option=option)
        self.address = self._listener.address

    @classmethod
    async def open(
        cls, context: zmq.asyncio.Context, listen: Address, *, key: ClusterKey, option: str
    ) -> ControlListener:
        """Listen, waiting a little for an address that is still in use.

        Raises:
            AddressError: it stays in use, or is not this machine's.
        """
        until_s = time.monotonic() + BIND_S
        while True:
            try:
                return cls(context, listen, key=key, option=option)
            except AddressError:
                if time.monotonic() > until_s:
                    raise
            await asyncio.sleep(BIND_AGAIN_S)

    def send(self, peer: bytes, message: Message) -> bool:
        """Queue a message; False when the peer is gone or its queue is full."""
        return self._listener.send(peer, _encode(message))

    async def receive(self) -> tuple[bytes, Message]:
        """The next message and its peer; frames that are none are logged and passed over."""
        while True:
            peer, parts = await self._listener.receive()
            try:
                return peer, _decode(parts)
            except ProtocolError as error:
                logger.warning("refused a frame: %s", error)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


class ControlClient:
    """The connecting side, in a thread of its own.

    Args:
        address: of the listener.
        key: the cluster's.
        connect_s: how long to try.
        silence_s: the connection is lost when the other machine is silent for so long.
        hello: the first message, sent once connected.
        on_message: takes each message, in that thread.
        on_lost: told once, in that thread, why there will be no more messages; not called after `close`.
    """

    def __init__(
        self,
        address: Address,
        *,
        key: ClusterKey,
        connect_s: float,
        silence_s: float,
        hello: Message,
        on_message: Callable[[Message], None],
        on_lost: Callable[[ExoKimiError], None],
    ) -> None:
        self._address, self._key = address, key
        self._connect_s, self._silence_s = connect_s, silence_s
        self._hello, self._on_message, self._on_lost = hello, on_message, on_lost
        self._open: Future[None] = Future()
        threading.Thread(target=self._run, name="exo-kimi-control", daemon=True).start()

    def close(self) -> None:
        """End the connection and the thread; idempotent."""
        self._open.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._receive_while_open())
        except ExoKimiError as error:
            self._on_lost(error)

    async def _receive_while_open(self) -> None:
        receiving, open_ = asyncio.create_task(self._receive()), asyncio.wrap_future(self._open)
        await asyncio.wait([receiving, open_], return_when=asyncio.FIRST_COMPLETED)
        open_.cancel()
        if receiving.done():
            receiving.result()

    async def _receive(self) -> None:
        context = zmq.asyncio.Context()
        try:
            link = await connect(
                context, self._address, key=self._key, deadline_s=self._connect_s, silence_s=self._silence_s
            )
            link.send(_encode(self._hello))
            while True:
                self._on_message(_decode(await link.receive()))
        finally:
            context.destroy(linger=0)


def _encode(message: Message) -> list[bytes]:
    return [json.dumps(message).encode()]


def _decode(parts: Sequence[Part]) -> Message:
    try:
        message = json.loads(bytes(parts[0])) if len(parts) == 1 and len(parts[0]) < MOST_BYTES else None
    except ValueError as error:
        raise ProtocolError("a control message that is not JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("a control message that is not one JSON object")
    return message
