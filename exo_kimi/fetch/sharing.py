"""`exo-kimi share`: a checkpoint directory for other machines that hold the cluster key, while it stays servable.

A CURVE link hands each of them the key of a session; its connections, sealed with it, ask for the list, for byte ranges and for
hashes of ranges. Only files of the list are read, and nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq.asyncio

from exo_kimi.checkpoint.doctor.hashes import hub_hashes
from exo_kimi.checkpoint.text_files import CONFIG_NAME, MOST_TEXT_BYTES
from exo_kimi.errors import ExoKimiError, NotACheckpointError, NotHeldError, ProtocolError
from exo_kimi.fetch.held import HeldFile
from exo_kimi.fetch.part import file_sha256
from exo_kimi.fetch.source import is_wanted
from exo_kimi.runtime.end_signals import EndSignals
from exo_kimi.runtime.transport.address import Address, numeric_host
from exo_kimi.runtime.transport.control import ControlListener
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.sealed import ID_BYTES, NUMBER_BYTES, SealedStream, SessionKey

VERSION = 1
MOST_SESSIONS = 64
MOST_CONNECTIONS = 128
GREETING_S = 5.0
SILENCE_S = 60.0
_DATA, _END, _ERROR = range(3)  # kinds of records
DATA_BYTES = 1 << 19
FILE_LIST = "files"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    key: SessionKey
    used: set[int] = field(default_factory=set)


class SharedDirectory:
    """A directory's files as a share offers them: looked at once, then read by ranges of the whole files.

    Args:
        directory: a checkpoint, whole or a share.

    Raises:
        NotACheckpointError: there is none.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / CONFIG_NAME).is_file():
            raise NotACheckpointError(
                "no config.json in the directory",
                where=directory,
                fix="give the folder of config.json and *.safetensors",
            )
        self.directory = directory
        self._held: dict[str, HeldFile] = {}
        known = hub_hashes(directory)
        self.list: dict[str, dict[str, Any]] = {}
        for path in sorted(directory.iterdir()):
            if not is_wanted(path.name) or not path.is_file():
                continue
            try:
                held = HeldFile.open(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s is not shared: %s", path.name, error)
                continue
            if path.suffix != ".safetensors" and held.size > MOST_TEXT_BYTES:
                continue
            self._held[path.name] = held
            self.list[path.name] = _described(held, known.get(path.name))

    @property
    def revision(self) -> str:
        """Equal for the same files."""
        text = json.dumps(self.list, sort_keys=True) + "".join(
            hashlib.sha256(held.head or _first_bytes(held)).hexdigest() for held in self._held.values()
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def held(self, name: str) -> HeldFile:
        """A file of the list.

        Raises:
            NotHeldError: it is none.
        """
        found = self._held.get(name)
        if found is None:
            raise NotHeldError("no such file is shared", found=name, where=self.directory)
        return found


def share(directory: Path, listen: Address, *, key: ClusterKey | None, announce: Callable[[Address], None]) -> None:
    """Share until Ctrl-C.

    Args:
        directory: a checkpoint.
        listen: where.
        key: the cluster's; none on loopback only.
        announce: told the address once others can connect.

    Raises:
        NotACheckpointError: the directory is none.
        AddressError, KeyMismatchError: see `ZmqListener`.
    """
    shared = SharedDirectory(directory)
    with EndSignals(signal.default_int_handler), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve_share(shared, listen, key=key, announce=announce))


async def serve_share(
    shared: SharedDirectory, listen: Address, *, key: ClusterKey | None, announce: Callable[[Address], None]
) -> None:
    """Share until cancelled; see `share`."""
    context = zmq.asyncio.Context()
    sessions: dict[bytes, _Session] = {}
    try:
        control = ControlListener(context, listen, key=key, option="--listen")
        bulk = _bulk_listener(listen)
        server = _BulkServer(bulk, shared, sessions)
        server.start()
        try:
            announce(control.address)
            while True:
                peer, message = await control.receive()
                control.send(peer, _answer(message, shared, sessions, bulk.getsockname()[1]))
        finally:
            server.stop()
            control.close()
    finally:
        context.destroy(linger=0)


def _answer(
    message: Mapping[str, Any], shared: SharedDirectory, sessions: dict[bytes, _Session], port: int
) -> Mapping[str, Any]:
    """A new session for a member; the oldest ends where there are too many."""
    if message.get("want") != "share" or message.get("version") != VERSION:
        return {"error": f"this machine shares weights, version {VERSION}: both need the same exo-kimi"}
    session = _Session(SessionKey.generate())
    while len(sessions) >= MOST_SESSIONS:
        del sessions[next(iter(sessions))]
    sessions[session.key.id] = session
    return {
        "version": VERSION,
        "name": shared.directory.resolve().name,
        "port": port,
        "session": session.key.id.hex(),
        "secret": session.key.secret.hex(),
    }


class _BulkServer:
    """Accepts connections of sessions, each with a thread of its own."""

    def __init__(self, listener: socket.socket, shared: SharedDirectory, sessions: dict[bytes, _Session]) -> None:
        self._listener, self._shared, self._sessions = listener, shared, sessions
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._accept, name="share-accept", daemon=True).start()

    def stop(self) -> None:
        """Close everything; the threads end by it."""
        self._ended.set()
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._ended.is_set():
                    return
                self._ended.wait(0.1)  # no descriptor is left, perhaps
                continue
            with self._lock:
                full = len(self._open) >= MOST_CONNECTIONS
                if not full:
                    self._open.add(connection)
            if full:
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="share", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            stream = self._greet(connection)
            if stream is not None:
                while True:
                    stream.set_timeout(None)
                    request = json.loads(bytes(stream.receive()[1]))
                    stream.set_timeout(SILENCE_S)
                    self._carry_out(request, stream)
        except (OSError, ValueError, TypeError, KeyError, ProtocolError) as error:
            if not isinstance(error, ConnectionError):
                logger.debug("a connection ended: %s", error)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _greet(self, connection: socket.socket) -> SealedStream | None:
        """Which session a connection is of; one that names none, or a number again, is closed."""
        connection.settimeout(GREETING_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # one that waits for ever keeps a place
        greeting = b""
        while len(greeting) < ID_BYTES + NUMBER_BYTES:
            data = connection.recv(ID_BYTES + NUMBER_BYTES - len(greeting))
            if not data:
                return None
            greeting += data
        number = int.from_bytes(greeting[ID_BYTES:], "little")
        with self._lock:
            session = self._sessions.get(greeting[:ID_BYTES])
            if session is None or number in session.used:
                return None
            session.used.add(number)
        return session.key.stream(connection, number, listens=True)

    def _carry_out(self, request: Mapping[str, Any], stream: SealedStream) -> None:
        try:
            if request["do"] == "list":
                answer = {FILE_LIST: self._shared.list, "revision": self._shared.revision}
                self._send_all(stream, json.dumps(answer).encode())
            elif request["do"] == "read":
                held = self._shared.held(str(request["file"]))
                for data in held.read(int(request["start"]), int(request["end"]), piece_bytes=DATA_BYTES):
                    self._send_all(stream, data)
            else:
                held, digest = self._shared.held(str(request["file"])), hashlib.sha256()
                for start, end in request["ranges"]:
                    for data in held.read(int(start), int(end)):
                        digest.update(data)
                self._send_all(stream, digest.hexdigest().encode())
            stream.send(b"", _END)
        except ExoKimiError as error:
            stream.send(json.dumps({"what": error.what, "held": False}).encode(), _ERROR)
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            logger.warning("cannot read %s: %s", request.get("file"), error.strerror)
            stream.send(json.dumps({"what": f"cannot be read there: {error.strerror}"}).encode(), _ERROR)

    def _send_all(self, stream: SealedStream, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), DATA_BYTES):
            stream.send(view[start : start + DATA_BYTES], _DATA)


