"""The server as a process: the address first, and an orderly end."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from exo_kimi.errors import AddressError
from exo_kimi.serve.server import base_url, bind, run

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).parent / "stub_server.py"
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_port_in_use_is_refused_before_anything_is_loaded():
    loaded = []

    async def factory():
        loaded.append(True)

    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port} is in use"):
            run(factory, port=port)
    assert not loaded


def test_an_address_that_is_not_ours_is_refused_in_one_message():
    for host, port in (("no.such.host.invalid", 1), ("192.0.2.1", 8080), ("127.0.0.1", 70000), ("127.0.0.1", -1)):
        with pytest.raises(AddressError):
            bind(host, port)


def test_a_loop_that_finds_no_descriptor_is_one_error(monkeypatch, capfd):
    """asyncio's half-made loop printed that it could not be closed, and Python that nobody had run the server."""

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        run(None, port=0)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_base_urls_have_brackets_for_ipv6():
    assert base_url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert base_url("::1", 80) == "http://[::1]:80"


@pytest.fixture
def stub(voice):
    """A running server process and its URL."""
    process = subprocess.Popen(
        [sys.executable, str(STUB), str(voice.directory), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_requests_engine_and_process_in_this_order(stub, number):
    process, url = stub
    answers = {}

    def ask(name, body):
        answers[name] = httpx.post(url + CHAT, json=body, timeout=20)

    threads = [
        threading.Thread(target=ask, args=("whole", ASK)),
        threading.Thread(target=ask, args=("stream", {**ASK, "stream": True})),
    ]
    for thread in threads:
        thread.start()
    with httpx.stream("POST", url + CHAT, json={**ASK, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        while "exo_kimi_requests_total 3.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.02)
        process.send_signal(number)
        rest = "\n".join(lines)
    for thread in threads:
        thread.join(20)
    output, errors = process.communicate(timeout=20)
    assert answers["whole"].status_code == 503
    assert answers["whole"].json()["error"]["code"] == "engine_stopped"
    streamed = answers["stream"]
    for text in (rest, streamed.text):
        assert "the server is shutting down" in text
        # One that had not begun is a refusal like the whole answer.
        assert text.rstrip().endswith("data: [DONE]") or (text is streamed.text and streamed.status_code == 503)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert output.splitlines()[0] == "closed 1"
    assert output.splitlines()[-1] == "left"
