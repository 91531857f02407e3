"""Whatever bytes a connection brings or a block of a prefix on disk holds: answered or refused, and never taken for another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from exo_kimi.checkpoint.safetensors_io import StoredTensor
from exo_kimi.runtime.stage.prefix_disk import BlockFiles, PrefixDisk
from exo_kimi.serve import connections
from exo_kimi.serve.connections import BoundedProtocol, BoundedState
from exo_kimi.serve.gate import Gate, allowed_hosts
from exo_kimi.serve.metrics import Metrics
from exo_kimi.serve.problems import ErrorAnswers

pytestmark = pytest.mark.fuzz
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost:8080\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)
REQUESTS = [
    b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    HEAD + LENGTH + BODY,
    HEAD + LENGTH + BODY + b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
    HEAD + b"expect: 100-continue\r\n" + LENGTH + BODY,
    HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nx: y\r\n\r\n" % (len(BODY), BODY),
    b"GET / HTTP/1.1\r\nhost: [::1]:1\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: eA==\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\nconnection: close\r\n\r\n",
    b"HEAD http://localhost/%00%ff?a=%zz&a#b HTTP/1.0\r\nauthorization: Bearer x\r\nx-api-key: \xff\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]
ODD_HTTP = [
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b"\x80", b"HTTP/1.1", b"HTTP/9.9", b"GET ", b"a" * 70_000),
    *(
        b"content-length: -1\r\n",
        b"content-length: 1e3\r\n",
        b"content-length: %d\r\n" % 10**25,
        b"content-length: 0\r\n",
    ),
    *(
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: gzip, x\r\n",
        b"0\r\n\r\n",
        b"FFFFFFFFFFFFFFFFFF\r\n",
        b"-1\r\n",
    ),
    *(b"host: a.example\r\n", b"host: \r\n", b"host: [\r\n", b"connection: keep-alive, close\r\n", b"origin: null\r\n"),
]


async def reading_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long the body was."""
    response: Response = PlainTextResponse(str(len(await Request(scope, receive).body())))
    await response(scope, receive, send)


class Records(logging.Handler):
    """What was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage() + str(record.exc_info))


def test_heads_and_bodies_of_http(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere, in pieces, from a client that goes away at any time: an answer below 500 or none, and nothing is left."""
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    monkeypatch.setattr(connections, "BODY_S", 0.5)
    gate = Gate(
        ErrorAnswers(reading_app),
        metrics=Metrics(lambda: None),  # type: ignore[arg-type, return-value]  # nobody asks for them
        paths=frozenset({"/health"}),
        hosts=allowed_hosts("127.0.0.1"),
    )
    config = uvicorn.Config(gate, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()

    async def exchange(pieces: list[bytes]) -> tuple[bytes, BoundedState, list[str]]:
        state, failures, records = BoundedState(4096), list[str](), Records()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(str(context)))
        logging.getLogger("uvicorn.error").addHandler(records)
        theirs, ours = socket.socketpair()
        with theirs, ours:
            theirs.setblocking(False)
            await loop.connect_accepted_socket(lambda: BoundedProtocol(config, state, {}, loop), ours)
            received = bytearray()
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    await loop.sock_sendall(theirs, piece)
                    await asyncio.sleep(0)
                theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(10):
                    while part := await loop.sock_recv(theirs, 1 << 16):
                        received += part
        async with asyncio.timeout(10):
            while state.connections or state.tasks:
                await asyncio.sleep(0.001)
        logging.getLogger("uvicorn.error").removeHandler(records)
        return bytes(received), state, failures + records.lines

    def check(case: tuple[bytes, int, int]) -> None:
        data, first, second = case
        pieces = [data[:first], data[first : first + second], data[first + second :]]
        received, state, failures = asyncio.run(exchange([piece for piece in pieces if piece]))
        assert not received or received.startswith(b"HTTP/1.1 ")
        statuses = [int(status) for status in re.findall(rb"(?:\A|\n|\})HTTP/1\.1 (\d{3}) ", received)]
        assert all(status < 500 for status in statuses), received
        seen.update(statuses)
        assert failures == []
        assert not state.half_open and not state.uploads

    seen = set[int]()
    sizes = st.integers(0, 300)
    fuzz.run(st.tuples(fuzz.bytes(REQUESTS, ODD_HTTP), sizes, sizes), check, few=150)
    assert seen >= {200, 400, 403}


def test_blocks_of_prefixes_on_disk(fuzz: Any, tmp_path: Path) -> None:
    """What comes back is what was written or nothing, and the file is gone then."""
    identity, key = "0" * 32, "a" * 32
    block = {
        "0.keys": StoredTensor("F32", np.arange(64, dtype=np.float32).reshape(1, 1, 16, 4)),
        "0.values": StoredTensor("BF16", np.arange(32, dtype=np.uint16).reshape(1, 1, 16, 2)),
        "1.keys": StoredTensor("U8", np.arange(64, dtype=np.uint8).reshape(1, 1, 16, 4)),
    }
    gone: list[tuple[str, ...]] = []
    files = BlockFiles(tmp_path / identity, identity)
    files.prepare()
    files.write(key, block)
    file = next(files.directory.iterdir())
    sound = file.read_bytes()
    disk = PrefixDisk(tmp_path, identity, block_bytes=500, disk_bytes=10**6, changed=lambda _, lost: gone.append(lost))
    size = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + size])

    def check(data: bytes) -> None:
        gone.clear()
        file.write_bytes(data)
        found = disk.read(key)
        if found is None:
            assert gone == [(key,)]
            assert not file.exists()
            return
        assert found.keys() == block.keys()
        for name, stored in block.items():
            assert found[name].dtype == stored.dtype
            assert found[name].data.shape == stored.data.shape
            assert found[name].data.tobytes() == stored.data.tobytes()

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + sound[8 + size :]

    try:
        words = ["__metadata__", "checksum", "dtype", "shape", "data_offsets", "0.keys"]
        fuzz.run(fuzz.texts([header], words).map(with_header), check, few=100)
        fuzz.run(fuzz.bytes([sound, sound[:200]]), check, few=100)
        check(sound)
        assert gone == []
    finally:
        disk.close()