def read_answer(stream: SealedStream) -> memoryview | None:
    """One record of an answer: data, which lasts until the next call, or None at its end.

    Raises:
        NotHeldError: the other machine does not have what was asked for.
        OSError, ProtocolError: see `SealedStream.receive`, and what the other machine could not read.
    """
    kind, body = stream.receive()
    if kind == _DATA:
        return body
    if kind == _END:
        return None
    fields = json.loads(bytes(body))
    if fields.get("held") is False:
        raise NotHeldError(str(fields["what"]))
    raise OSError(str(fields["what"]))


def _bulk_listener(listen: Address) -> socket.socket:
    if listen.path is not None or listen.is_loopback:
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        return socket.create_server((listen.host if listen.path is None else "127.0.0.1", 0), family=family)
    if listen.is_wildcard:
        if listen.host == "::":
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", 0))
    host = numeric_host(socket.getaddrinfo(listen.host, 0, type=socket.SOCK_STREAM))
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(found[4][:2] if found[0] == socket.AF_INET else found[4], family=found[0])


def _described(held: HeldFile, sha256: str | None) -> dict[str, Any]:
    """What the list says of a file."""
    if not held.is_whole:
        ranges = [[0, len(held.head)], *([start, end] for start, end, _ in held.ranges)]
        return {"size": held.size, "sha256": held.sha256, "held": ranges}
    if held.path.suffix != ".safetensors":
        sha256 = file_sha256(held.path)
    return {"size": held.size, "sha256": sha256, "held": None}


def _first_bytes(held: HeldFile) -> bytes:
    with held.path.open("rb") as stream:
        return stream.read(1 << 16)


def new_number() -> int:
    """A number for a connection of a session."""
    return secrets.randbits(8 * NUMBER_BYTES)
