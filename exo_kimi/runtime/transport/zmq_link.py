"""The connecting side of a ZeroMQ link: handshake with a deadline, encrypted and authenticated by the cluster key (CURVE).

It knows frames as parts of bytes and nothing of their meaning. What goes wrong in the handshake is told apart by libzmq's
monitor: a wrong key is an error within a second and never a hang.
"""

from __future__ import annotations

import asyncio
import socket as sockets
import uuid
from collections.abc import Sequence

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from exo_kimi.errors import AddressError, KeyMismatchError, StageUnreachableError
from exo_kimi.runtime.transport.address import Address, numeric_host
from exo_kimi.runtime.transport.keys import ClusterKey, require_key
from exo_kimi.runtime.transport.link import MAX_PART_BYTES, Part
from exo_kimi.runtime.transport.ready_socket import ReadySocket, plain_socket

_GREETING_BYTES = 64
_GREETING_DEADLINE_S = 2.0
_HANDSHAKE_TRIES = 3  # one lost handshake may be a stage that is just ending; three in a row are a rule
_OTHER_KEY = "the two sides must hold the same key: give it with --key-file FILE or as EXO_KIMI_KEY"


class ZmqLink:
    """A DEALER with its monitor; made by `connect`."""

    def __init__(self, address: Address, socket: zmq.Socket[bytes], monitor: zmq.asyncio.Socket) -> None:
        self.address = address
        self._monitor = monitor
        self._frames: asyncio.Queue[list[Part] | None] = asyncio.Queue()
        self._lost = False
        self._socket = ReadySocket(socket, self._frames.put_nowait)
        self._watching = asyncio.create_task(self._watch())

    def send(self, parts: Sequence[Part]) -> None:
        if self._lost:
            raise self._lost_error()
        try:
            self._socket.send(parts)
        except zmq.ZMQError as error:
            raise self._lost_error() from error

    async def receive(self) -> list[Part]:
        frame = await self._frames.get()
        if frame is None:
            self._frames.put_nowait(None)
            raise self._lost_error()
        return frame

    def close(self) -> None:
        self._watching.cancel()
        self._end()

    async def _watch(self) -> None:
        try:
            while parse_monitor_message(await self._monitor.recv_multipart())["event"] != zmq.Event.DISCONNECTED:
                pass
            self._socket.take_rest()
        finally:
            self._end()  # a link that nobody watches is none

    def _end(self) -> None:
        if not self._lost:
            self._lost = True
            self._frames.put_nowait(None)
            _close_monitor(self._socket.raw, self._monitor)
            self._socket.close()

    def _lost_error(self) -> StageUnreachableError:
        return StageUnreachableError("the connection was lost", where=self.address)


async def connect(
    context: zmq.asyncio.Context,
    address: Address,
    *,
    key: ClusterKey | None,
    deadline_s: float,
    silence_s: float | None = None,
) -> ZmqLink:
    """Open a link and finish its handshake, trying again until the deadline while nobody listens.

    Args:
        context: where the socket lives.
        address: of a listener.
        key: the cluster key.
        deadline_s: give up after this time.
        silence_s: lose the link when the other machine's ZeroMQ is silent for so long (it answers in its own thread).

    Raises:
        AddressError: the host has no address.
        KeyMismatchError: no key for another machine, or not the one that the listener holds.
        StageUnreachableError: nobody, or something else, listens there.
    """
    key = key.for_loopback(address.is_loopback) if key is not None else None
    if not address.is_loopback:
        key = require_key(key, address)
    endpoint = address.endpoint if address.path is not None else tcp_endpoint(await _resolve(address), address.port)
    socket = plain_socket(context, zmq.DEALER)
    configure(socket)
    socket.ipv6 = "[" in endpoint
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000
    socket.immediate = True
    if silence_s is not None:
        socket.heartbeat_ivl = int(silence_s * 1000 / 4)
        socket.heartbeat_timeout = int(silence_s * 1000)
    if key is not None:
        socket.curve_serverkey = key.public
        socket.curve_publickey, socket.curve_secretkey = key.public, key.secret
    try:
        monitor = _monitor(context, socket)
    except BaseException:
        socket.close(linger=0)
        raise
    try:
        socket.connect(endpoint)
        await _handshake(monitor, address, key, deadline_s)
    except BaseException:
        _close_monitor(socket, monitor)
        socket.close(linger=0)
        raise
    return ZmqLink(address, socket, monitor)


