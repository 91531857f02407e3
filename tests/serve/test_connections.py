"""Connections that say little, slowly or nothing do not keep others out; descriptors are asked for and never run out loudly."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn

from exo_kimi.serve import connections
from exo_kimi.serve.answer import generation
from exo_kimi.serve.connections import ACCEPTED_AT_ONCE, BACKLOG, BoundedProtocol, BoundedState, quiet_accept_errors
from exo_kimi.serve.contract import REASONS, ErrorAnswer
from exo_kimi.serve.server import Served, _Uvicorn, bind

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"


@asynccontextmanager
async def served(app, *, descriptors=4096):
    """The port of the app behind `BoundedProtocol`, and its state; `state.reasons` are those of closed connections."""
    reasons = []
    state = BoundedState(descriptors, reasons.append)
    state.reasons = reasons
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, http=BoundedProtocol, backlog=ACCEPTED_AT_ONCE, ws="none"
    )
    server = uvicorn.Server(config)
    server.server_state = state
    config.load()
    server.lifespan = config.lifespan_class(config)
    listener = bind("127.0.0.1", 0)
    await server.startup([listener])
    listener.listen(BACKLOG)
    try:
        yield listener.getsockname()[1], state
    finally:
        server.force_exit = True
        await server.shutdown()


async def refusal(reader) -> tuple[int, dict]:
    head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    assert re.search(rb"x-request-id: req_[0-9a-f]{32}\r\n", head + b"\r\n")
    return int(head.split()[1]), json.loads(body)


async def chat(port: int) -> httpx.Response:
    async with httpx.AsyncClient(timeout=5) as client:
        return await client.post(f"http://127.0.0.1:{port}{CHAT}", json=ASK)


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HEAD, HEAD + b"\r\n", HEAD + b'\r\n{"messages": '])
async def test_a_request_that_never_becomes_whole_is_ended(saying, app_of, monkeypatch, sent):
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    monkeypatch.setattr(connections, "BODY_S", 0.2)
    async with served(app_of(saying())) as (port, state):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        if sent:
            status, body = await refusal(reader)
            assert (status, body["error"]["code"]) == (408, "request_timeout")
            assert status in REASONS
            ErrorAnswer.model_validate(body)
        else:
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert not state.half_open
        assert not state.uploads
        expected = "silent" if not sent else "body_timeout" if b"\r\n\r\n" in sent else "headers_timeout"
        assert state.reasons == [expected]
        assert (await chat(port)).status_code == 200


@pytest.mark.parametrize(
    "start", [HEAD, HEAD + b"\r\n", b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n"]
)
async def test_dripping_bytes_does_not_win_time(saying, app_of, monkeypatch, start):
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    monkeypatch.setattr(connections, "BODY_S", 0.3)
    async with served(app_of(saying())) as (port, _):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            writer.write(start)
            while time.monotonic() - began < 5:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)


async def test_a_body_that_comes_at_a_fair_rate_has_the_time_that_it_needs(saying, app_of, monkeypatch):
    monkeypatch.setattr(connections, "BODY_S", 0.1)
    monkeypatch.setattr(connections, "BODY_BYTES_PER_S", 1000)
    body = json.dumps({**ASK, "user": "x" * 2000}).encode()
    async with served(app_of(saying())) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD.replace(b"1000", str(len(body)).encode()) + b"connection: close\r\n\r\n")
        for start in range(0, len(body), 200):
            writer.write(body[start : start + 200])
            await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_streams_and_kept_connections_have_no_deadline(saying, app_of, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    monkeypatch.setattr(connections, "BODY_S", 0.2)
    async with served(app_of(saying(delay_s=0.15))) as (port, _), httpx.AsyncClient(timeout=5) as client:
        for _ in range(2):
            answer = await client.post(f"http://127.0.0.1:{port}{CHAT}", json={**ASK, "stream": True})
            assert answer.text.rstrip().endswith("data: [DONE]")
            assert '"finish_reason":"stop"' in answer.text.replace(" ", "")
            await asyncio.sleep(0.4)


async def test_half_open_connections_give_way_to_a_request(saying, app_of, caplog):
    async with served(app_of(saying()), descriptors=64) as (port, state):
        opened = []
        for index in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hea" if index % 2 else HEAD + b"\r\n{")
            opened.append(writer)
            if index % 50 == 49:
                assert (await chat(port)).status_code == 200
        assert len(state.connections) <= 33
        for writer in opened:
            writer.close()
    assert len([record for record in caplog.records if "connections" in record.message]) == 1


async def test_an_honest_upload_is_not_what_gives_way_in_a_flood(saying, app_of):
    body = json.dumps({**ASK, "user": "x" * 100_000}).encode()
    async with served(app_of(saying()), descriptors=64) as (port, state):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD.replace(b"1000", str(len(body)).encode()) + b"connection: close\r\n\r\n")
        flood = []
        for start in range(0, len(body), 5_000):
            writer.write(body[start : start + 5_000])
            await writer.drain()
            for _ in range(10):
                _, other = await asyncio.open_connection("127.0.0.1", port)
                other.write(HEAD + b"\r\n{")  # an upload as well, which drips
                flood.append(other)
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200")
        assert state.reasons.count("gave_way") >= 150
        for other in (writer, *flood):
            other.close()


async def test_a_refusal_for_want_of_room_is_counted_and_named(saying, app_of):
    async with served(app_of(saying(delay_s=0.5)), descriptors=16) as (port, state):
        asked = [asyncio.create_task(chat(port)) for _ in range(8)]
        async with asyncio.timeout(5):
            while len(state.tasks) < 8:
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status, body = await refusal(reader)
        assert (status, body["error"]["code"]) == (503, "overloaded")
        assert state.reasons == ["too_many"]
        writer.close()
        for task in asked:
            task.cancel()


async def test_a_body_that_stops_is_refused_under_the_id_that_the_log_has(saying, app_of, monkeypatch, caplog):
    monkeypatch.setattr(connections, "BODY_S", 0.2)
    with caplog.at_level(logging.INFO, logger="exo_kimi.serve.gate"):
        async with served(app_of(saying())) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"\r\n{")
            answer = (await asyncio.wait_for(reader.read(), 5)).decode()
            writer.close()
    (name,) = re.findall(r"x-request-id: (req_\w+)", answer)
    assert f"{name} POST '{CHAT}' 408" in caplog.text


async def test_a_request_to_speak_another_protocol_is_answered_and_writes_no_line(saying, app_of, caplog):
    async with served(app_of(saying())) as (port, _), httpx.AsyncClient() as client:
        with caplog.at_level(logging.DEBUG):
            for protocol in ("websocket", "h2c"):
                headers = {"connection": "upgrade", "upgrade": protocol}
                answer = await client.get(f"http://127.0.0.1:{port}/health", headers=headers)
                assert answer.status_code == 200
    assert not [record for record in caplog.records if "pgrade" in record.message or "WebSocket" in record.message]


async def ask_and_not_read(port: int):
    """A connection with small buffers that asks for far more than they hold."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    more = {"stream": True, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20, "n": 4}
    body = json.dumps({**ASK, **more}).encode()
    writer.write(HEAD.replace(b"1000", str(len(body)).encode()) + b"connection: close\r\n\r\n" + body)
    return reader, writer


