"""A hub on loopback: the list, ranged files and a redirect to another host's path, with faults on demand, for the real client.

A file is a path, or a `BigFile` that is made as it is read.
"""

from __future__ import annotations

import hashlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 14


@dataclass(frozen=True)
class BigFile:
    """A weight file with a header and as many zeros as it says."""

    header: bytes
    size: int

    def read(self, start: int, end: int) -> bytes:
        return self.header[start:end].ljust(end - start, b"\0")


@dataclass
class Fault:
    """What happens to a request: a status in place of the file, or a body that breaks off or differs.

    Args:
        status: instead of the file; with `headers`.
        cut_after: bytes of the body after which the connection ends.
        flip_at: a byte of the file that comes wrong.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    flip_at: int | None = None


@dataclass
class HubStandIn:
    """What the stand-in has and has done."""

    files: Mapping[str, Path | BigFile]
    model: str = "org/kimi"
    bytes_per_s: float | None = None
    fault: Callable[[str, int], Fault | None] = lambda name, number: None
    listing_fault: Fault | None = None
    sent_bytes: int = 0
    requests: int = 0
    listings: int = 0
    tokens: set[str] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _listing: bytes = b""

    def size(self, name: str) -> int:
        file = self.files[name]
        return file.size if isinstance(file, BigFile) else file.stat().st_size

    def listing(self) -> bytes:
        if not self._listing:
            self._listing = self._list_files()
        return self._listing

    def _list_files(self) -> bytes:
        siblings = []
        for name, file in self.files.items():
            sibling = {"rfilename": name, "size": self.size(name), "blobId": "0" * 40}
            if isinstance(file, BigFile):
                sibling["lfs"] = {"sha256": "0" * 64, "size": file.size, "pointerSize": 135}
            elif name.endswith((".safetensors", ".model")):
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": self.size(name), "pointerSize": 135}
            else:
                data = file.read_bytes()
                sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(sibling)
        return json.dumps({"id": self.model, "sha": COMMIT, "siblings": siblings}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(f"{path.split('/')[1]} {token}")
        if path.startswith("/api/models/"):
            self._list(path)
        elif f"/{self.hub.model}/resolve/{COMMIT}/" in path:
            # As on the hub, the bytes are somewhere else.
            self._answer(302, {"Location": f"{self.hub.url}/cdn/{path.rpartition('/')[2]}", "Content-Length": "0"})
        elif path.startswith("/cdn/"):
            self._file(path.rpartition("/")[2])
        else:
            self._answer(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})

    do_HEAD = do_GET

    def _list(self, path: str) -> None:
        fault = self.hub.listing_fault
        self.hub.listings += 1
        model, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if fault is not None and fault.status is not None:
            self._answer(fault.status, {**fault.headers, "Content-Length": "0"})
        elif model != self.hub.model:
            self._answer(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        elif revision not in ("", "main", COMMIT):
            self._answer(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"})
        else:
            body = self.hub.listing()
            self._answer(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
            self.wfile.write(body)

    def _file(self, name: str) -> None:
        hub = self.hub
        with hub.lock:
            hub.requests += 1
            fault = hub.fault(name, hub.requests)
        if fault is not None and fault.status is not None:
            self._answer(fault.status, {**fault.headers, "Content-Length": "0"})
            return
        file = hub.files[name]
        unit, _, ranges = self.headers["Range"].partition("=")
        first, _, last = ranges.partition("-")
        start, end = int(first), int(last) + 1
        assert unit == "bytes" and end <= hub.size(name)
        self._answer(
            206, {"Content-Range": f"bytes {start}-{end - 1}/{hub.size(name)}", "Content-Length": str(end - start)}
        )
        sent = 0
        stream = None if isinstance(file, BigFile) else file.open("rb")
        try:
            while start + sent < end:
                at = start + sent
                count = min(CHUNK, end - at)
                if fault is not None and fault.cut_after is not None:
                    count = min(count, fault.cut_after - sent)
                    if count <= 0:
                        self.close_connection = True
                        self.connection.shutdown(2)
                        return
                if isinstance(file, BigFile):
                    data = bytearray(file.read(at, at + count))
                else:
                    stream.seek(at)
                    data = bytearray(stream.read(count))
                if fault is not None and fault.flip_at is not None and at <= fault.flip_at < at + count:
                    data[fault.flip_at - at] ^= 0xFF
                if self._is_left():
                    raise ConnectionResetError("the client is gone")
                self.wfile.write(data)
                sent += count
                with hub.lock:
                    hub.sent_bytes += count
                if hub.bytes_per_s is not None:
                    time.sleep(count / hub.bytes_per_s)
        except OSError:
            self.close_connection = True
        finally:
            if stream is not None:
                stream.close()

    def _is_left(self) -> bool:
        """Whether the client's end is closed: what would be written then is no byte that it fetched."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _answer(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def hub_stand_in(files: Path | Mapping[str, Path | BigFile], **settings: object) -> Iterator[HubStandIn]:
    """Serve a directory's files, or files by name, until the context ends."""
    found = {path.name: path for path in files.iterdir() if path.is_file()} if isinstance(files, Path) else files
    hub = HubStandIn(found, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