def _monitor(context: zmq.asyncio.Context, socket: zmq.Socket[bytes]) -> zmq.asyncio.Socket:
    address = f"inproc://monitor-{uuid.uuid4().hex}"
    monitor = context.socket(zmq.PAIR)
    try:
        monitor.connect(address)
        socket.monitor(address)  # last: libzmq would wait for ever to tell a monitor that nobody made that it ends
    except BaseException:
        monitor.close(linger=0)
        raise
    return monitor


async def _handshake(monitor: zmq.asyncio.Socket, address: Address, key: ClusterKey | None, deadline_s: float) -> None:
    failures = 0
    found = "no answer"
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                event = parse_monitor_message(await monitor.recv_multipart())["event"]
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    return
                if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
                    raise _wrong_key(address)
                if event == zmq.Event.CLOSED:
                    found = "nothing listens there"
                elif event == zmq.Event.CONNECTED:
                    found = "something that accepts connections and does not answer as a stage"
                elif event == zmq.Event.DISCONNECTED:
                    # Which side notices first is chance, so libzmq's events do not tell the reason; the greeting does.
                    failures += 1
                    mechanism = await read_mechanism(address)
                    if mechanism == "":
                        raise _unreachable(address, "something that is not an exo-kimi stage")
                    if mechanism is not None and mechanism != ("NULL" if key is None else "CURVE"):
                        raise _one_sided(address, key)
                    if mechanism is not None and failures >= _HANDSHAKE_TRIES:
                        raise _wrong_key(address)
    except TimeoutError:
        raise _unreachable(address, f"{found} (waited {deadline_s:g} s)") from None


async def read_mechanism(address: Address) -> str | None:
    """How a listener secures its connections, from its greeting: `NULL` or `CURVE`; empty when it is not ZeroMQ; None when
    nobody answers.

    Source: ZMTP 3.1 (RFC 37), the greeting.
    """
    try:
        if address.path is not None:
            reader, writer = await asyncio.open_unix_connection(address.path)
        else:
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except OSError:
        return None
    try:
        # Signature and version only: at a mechanism that is not its own, the other side would close before it answers.
        writer.write(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01")
        async with asyncio.timeout(_GREETING_DEADLINE_S):
            greeting = await reader.readexactly(_GREETING_BYTES)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return ""
    finally:
        writer.close()
    is_zeromq = greeting[0] == 0xFF and greeting[9] == 0x7F
    return greeting[12:32].rstrip(b"\0").decode(errors="replace") if is_zeromq else ""


def configure(socket: zmq.Socket[bytes]) -> None:
    """What both sides want: no lingering, bounded parts, and dead machines noticed."""
    socket.linger = 0
    socket.maxmsgsize = MAX_PART_BYTES
    socket.handshake_ivl = 5000
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 10, 5, 3


def tcp_endpoint(host: str, port: int) -> str:
    """An endpoint; IPv6 goes in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _close_monitor(socket: zmq.Socket[bytes], monitor: zmq.asyncio.Socket) -> None:
    socket.disable_monitor()  # before the monitor's own end: libzmq waits for ever to say that it stopped
    monitor.close(linger=0)


async def _resolve(address: Address) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=sockets.SOCK_STREAM)
    except OSError as error:
        raise AddressError("no such host", found=error.strerror, where=address) from error
    return numeric_host(found)


def _wrong_key(address: Address) -> KeyMismatchError:
    return KeyMismatchError("the stage refused the cluster key", where=address, fix=_OTHER_KEY)


def _one_sided(address: Address, key: ClusterKey | None) -> KeyMismatchError:
    return KeyMismatchError(
        "only one side has a cluster key",
        expected="a key on both sides, or on neither",
        found="no key here" if key is None else "no key at the stage",
        where=address,
        fix=_OTHER_KEY,
    )


def _unreachable(address: Address, found: str) -> StageUnreachableError:
    return StageUnreachableError(
        "cannot reach the stage", found=found, where=address, fix="start it with `exo-kimi stage --listen ADDR`"
    )