async def test_a_reader_that_takes_nothing_is_let_go_and_costs_little(saying, app_of, monkeypatch):
    """A fast engine, a client that never reads: what waits is bounded, and then so is the time."""
    monkeypatch.setattr(generation, "MOST_BEHIND_EVENTS", 200)
    monkeypatch.setattr(connections, "WRITE_S", 0.3)
    engine = saying([300] * 100_000)
    waiting = []
    put_nowait = asyncio.Queue.put_nowait

    def counted(queue, item):
        put_nowait(queue, item)
        if isinstance(item, tuple):
            waiting.append(queue.qsize())

    monkeypatch.setattr(asyncio.Queue, "put_nowait", counted)
    async with served(app_of(engine)) as (port, state):
        _, writer = await ask_and_not_read(port)
        async with asyncio.timeout(20):
            while engine.open or not engine.requests:
                await asyncio.sleep(0.01)
        assert not engine.finished
        async with asyncio.timeout(10):
            while not state.reasons:
                await asyncio.sleep(0.01)
        assert state.reasons == ["unread"]
        assert max(waiting) <= 210
        writer.close()


async def test_a_slow_reader_is_told_that_its_stream_ended_and_an_honest_one_gets_all(saying, app_of, monkeypatch):
    monkeypatch.setattr(generation, "MOST_BEHIND_EVENTS", 200)
    monkeypatch.setattr(connections, "WRITE_S", 0.5)
    engine = saying([300] * 100_000)
    async with served(app_of(engine)) as (port, state):
        reader, writer = await ask_and_not_read(port)
        async with asyncio.timeout(20):
            while engine.open or not engine.requests:
                await asyncio.sleep(0.01)
        text = (await asyncio.wait_for(reader.read(), 10)).decode()
        assert "stream_not_read" in text
        assert "data: [DONE]" in text
        writer.close()
        assert state.reasons == []


