"""The listening side of ZeroMQ links; with a key it takes only members that hold the same one (CURVE and ZAP).

It knows frames as parts of bytes and nothing of their meaning.
"""

from __future__ import annotations

import asyncio
import errno
import socket as sockets
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio
from zmq.utils import z85

from exo_kimi.errors import AddressError
from exo_kimi.runtime.transport.address import Address, numeric_host
from exo_kimi.runtime.transport.keys import ClusterKey, require_key
from exo_kimi.runtime.transport.link import Part
from exo_kimi.runtime.transport.ready_socket import ReadySocket, plain_socket
from exo_kimi.runtime.transport.zmq_link import configure, tcp_endpoint

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class ZmqListener:
    """A ROUTER; with a key it takes only members that hold the same key."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: Address,
        *,
        key: ClusterKey | None,
        option: str,
        on_frame: Callable[[bytes, list[Part]], None] | None = None,
    ) -> None:
        """Listen at an address. Frames go with their peer to `on_frame` as they come, or without it wait for `receive`.

        Raises:
            AddressError: not an address of this machine, or in use.
            KeyMismatchError: no key although other machines can reach it.
        """
        if not address.is_loopback:
            key = require_key(key, address)
        self._gatekeeper: tuple[zmq.asyncio.Socket, asyncio.Task[None]] | None = None
        socket = plain_socket(context, zmq.ROUTER)
        configure(socket)
        socket.router_mandatory = True
        self._frames: asyncio.Queue[tuple[bytes, list[Part]]] = asyncio.Queue()
        self._on_frame = on_frame or (lambda peer, parts: self._frames.put_nowait((peer, parts)))
        self._socket = ReadySocket(socket, self._take)
        if key is not None:
            # Before binding: a peer that comes before the gatekeeper would be let in with any key.
            self._gatekeeper = _start_gatekeeper(context, key)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = key.public, key.secret
        try:
            self.address = _bind(socket, address, option)
        except AddressError:
            self.close()
            raise

    def send(self, peer: bytes, parts: Sequence[Part]) -> bool:
        """Queue a frame; False when the peer is gone or its queue is full."""
        try:
            self._socket.send([peer, *parts])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    async def receive(self) -> tuple[bytes, list[Part]]:
        """The next frame and its peer."""
        return await self._frames.get()

    def close(self) -> None:
        self._socket.close()
        if self._gatekeeper is not None:
            socket, task = self._gatekeeper
            task.cancel()
            socket.close(linger=0)

    def _take(self, frame: list[Part]) -> None:
        peer, *parts = frame
        self._on_frame(bytes(peer), parts)


def _start_gatekeeper(context: zmq.asyncio.Context, key: ClusterKey) -> tuple[zmq.asyncio.Socket, asyncio.Task[None]]:
    """Answer libzmq's questions who may join: those whose public key is the cluster's (ZAP, RFC 27)."""
    socket = context.socket(zmq.REP)
    socket.bind(_ZAP_ENDPOINT)
    expected = z85.decode(key.public)

    async def answer() -> None:
        while True:
            version, request_id, *rest = await socket.recv_multipart()
            allowed = rest[3:] == [b"CURVE", expected]
            status = [b"200", b"OK"] if allowed else [b"400", b"not a member"]
            await socket.send_multipart([version, request_id, *status, b"", b""])

    return socket, asyncio.create_task(answer())


def _bind(socket: zmq.Socket[bytes], address: Address, option: str) -> Address:
    if address.path is not None:
        endpoint = address.endpoint
    else:
        endpoint = tcp_endpoint(_number(address, option), address.port)
        socket.ipv6 = "[" in endpoint
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"{address} is in use", where=option, fix="stop what listens there, or choose another port"
            ) from error
        raise AddressError("cannot listen", found=error.strerror, where=f"{option} {address}") from error
    if address.path is not None:
        return address
    return Address(address.host, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]))


def _number(address: Address, option: str) -> str:
    """The host as a number: libzmq binds to numbers and interface names, never to host names."""
    if address.is_wildcard:
        return address.host
    try:
        found = sockets.getaddrinfo(address.host, address.port, type=sockets.SOCK_STREAM)
    except OSError as error:
        raise AddressError("no such host", found=error.strerror, where=f"{option} {address}") from error
    return numeric_host(found)
