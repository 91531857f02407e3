"""Another machine's `exo-kimi share` as a source."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import zmq.asyncio

from exo_kimi.errors import (
    ExoKimiError,
    FetchError,
    KeyMismatchError,
    NotHeldError,
    ProtocolError,
    StageUnreachableError,
)
from exo_kimi.fetch.sharing import FILE_LIST, VERSION, new_number, read_answer
from exo_kimi.fetch.source import Listing, RemoteFile, TryAgainError, is_wanted
from exo_kimi.runtime.transport.address import Address
from exo_kimi.runtime.transport.keys import ClusterKey
from exo_kimi.runtime.transport.sealed import NUMBER_BYTES, SealedStream, SessionKey
from exo_kimi.runtime.transport.zmq_link import connect

CONNECT_S = 10.0
SILENCE_S = 30.0
DIGEST_S = 900.0  # a large file on a slow disk
MOST_LIST_BYTES = 64 << 20
_SHARE_FIX = "run `exo-kimi share DIR --listen ADDR` there; check address, cable and firewall"


class ShareSource:
    """What another machine shares. Connections are kept for the next request; a lost one is opened again.

    Args:
        address: of `exo-kimi share`.
        key: the cluster's.
        model: a name for it; the directory's there when not given.
    """

    def __init__(self, address: Address, *, key: ClusterKey | None, model: str | None = None) -> None:
        self._address, self._key, self._model = address, key, model
        self._lock = threading.Lock()
        self._idle: list[SealedStream] = []
        self._open: set[SealedStream] = set()
        self._session: tuple[SessionKey, int, str] | None = None
        self._closed = False

    def listing(self) -> Listing:
        """What it has.

        Raises:
            KeyMismatchError: the cluster keys differ.
            FetchError: nobody shares there, or the answer is none.
        """
        try:
            raw = json.loads(self._answer_to({"do": "list"}, most_bytes=MOST_LIST_BYTES))
            files = {name: _remote(name, fields) for name, fields in raw[FILE_LIST].items() if is_wanted(name)}
            revision = str(raw["revision"])
        except TryAgainError as error:
            raise FetchError(
                "the other machine does not answer", found=error.reason, where=self._address, fix=_SHARE_FIX
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError("the other machine's list cannot be read", found=error, where=self._address) from error
        _, _, name = self._open_session()
        return Listing(model=self._model or name, revision=revision, files=files, where=str(self._address))

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[memoryview]:
        """The bytes [start, end) of a whole file, in pieces that last until the next one is asked for.

        Raises:
            TryAgainError: the connection broke.
            NotHeldError: the other machine does not have them.
            FetchError: the keys differ, or it cannot read its file.
        """
        left = end - start
        for data in self._ask({"do": "read", "file": file.name, "start": start, "end": end}, most_bytes=left):
            left -= len(data)
            yield data
        if left:
            raise TryAgainError("the answer ended early")

    def digest(self, file: RemoteFile, ranges: tuple[tuple[int, int], ...]) -> str | None:
        """SHA-256 of ranges of a file, as it lies on the other machine's disk."""
        request = {"do": "digest", "file": file.name, "ranges": ranges}
        for attempt in range(3):
            try:
                return self._answer_to(request, most_bytes=64, silence_s=DIGEST_S).decode("ascii")
            except TryAgainError as error:
                if attempt == 2:
                    raise FetchError("the other machine does not answer", found=error.reason) from error
        return None

    def close(self) -> None:
        """Close every connection, also under one that reads from it; idempotent."""
        with self._lock:
            self._closed = True
            self._idle.clear()
            for stream in self._open:
                stream.end()

    def _answer_to(self, request: Mapping[str, Any], *, most_bytes: int, silence_s: float = SILENCE_S) -> bytes:
        return b"".join(bytes(data) for data in self._ask(request, most_bytes=most_bytes, silence_s=silence_s))

    def _ask(
        self, request: Mapping[str, Any], *, most_bytes: int, silence_s: float = SILENCE_S
    ) -> Iterator[memoryview]:
        """The records of one answer, on a connection that is kept where the answer was read to its end."""
        with self._named_errors():
            stream = self._stream()
            ended = False
            try:
                stream.set_timeout(silence_s)
                stream.send(json.dumps(request).encode())
                left = most_bytes
                while (data := read_answer(stream)) is not None:
                    left -= len(data)
                    if left < 0:
                        raise FetchError("the other machine sent more than was asked for", where=self._address)
                    yield data
                ended = True
            except NotHeldError:
                ended = True
                raise
            finally:
                self._give_back(stream, usable=ended)

    def _stream(self) -> SealedStream:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        session, port, _ = self._open_session()
        number = new_number()
        try:
            connection = socket.create_connection((self._address.host, port), timeout=CONNECT_S)
        except OSError as error:
            self._session = None  # the share was started again, perhaps, on another port
            raise TryAgainError(f"no connection: {error.strerror or error}") from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(session.id + number.to_bytes(NUMBER_BYTES, "little"))
        stream = session.stream(connection, number, listens=False)
        with self._lock:
            self._open.add(stream)
        return stream

    def _give_back(self, stream: SealedStream, *, usable: bool) -> None:
        with self._lock:
            if usable and not self._closed:
                self._idle.append(stream)
                return
            if not usable:
                self._session = None
            self._open.discard(stream)
        stream.close()

    def _open_session(self) -> tuple[SessionKey, int, str]:
        with self._lock:
            if self._session is None:
                answer = asyncio.run(self._greet())
                if "error" in answer:
                    raise FetchError("the other machine refuses", found=answer["error"], where=self._address)
                try:
                    key = SessionKey(bytes.fromhex(answer["session"]), bytes.fromhex(answer["secret"]))
                    self._session = key, int(answer["port"]), str(answer["name"])
                except (KeyError, TypeError, ValueError) as error:
                    raise FetchError("the other machine's answer cannot be read", where=self._address) from error
            return self._session

    async def _greet(self) -> Mapping[str, Any]:
        context = zmq.asyncio.Context()
        try:
            link = await connect(context, self._address, key=self._key, deadline_s=CONNECT_S)
            try:
                link.send([json.dumps({"want": "share", "version": VERSION}).encode()])
                parts = await asyncio.wait_for(link.receive(), CONNECT_S)
            finally:
                link.close()
            answer = json.loads(bytes(parts[0]))
            return answer if isinstance(answer, dict) else {}
        except TimeoutError:
            raise TryAgainError("no answer") from None
        finally:
            context.destroy(linger=0)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except KeyMismatchError as error:
            raise KeyMismatchError(
                "the other machine holds another cluster key, or none",
                where=self._address,
                fix="the two sides must hold the same key: --key-file FILE or EXO_KIMI_KEY; or pair the machines",
            ) from error
        except StageUnreachableError as error:
            raise TryAgainError(error.found or error.what) from error
        except ProtocolError as error:
            raise TryAgainError(error.what) from error
        except ExoKimiError:
            raise
        except OSError as error:
            raise TryAgainError(error.strerror or str(error)) from error


def _remote(name: str, fields: Mapping[str, Any]) -> RemoteFile:
    held = fields["held"]
    return RemoteFile(
        name=name,
        size=int(fields["size"]),
        sha256=None if fields["sha256"] is None else str(fields["sha256"]),
        held=None if held is None else tuple((int(start), int(end)) for start, end in held),
    )