async def test_what_is_not_http_gets_the_declared_refusal(saying, app_of):
    async with served(app_of(saying())) as (port, state):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        status, body = await refusal(reader)
        assert (status, body["error"]["code"]) == (400, "invalid_http")
        assert state.reasons == ["invalid_http"]
        ErrorAnswer.model_validate(body)
        writer.close()


async def test_no_descriptor_for_a_connection_is_logged_once(caplog):
    loop = asyncio.get_running_loop()
    quiet_accept_errors(loop)
    with caplog.at_level(logging.WARNING):
        for _ in range(500):
            error = OSError(24, "Too many open files")
            loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
    assert len(caplog.records) == 1
    assert "no descriptor is left" in caplog.text


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), ZeroDivisionError()])
async def test_a_refusal_leaves_its_connection_for_the_next_request(saying, app_of, caplog, error):
    """Starlette raised what it had answered, and uvicorn closed the connection: the next request on it found it reset."""
    engine = saying(refusal=error)
    async with served(app_of(engine)) as (port, state):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(ASK).encode()
        for wanted in (b"50", b"200"):
            writer.write(HEAD.replace(b"1000", str(len(body)).encode()) + b"\r\n" + body)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 " + wanted)
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            await asyncio.sleep(0.05)
            engine.refusal = None
        assert len(state.connections) == 1
        writer.close()
    assert "Exception in ASGI" not in caplog.text


class Refused(socket.socket):
    """A listening socket whose connections find no descriptor at first."""

    def __init__(self, refusals):
        super().__init__()
        self.bind(("127.0.0.1", 0))
        self.refusals = refusals
        self.accepts = 0

    def accept(self):
        self.accepts += 1
        if self.accepts <= self.refusals:
            raise OSError(24, "Too many open files")
        return super().accept()


async def test_a_connection_that_finds_no_descriptor_is_tried_once_a_second(saying, app_of, monkeypatch):
    """asyncio tried as often at once as the backlog is long, and made a timer each time."""
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.1)
    quiet_accept_errors(asyncio.get_running_loop())
    listener = Refused(3)
    server = _Uvicorn(Served(app=app_of(saying()), engine=saying()), "", None)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([listener])
    try:
        assert (await chat(listener.getsockname()[1])).status_code == 200
        assert listener.accepts == 4
    finally:
        server.force_exit = True
        await uvicorn.Server.shutdown(server)


def in_process(arguments: list[str], soft: int, hard: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )


def test_the_soft_limit_is_raised_at_start():
    code = "from exo_kimi.runtime.descriptors import raise_descriptor_limit as r; print(r())"
    hard = min(5000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])  # mlx-lm lowers it to 4096 where it is imported
    assert in_process(["-c", code], 256, hard).stdout.strip() == str(hard)


@pytest.mark.parametrize("command", ["serve", "stage"])
def test_a_hard_limit_too_low_for_the_stages_is_one_clear_line(voice, command):
    words = {"serve": [str(voice.directory)], "stage": ["--listen", "127.0.0.1:0"]}[command]
    ended = in_process(["-m", "exo_kimi", command, *words], 256, 2048)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert "too few file descriptors" in ended.stderr
    assert "2048" in ended.stderr
    assert "4096" in ended.stderr
